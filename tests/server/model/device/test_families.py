"""Every family that the captured step takes, in Triton's interpreter, against transformers in float64; the others are
refused with their reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from server.model.device.capture.pack import decode_shape, moe_blocks
from server.model.device.capture.refusal import NotCapturableError
from tests.families.checkpoints import FAMILIES, is_installed, random_model
from tests.server.model.device.captured import Reference, build, distance, run

NUM_STEPS = 4
SIZES = {
    "hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": None,
}  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """A family's config on top of the common sizes, and what of it the step must have seen."""

    overrides: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    family: str = ""


_DENSE_FIRST = {"dense_layers": frozenset({0})}
CAPTURED = {
    "mixtral": Captured({"head_dim": 32}, {"qk_norm": "none"}),
    "mixtral in a window": Captured({"head_dim": 32, "sliding_window": 3}, {"windows": (3, 3)}, "mixtral"),
    "qwen3_moe": Captured({"decoder_sparse_step": 2}, {"qk_norm": "head", "dense_layers": frozenset({0})}),
    "olmoe": Captured({"hidden_size": 128}, {"qk_norm": "row"}),
    "qwen2_moe": Captured({"hidden_size": 128, "mlp_only_layers": [1]}, {"shared_intermediate": 16, "rotary": 32}),
    "qwen2_moe partly in windows": Captured(
        {"hidden_size": 128, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"windows": (3, 0)}, "qwen2_moe",
    ),
    "glm4_moe": Captured({"use_qk_norm": True, "n_group": 1}, {"rotary": 16, "qk_norm": "head", **_DENSE_FIRST}),
    "glm4_moe in groups": Captured({"n_group": 4, "topk_group": 2, "norm_topk_prob": False}, {}, "glm4_moe"),
    "minimax_m2": Captured(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"qk_norm": "row", "rotary": 16},
    ),
    "dots1": Captured({}, {"qk_norm": "head", **_DENSE_FIRST}),
    "hy_v3": Captured({}, {"qk_norm": "head", **_DENSE_FIRST}),
    "solar_open": Captured({}, {"shared_intermediate": 16}),
}  # fmt: skip
ALONE_TOO = ["olmoe", "qwen2_moe", "glm4_moe in groups", "minimax_m2"]


def model_of(name: str) -> Any:
    wanted = CAPTURED[name]
    family = wanted.family or name
    if not is_installed(family):
        pytest.skip(f"this transformers has no {family}")
    overrides = {**SIZES, **wanted.overrides}
    if family in ("olmoe", "qwen2_moe"):  # their heads share the hidden size
        overrides.pop("head_dim")
    return random_model(family, **overrides)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [(name, 2) for name in CAPTURED] + [(name, 1) for name in ALONE_TOO])
def test_a_captured_family_agrees_with_float64_and_under_a_mask_and_a_temperature(name: str, batch: int) -> None:
    model = model_of(name)
    step = build(model, torch.float32, batch=batch, slots=4, masked=True)
    for key, value in CAPTURED[name].seen.items():
        assert getattr(step.shape, key) == value
    layers, experts = step.shape.num_moe_layers, step.shape.num_experts
    hidden = {(layer, expert) for layer in range(layers) for expert in (1, 4 + layer, 6)}
    tokens = torch.randint(3, 90, (NUM_STEPS, batch), generator=torch.Generator().manual_seed(batch))
    for layer, expert in hidden:
        step.state.masks[3, layer, expert] = 0
    step.state.temperatures[3] = 1.7
    got, picks = run(step, tokens, [3, 4][:batch])
    wanted = Reference(model, hidden=hidden, temperature=1.7).logits(tokens[:, :1])
    assert distance(got[:, :1], wanted) < 2e-5
    if batch > 1:
        assert distance(got[:, 1:], Reference(model).logits(tokens[:, 1:])) < 2e-5
    served = {(layer, int(expert)) for layer in range(layers) for expert in picks[:, layer, 0].unique()}
    assert not served & hidden
    assert max(expert for _, expert in served) < experts
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


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.causal and is_installed(name)])
def test_every_other_family_is_refused_with_a_reason(family: str) -> None:
    """Families with attention or routers of another kind, and each one whose forward names what the step lacks."""
    captured = {wanted.family or name for name, wanted in CAPTURED.items()}
    try:
        model = random_model(family)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"no model of these sizes: {error}")
    if family in captured:
        assert moe_blocks(model)
        return
    with pytest.raises(NotCapturableError, match=r"\w{3}"):
        decode_shape(model, intermediate=24, max_rows=1, max_tokens=32)
