"""Adapters in a model: gradients through frozen experts, and rows that see an adapter beside rows that see none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.parameters import Parameters, make_parameters
from server.model.host.assembly import HostModel, load_model
from server.model.runner import RunnerOptions
from server.model.seam.adapters import Part
from server.model.seam.experts import experts_forward
from server.quality.batches import run_batch

TOKENS = [list(range(100, 112)), list(range(300, 312))]


def load(path: Path, num_slots: int | None = None) -> HostModel:
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=num_slots)
    return load_model(Store.open(path), options)


@pytest.fixture
def model(small_store: Path) -> Iterator[HostModel]:
    found = load(small_store, num_slots=3)
    yield found
    found.close()


def half(model: HostModel) -> ExpertMask:
    return ExpertMask.same_in_every_layer([0, 2, 3, 7], model.num_layers, model.store.manifest.model.num_experts)


def changed(model: HostModel, rank: int = 3) -> Parameters:
    """Parameters that change every module that an adapter may change."""
    parameters = make_parameters(model, rank, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parts in parameters.values():
            for one in parts.values():
                one.copy_(torch.randn(one.shape, generator=generator) * 0.1)
    model.routing.adapters.add("some", parameters, model.device, None)
    return parameters


def test_gradients_through_frozen_experts_are_those_of_dense_weights(model: HostModel) -> None:
    experts = model.model.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator, requires_grad=True)
    weights = torch.rand(6, 2, generator=generator, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 8], [7, 3], [0, 7], [5, 2], [4, 6]])  # 8 is a pick that does not exist
    factor = torch.randn(6, 32, generator=generator)
    torch.autograd.backward((experts_forward(experts, hidden, index, weights) * factor).sum())
    got = hidden.grad, weights.grad
    dense: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(8):
        (slot,) = model.cache.acquire(1, [expert])
        for name, values in dense.items():
            values.append(model.cache.pools[1].rows[name][slot].clone())
        model.cache.release(1, [expert])
    hidden.grad = weights.grad = None
    outputs = []
    for token in range(6):
        parts = [torch.zeros(32)]
        for pick in range(2):
            if (expert := int(index[token, pick])) < 8:
                up = hidden[token] @ dense["gate_up_proj"][expert].T
                gate, value = up.chunk(2)
                inner = torch.nn.functional.silu(gate) * value
                parts.append(inner @ dense["down_proj"][expert].T * weights[token, pick])
        outputs.append(torch.stack(parts).sum(dim=0))
    torch.autograd.backward((torch.stack(outputs) * factor).sum())
    for ours, wanted in zip(got, (hidden.grad, weights.grad), strict=True):
        assert ours is not None
        assert wanted is not None
        assert torch.allclose(ours, wanted, atol=1e-6)


def test_new_parameters_change_no_bit(model: HostModel) -> None:
    mask = half(model)
    plain = run_batch(model, TOKENS, mask).logits
    model.routing.adapters.add("new", make_parameters(model, 3, 0), model.device, None)
    assert torch.equal(run_batch(model, TOKENS, mask, "new").logits, plain)


def test_an_adapter_equals_a_model_with_the_changes_in_its_weights(model: HostModel, small_store: Path) -> None:
    parameters, mask = changed(model), half(model)
    got = run_batch(model, TOKENS, mask, "some").logits
    assert not torch.allclose(got, run_batch(model, TOKENS, mask).logits, atol=0.1)
    merged = load(small_store)
    with torch.no_grad():
        for name, parts in parameters.items():
            module = merged.model.get_submodule(name)
            if "lora_A" in parts:
                module.weight += parts["lora_B"] @ parts["lora_A"]
            if "delta" in parts:
                module.weight += parts["delta"]
            if "scale" in parts:
                module.weight *= 1 + parts["scale"]
        for layer in range(2):
            gain = parameters[f"model.layers.{layer}.mlp.gate"]["gain"]
            for expert in range(8):
                (slot,) = merged.cache.acquire(layer, [expert])
                merged.cache.pools[layer].rows["down_proj"][slot].mul_(1 + gain[expert])
                merged.cache.release(layer, [expert])
    assert torch.allclose(run_batch(merged, TOKENS, mask).logits, got, atol=1e-4)
    merged.close()


def test_tokens_of_one_batch_with_and_without_an_adapter_are_as_each_alone(model: HostModel) -> None:
    parameters, mask = changed(model), half(model)
    spec = model.store.manifest.model
    table = torch.from_numpy(np.stack([mask.allowed] * 12 + [np.ones_like(mask.allowed)] * 12, axis=1))
    assert table.shape == (spec.num_layers, 24, spec.num_experts)
    model.routing.begin_tokens(2, 12, table, [Part(parameters, torch.arange(12))])
    with torch.no_grad():
        both = model.model(input_ids=torch.tensor(TOKENS), use_cache=False).logits
    model.routing.abandon()
    assert torch.allclose(both[1], run_batch(model, TOKENS).logits[1], atol=1e-5)
    assert torch.allclose(both[0], run_batch(model, TOKENS, mask, "some").logits[0], atol=1e-5)


def test_demand_is_that_of_the_checkpoints_own_router(model: HostModel) -> None:
    parameters, mask = changed(model), half(model)
    first = {name: parts for name, parts in parameters.items() if name == "model.layers.0.mlp.gate"}
    model.routing.adapters.add("first", first, model.device, None)
    record = run_batch(model, TOKENS, mask, "first").record
    assert record.demand_index is not None
    assert np.array_equal(record.demand_index[0], run_batch(model, TOKENS).record.served_index[0])
    assert not np.array_equal(record.served_index[0], run_batch(model, TOKENS, mask).record.served_index[0])
