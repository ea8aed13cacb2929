"""Adapters in captured steps: rows as on the host-driven path, and rows without one with the bits that they have."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from expert_store.adapter import Adapter, Changes, store_adapters
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.capture import NotCapturableError
from server.model.device.capture.adapters import MOST_RANK, MOST_WIDTH, adapted_trunk, check_adapters
from server.model.device.capture.modules import DeltaNet, layers_of, moe_blocks
from server.model.device.capture.pack import decode_shape, pack_trunk
from server.model.device.running.assembly import load_device_runner
from server.model.device.step import graphs
from server.model.device.step.weights import LowRank
from server.model.host.assembly import load_model
from server.model.host.sequence_runner import make_runner
from server.model.runner import RowStep, Runner, RunnerOptions
from server.model.seam.routing import StepRouting
from server.model.seam.trunk import trunk_skeleton
from tests.server.adapters import HALF, decoded, with_adapters
from tests.server.model.device.captured import TUNING as CAPTURED_TUNING
from tests.server.model.device.captured import build, distance, run
from tests.server.model.device.families import model_of
from tests.server.model.device.small import DEVICE, TUNING
from tests.server.model.device.test_runner_families import store_of

OTHERS = [
    "glm4_moe in groups", "minimax_m2", "mixtral in a window", "olmoe", "dots1", "hy_v3", "solar_open", "gpt_oss",
    "gpt_oss, mxfp4", "flint", "exaone_moe", "mellum", "ernie4_5_moe", "granitemoeshared", "minimax_m3_vl_text",
    "qwen3_vl_moe", "qwen3_next in full attention", "mimo_v2_flash", "flex_olmo",
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k25", "qwen3_5_moe_text", "kimi_linear", "bailing_hybrid",
    "hunyuan_v1_moe",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapters(small_store, tmp_path_factory.mktemp("adapted") / "store", HALF, shared_width=5)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    def make(path: Path, tuning: Any = TUNING, **options: Any) -> Runner:
        if DEVICE.type == "cpu":
            monkeypatch.setattr(graphs, "Tuning", lambda: tuning)
        common = {"device": DEVICE, "dtype": torch.float32, "num_slots": 4, "max_rows": 4, "max_tokens": 64}
        return load_device_runner(Store.open(path), RunnerOptions(**common | options), proof=False)

    return make


def host(path: Path) -> Runner:
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=4)
    return make_runner(load_model(Store.open(path), options), max_rows=4, max_tokens=64)


@pytest.mark.parametrize(
    "many_rows",
    [
        pytest.param(8, id="products by rows"),
        pytest.param(0, id="products by tensor cores", marks=pytest.mark.exhaustive),
    ],
)
def test_rows_of_one_batch_have_their_adapters_or_none_and_keep_their_bits(
    adapted: Path, small_store: Path, device: Callable[..., Runner], many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.device.step.step.MANY_ROWS", many_rows)
    ours, theirs, plain = device(adapted), host(adapted), device(small_store)
    rows = range(4)
    together, wanted = decoded(ours, list(rows), 1), decoded(theirs, list(rows), 1)
    for at in rows:
        assert torch.allclose(torch.stack(together[at]), torch.stack(wanted[at]), rtol=1e-4, atol=1e-4), at
    for at, without in ((0, plain), (2, plain), (1, ours)):  # beside rows with an adapter, and alone
        (alone,) = decoded(without, [at], 1)
        assert all(torch.equal(one, other) for one, other in zip(alone, together[at], strict=True)), at
    different = [(together[1][-1] - together[2][-1]).abs().max(), (together[1][-1] - together[3][-1]).abs().max()]
    assert min(different) > 1e-3
    for runner in (ours, theirs, plain):
        runner.close()


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_moe partly in windows",  # with a dense layer, and a shared expert that has a switch
        "qwen3_next",  # with a delta net, whose prompts are read by our own layer
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS),
    ],
)
def test_each_familys_parts_are_changed_as_on_the_host_driven_path(
    name: str, tmp_path: Path, repository: Path, device: Callable[..., Runner]
) -> None:
    path = store_of(name, tmp_path, repository)
    with Store.open(path) as store:
        num_layers, num_experts = store.available.shape
    mask = ExpertMask.same_in_every_layer([e for e in range(num_experts) if e % 3], num_layers, num_experts)
    adapted = with_adapters(path, tmp_path / "adapted", mask, shared_width=5)
    kinds = [(mask, "pools"), (mask, None)]
    outputs = []
    for runner in (device(adapted, CAPTURED_TUNING), host(adapted)):
        rows = [runner.allocate() for _ in kinds]
        for row, (own, adapter) in zip(rows, kinds, strict=True):
            runner.prefill(row, [40, 41, 42], mask=own, adapter=adapter)
        steps = [
            RowStep(row, 50, mask=own, adapter=adapter, temperature=0.9)
            for row, (own, adapter) in zip(rows, kinds, strict=True)
        ]
        outputs.append(runner.decode(steps))
        runner.close()
    got, wanted = outputs
    assert torch.allclose(got.logits, wanted.logits, rtol=1e-3, atol=1e-4)
    assert (np.sort(got.record.served_index) == np.sort(wanted.record.served_index)).all()
    assert got.record.missed_mass == pytest.approx(wanted.record.missed_mass, abs=1e-5)
    assert got.share.missed == pytest.approx(wanted.share.missed, abs=1e-5)
    assert got.share.demanded == pytest.approx(wanted.share.demanded, abs=1e-5)
    assert not torch.allclose(got.logits[0], got.logits[1], atol=1e-2)


def test_changes_that_are_not_carried_are_named_and_the_host_driven_path_is_offered(
    adapted: Path,
) -> None:
    with Store.open(adapted) as store:
        (planned, *_) = store_adapters(adapted, store.manifest).values()
        skeleton = trunk_skeleton(store.trunk_path)
    check_adapters(skeleton, {"planned": planned})
    wide = {"lora_A": torch.zeros(MOST_RANK + 1, 64), "lora_B": torch.zeros(64, MOST_RANK + 1)}
    for changes, reason in (
        ({"lm_head": {"delta": torch.zeros(2, 2)}}, r"adapter odd changes lm_head \(delta\).*--no-adapters"),
        ({"model.norm": {"gain": torch.zeros(2)}}, r"model\.norm \(gain\)"),
        ({"model.layers.1.mlp.experts": {"gate": torch.zeros(MOST_WIDTH + 1, 64)}}, r"1025 columns to .*mlp\.experts"),
        ({"model.layers.1.self_attn.o_proj": wide}, rf"o_proj by rank {MOST_RANK + 1}.*--rank"),
    ):
        with pytest.raises(NotCapturableError, match=reason):
            check_adapters(skeleton, {"planned": planned, "odd": replace(planned, changes=changes)})


def random_changes(model: Any, seed: int, rank: int = 3) -> Changes:
    """Changes of every module that an adapter may have of a model."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return 0.1 * torch.randn(size, generator=generator)

    blocks = [(block, router) for _, block, router in moe_blocks(model)]
    beside = {router for _, router in blocks} | {model.lm_head}
    changes: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        if module in beside or name.endswith("kv_b_proj"):
            continue
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            small = rows <= rank
            parts = (
                {"delta": noise(rows, columns)}
                if small
                else {"lora_A": noise(rank, columns), "lora_B": noise(rows, rank)}
            )
            changes[name] = parts
        elif type(module).__name__.endswith("Norm"):
            changes[name] = {"scale": noise(len(module.weight))}
    names = {module: name for name, module in model.named_modules()}
    for block, router in blocks:
        experts, hidden = router.weight.shape
        changes[names[router]] = {"delta": noise(experts, hidden), "gain": noise(experts)}
        changes[names[block.experts]] = {"gate": noise(5, hidden), "up": noise(5, hidden), "down": noise(hidden, 5)}
    return changes


