"""The decode step's kernels, in Triton's interpreter, against transformers in float64."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from transformers import Qwen3MoeForCausalLM

from tests.server.model.device.captured import HALF, Reference, build, distance, qwen3_moe, run

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 12, 3, 64, 32


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    return qwen3_moe(num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, intermediate=INTERMEDIATE)


@pytest.mark.parametrize(
    ("batch", "slots"),
    [(1, TOP_K), (2, 6), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((1, EXPERTS), (5, TOP_K)))],
)
def test_step_agrees_with_float64_at_every_slot_count(model, batch, slots):
    tokens = torch.randint(0, 96, (4, batch), generator=torch.Generator().manual_seed(batch))
    step = build(model, torch.float32, batch=batch, slots=slots)
    got, _ = run(step, tokens, [(2 * b + 1) % 6 for b in range(batch)] if batch < 4 else [4, 0, 3, 1, 5])
    assert distance(got, Reference(model).logits(tokens)) < 1e-5
    step.pages.check_integrity(contents=True)


def test_results_do_not_depend_on_what_was_resident(model):
    tokens = torch.randint(0, 96, (3, 1), generator=torch.Generator().manual_seed(7))
    results = [run(build(model, HALF, batch=1, slots=slots), tokens, [0])[0] for slots in (TOP_K, EXPERTS)]
    assert torch.equal(results[0], results[1])


def test_products_by_tensor_cores_agree_with_float64(model):
    tokens = torch.randint(0, 96, (3, 2), generator=torch.Generator().manual_seed(5))
    got, _ = run(build(model, torch.float32, batch=2, slots=6, batch_invariant=False), tokens, [1, 0])
    assert distance(got, Reference(model).logits(tokens)) < 1e-5


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_half_precision_step_agrees_with_float64_within_its_rounding(model, batch):
    """Where two experts nearly tie, half precision may take the other one, as transformers' own does; so the float64
    model is given the step's picks, and those must be best but for rounding."""
    tokens = torch.randint(0, 96, (4, batch), generator=torch.Generator().manual_seed(3))
    got, picks = run(build(model, HALF, batch=batch, slots=6), tokens, list(range(batch)))
    exact = Reference(model, HALF, picks=picks)
    assert distance(got, exact.logits(tokens)) < 4 * torch.finfo(HALF).eps
    assert exact.shortfall < 16 * torch.finfo(HALF).eps


def test_masked_rows_equal_a_pruned_model_and_others_are_untouched(model):
    tokens = torch.randint(0, 96, (4, 2), generator=torch.Generator().manual_seed(11))
    hidden = {(0, 1), (0, 5), (0, 7), (1, 0), (1, 2), (1, 11)}
    step = build(model, torch.float32, batch=2, slots=5, masked=True)
    for layer, expert in hidden:
        step.state.masks[3, layer, expert] = 0
    got, _ = run(step, tokens, [3, 2])
    assert distance(got[:, 0], Reference(model, hidden=hidden).logits(tokens[:, :1])[:, 0]) < 1e-5
    assert distance(got[:, 1], Reference(model).logits(tokens[:, 1:])[:, 0]) < 1e-5
    served = {(layer, int(e)) for layer in range(LAYERS) for e in step.log_ids[layer, 0]}
    assert not served & hidden


def test_fewer_available_than_top_k_leaves_sentinels_and_no_phantom_fetch(model):
    step = build(model, torch.float32, batch=1, slots=TOP_K, masked=True)
    step.state.masks[0] = 0
    step.state.masks[0, :, 10] = 1
    run(step, torch.tensor([[5], [6]]), [0])
    assert step.log_ids[:, 0].tolist() == [[10, EXPERTS, EXPERTS]] * LAYERS
    assert step.log_weights[:, 0].tolist() == [[1.0, 0.0, 0.0]] * LAYERS
    assert step.pages.stats[:, 1].tolist() == [1, 1]


def test_entries_without_a_row_change_nothing(model):
    tokens = torch.randint(0, 96, (4, 1), generator=torch.Generator().manual_seed(5))
    alone = build(model, torch.float32, batch=2, slots=6)
    got, _ = run(alone, tokens.expand(4, 2), [-1, 4])
    assert distance(got[:, 1:], Reference(model).logits(tokens)) < 1e-5
    assert alone.state.lengths.tolist() == [0, 0, 0, 0, 4, 0, 0, 0]
    assert alone.pages.stats[0, :2].sum() == 4 * TOP_K


@pytest.mark.exhaustive
def test_a_batch_of_64_agrees_with_float64_and_each_row_has_the_bits_of_the_row_alone(model, monkeypatch):
    monkeypatch.setattr("tests.server.model.device.captured.MAX_ROWS", 64)
    tokens = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(64))
    got, _ = run(build(model, torch.float32, batch=64, slots=6), tokens, list(range(64)))
    assert distance(got, Reference(model).logits(tokens)) < 1e-5
    for row in (0, 31, 63):
        alone, _ = run(build(model, torch.float32, batch=1, slots=TOP_K), tokens[:, row : row + 1], [63 - row])
        assert torch.equal(alone[:, 0], got[:, row])


@pytest.mark.parametrize(
    ("dtype", "batches"),
    [
        (HALF, (1, 2)),
        *(pytest.param(dtype, (1, 2, 3, 5, 8), marks=pytest.mark.exhaustive) for dtype in (HALF, torch.float32)),
    ],
)
@pytest.mark.parametrize(
    "many_rows",
    [
        pytest.param(8, id="products by rows"),
        pytest.param(0, id="products by tensor cores", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rows_bits_do_not_depend_on_the_batch(model, dtype, batches, many_rows, monkeypatch):
    """Alone or with others, before or after them, whatever is resident."""
    monkeypatch.setattr("server.model.device.step.step.MANY_ROWS", many_rows)
    num_steps, largest = 3, max(batches)
    tokens = torch.randint(0, 96, (num_steps, largest), generator=torch.Generator().manual_seed(13))
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for first in range(0, largest, batch):
            rows = list(range(first, min(first + batch, largest)))
            entries = rows[::-1] + [-1] * (batch - len(rows))
            step = build(model, dtype, batch=batch, slots=TOP_K + batch % 4, masked=True)
            step.state.masks[::2, :, 5] = 0
            logits, _ = run(step, tokens[:, entries], entries)
            for at, row in enumerate(rows[::-1]):
                seen.setdefault(row, []).append(logits[:, at])
    assert len(seen) == largest
    assert all(torch.equal(ones[0], other) for ones in seen.values() for other in ones[1:])
