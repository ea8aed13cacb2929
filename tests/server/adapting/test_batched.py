"""All experts of a layer in a few products give the results of the experts one by one, and their gradients."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.measuring import evaluate_kinds
from server.model.host.assembly import HostModel, load_model
from server.model.runner import RunnerOptions
from server.model.seam import batched
from server.model.seam.batched import batched_experts
from server.model.seam.experts import ExpertsLayer
from server.quality.text_loss import evaluate_text

TOKENS = torch.arange(100, 148).view(2, 24)


@pytest.fixture
def model(small_store: Path) -> Iterator[HostModel]:
    found = load_model(Store.open(small_store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    yield found
    found.close()


def run(model: HostModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits under a mask of `count` experts, and the gradient of the embedding."""
    embedding = model.model.get_input_embeddings().weight.requires_grad_(True)
    mask = ExpertMask.same_in_every_layer(list(range(count)), 2, 8)
    model.routing.begin(2, 24, [mask, mask])
    logits = model.model(input_ids=TOKENS, use_cache=False).logits
    model.routing.abandon()
    (gradient,) = torch.autograd.grad(logits.square().mean(), embedding)
    return logits.detach(), gradient


@pytest.mark.parametrize("columns", [batched.DENSE_COLUMNS, 0], ids=["dense", "grouped"])
@pytest.mark.parametrize("count", [8, 1], ids=["all", "fewer than top-k"])
def test_batched_experts_are_those_of_serving(
    model: HostModel, monkeypatch: pytest.MonkeyPatch, columns: int, count: int
) -> None:
    monkeypatch.setattr(batched, "DENSE_COLUMNS", columns)
    wanted, wanted_gradient = run(model, count)
    with batched_experts(model.model, model.cache) as is_on, monkeypatch.context() as patch:
        assert is_on
        patch.delattr(ExpertsLayer, "forward")  # the experts one by one are not asked
        got, gradient = run(model, count)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-7)
    assert torch.equal(run(model, count)[0], wanted)


def test_experts_without_a_slot_are_not_batched(small_store: Path) -> None:
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=4)
    model = load_model(Store.open(small_store), options)
    with batched_experts(model.model, model.cache) as is_on:
        assert not is_on
    model.close()


def test_kinds_measured_together_have_the_losses_that_they_have_alone(model: HostModel) -> None:
    texts = {"one": TOKENS.tolist(), "two": [[5, 9, 300, 7], list(range(200, 224))]}
    masks = {
        "one": ExpertMask.same_in_every_layer([1, 4], 2, 8),
        "two": ExpertMask.same_in_every_layer([0, 3, 6], 2, 8),
    }
    for under in (None, masks):
        found = evaluate_kinds(model, texts, under, None)
        for kind, sequences in texts.items():
            alone = evaluate_text(model, sequences, None if under is None else under[kind]).loss
            assert found[kind] == pytest.approx(alone, abs=1e-5)