def in_float64(model: Any, changes: Changes | None, mask: ExpertMask, tokens: Tensor) -> Tensor:
    """Logits [T, V] of tokens [T] of a masked row with an adapter, or without, by transformers' forward with hooks."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    routing = StepRouting(model.config.get_text_config().model_type, len(mask.allowed), torch.device("cpu"), mask)
    for layer, (_, _, router) in enumerate(moe_blocks(model)):
        routing.install(layer, router)
    if changes is not None:
        routing.install_adapters(model, changes)
        routing.adapters.add("own", changes, torch.device("cpu"), torch.float64)
    routing.begin(1, len(tokens), None, None, [None if changes is None else "own"])
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    routing.finish()
    return logits


@pytest.mark.parametrize(
    ("name", "many_rows"),
    [
        ("deepseek_v3", 8),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (
                ("deepseek_v3", 0),
                ("deepseek_v2", 8),
                ("deepseek_v3 in halves", 8),
                ("glm4_moe_lite", 8),
                ("glm4_moe_lite", 0),
                ("qwen3_next", 8),
                ("qwen3_next", 0),
                ("qwen3_5_moe_text", 8),
                ("kimi_linear", 8),
                ("kimi_linear", 0),
                ("bailing_hybrid", 8),
            )
        ),
    ],
)
def test_latents_and_delta_nets_are_changed_as_in_float64_and_other_rows_keep_their_bits(
    name: str, many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.device.step.step.MANY_ROWS", many_rows)
    model = model_of(name)
    adapters = {at: Adapter("", 2, 8, random_changes(model, seed)) for seed, at in enumerate(("one", "two"))}
    entries, rows = (2, 0), [2, 4]
    step = build(model, torch.float32, batch=2, slots=4, adapters=adapters)
    plain = build(model, torch.float32, batch=2, slots=4, masked=True)
    hidden = torch.tensor([1, 4, 6])
    for one in (step, plain):
        one.state.masks[2:, :, hidden] = 0
    step.adapters.copy_(torch.tensor(entries, dtype=torch.int32))
    tokens = torch.randint(3, 90, (2, 2), generator=torch.Generator().manual_seed(5))
    got, _ = run(step, tokens, rows)
    mask = ExpertMask.of(step.state.masks[2].bool().cpu().numpy())
    for at, entry in enumerate(entries):
        changes = list(adapters.values())[entry - 1].changes if entry else None
        assert distance(got[:, at], in_float64(model, changes, mask, tokens[:, at])) < 2e-5, entry
        assert entry == 0 or distance(got[:, at], in_float64(model, None, mask, tokens[:, at])) > 1e-2
    assert torch.equal(got[:, 1], run(plain, tokens, rows)[0][:, 1])
    step.pages.check_integrity(contents=True)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next", "kimi_linear", "glm4_moe in groups"])
def test_matrices_of_adapters_lie_in_memory_once(name: str) -> None:
    """The modules that prompts run through read views of what the step reads, of the same values."""
    model = model_of(name)
    adapters = {at: Adapter("", 2, 8, random_changes(model, seed)) for seed, at in enumerate(("one", "two"))}
    shape = decode_shape(model, intermediate=16, max_rows=2, max_tokens=64)
    found = adapted_trunk(model, shape, pack_trunk(model, shape), adapters)
    held = set()
    for layer in found.weights.layers:
        assert layer.changes is not None
        for change in vars(layer.changes).values():
            parts = (change.a, change.b) if isinstance(change, LowRank) else (change,)
            held |= {part.untyped_storage().data_ptr() for part in parts if part is not None}
    own = [
        (module, part)
        for changes in found.by_module
        for module, parts in changes.items()
        for part, tensor in parts.items()
        if tensor.ndim == 2 and len(tensor) > 1 and tensor.untyped_storage().data_ptr() not in held
    ]
    names = {module: at for at, module in model.named_modules()}
    nets = tuple(names[each.attention.module] for each in layers_of(model) if isinstance(each.attention, DeltaNet))
    split = "q_proj" if name == "qwen3_next" else "-"  # whose rows are apart in the step's product
    assert [part for module, part in own if split not in module] == []
    for one, changes in zip(adapters.values(), found.by_module, strict=True):
        for module, parts in one.changes.items():
            if module in changes:
                assert torch.allclose(merged(changes[module]), merged(parts), atol=1e-6), module
            else:
                assert module.startswith(nets), module


def merged(parts: Mapping[str, Tensor]) -> Tensor:
    """A change as one tensor."""
    return (
        parts["lora_B"] @ parts["lora_A"] if "lora_A" in parts else torch.cat([one.flatten() for one in parts.values()])
    )
