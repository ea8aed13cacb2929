"""Every family that the captured step takes, in Triton's interpreter, against transformers in float64."""

from __future__ import annotations

import os
from itertools import product

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from server.model.kv_memory import kv_token_bytes
from tests.server.model.device.captured import Reference, build, distance, run
from tests.server.model.device.families import ALONE_TOO, BY_BATCH, CAPTURED, everyday, model_of

NUM_STEPS = 4
MANY_PARTS = (
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "qwen3_next",
    "qwen3_5_moe_text",
    "lfm2_moe",
    "granitemoehybrid",
)


@pytest.mark.parametrize(
    ("name", "batch"),
    [*everyday(CAPTURED, 2), *(pytest.param(name, 1, marks=pytest.mark.exhaustive) for name in ALONE_TOO)],
)
def test_a_captured_family_agrees_with_float64_and_under_a_mask_and_a_temperature(
    name: str, batch: int, request: pytest.FixtureRequest
) -> None:
    model = model_of(name)
    if CAPTURED[name].is_whole:
        request.node.user_properties.append(("captured", model.config.get_text_config().model_type))
    step = build(model, torch.float32, batch=batch, slots=4, masked=True)
    for key, value in CAPTURED[name].seen.items():
        assert getattr(step.shape, key) == value
    assert step.shape.kv_token_bytes == kv_token_bytes(model.config.get_text_config(), 4)
    layers, experts = step.shape.num_moe_layers, step.shape.num_experts
    hidden = {(layer, expert) for layer in range(layers) for expert in (1, 4 + layer, 6)}
    tokens = torch.randint(3, 90, (NUM_STEPS, batch), generator=torch.Generator().manual_seed(batch))
    for layer, expert in hidden:
        step.state.masks[3, layer, expert] = 0
    temperature = 1.7 if CAPTURED[name].takes_temperature else 1.0
    step.state.temperatures[3] = temperature
    got, picks = run(step, tokens, [3, 4][:batch])
    wanted = Reference(model, hidden=hidden, temperature=temperature).logits(tokens[:, :1])
    assert distance(got[:, :1], wanted) < 2e-5
    if batch > 1:
        assert distance(got[:, 1:], Reference(model).logits(tokens[:, 1:])) < 2e-5
    served = {(layer, int(expert)) for layer in range(layers) for expert in picks[:, layer, 0].unique()}
    assert not served & hidden
    assert max(expert for _, expert in served) < experts
    step.pages.check_integrity(contents=True)


@pytest.mark.parametrize(
    ("name", "batch", "slots"),
    [
        ("gpt_oss", 1, 3),
        *(
            pytest.param(*more, marks=pytest.mark.exhaustive)
            for more in (
                *product(MANY_PARTS, (1, 2, 7), (3, 4, 8)),
                *((name, *sizes) for name, sizes in product(BY_BATCH, ((1, 3), (2, 8), (7, 4)))),
            )
            if more != ("gpt_oss", 1, 3)
        ),
    ],
)
def test_a_family_agrees_with_float64_at_other_batches_and_slot_counts(name: str, batch: int, slots: int) -> None:
    model = model_of(name)
    step = build(model, torch.float32, batch=batch, slots=slots)
    tokens = torch.randint(3, 90, (NUM_STEPS, batch), generator=torch.Generator().manual_seed(batch))
    got, _ = run(step, tokens, list(range(batch)))
    assert distance(got, Reference(model).logits(tokens)) < 2e-5
    step.pages.check_integrity(contents=True)


def test_fewer_available_than_the_kept_groups_hold_takes_them_from_the_others() -> None:
    model = model_of("glm4_moe in groups")
    step = build(model, torch.float32, batch=1, masked=True)
    left = {0, 5, 7}  # of four groups of two experts, two of which are kept
    hidden = {(layer, expert) for layer in range(1) for expert in range(8) if expert not in left}
    for layer, expert in hidden:
        step.state.masks[0, layer, expert] = 0
    tokens = torch.tensor([[7], [8], [9]])
    got, picks = run(step, tokens, [0])
    assert set(picks.flatten().tolist()) == left
    assert distance(got, Reference(model, hidden=hidden).logits(tokens)) < 2e-5


def test_residents_are_preferred_by_scores_too() -> None:
    """With a large enough bias a sigmoid router takes what is resident, as a softmax one does, weighed without it."""
    model = model_of("minimax_m2")
    step = build(model, torch.float32, batch=1, slots=4, masked=True, resident_bias=50.0)
    _, picks = run(step, torch.tensor([[7], [8]]), [0])
    assert picks.max() < 4
    assert step.log_weights.sum(dim=-1).flatten().tolist() == pytest.approx([1.0] * 2)
    assert (step.log_demand >= 4).any()
    assert step.log_mass.sum(dim=-1).flatten().tolist() == pytest.approx([1.0] * 2)
    assert step.pages.stats[:, 1].sum() == 0
