"""The step over a trunk in 8 bits, in Triton's interpreter, against transformers in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from server.model.device.capture.pack import attention_and_head, pack_trunk
from server.model.device.step import step as device_step
from server.model.device.step.weights import ScaledMatrix
from tests.server.model.device.captured import DEVICE, HALF, Reference, build, distance, qwen3_moe, run

HIDDEN = 128


def in_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """E4M3 codes and a scale for each group of columns of each row."""
    groups = weight.float().view(len(weight), -1, group)
    scales = groups.abs().amax(dim=2) / 448
    return (groups / scales[..., None]).flatten(1).to(torch.float8_e4m3fn), scales


def encode(model: Any, group: int | None) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """Codes of attention and head in groups, or by row; the model gets their values."""
    found = {}
    for linear in attention_and_head(model):
        codes, scales = in_groups(linear.weight.data, group or linear.in_features)
        linear.weight.data = (codes.float().view(*scales.shape, -1) * scales[..., None]).flatten(1)
        found[linear] = codes, scales
    return found


ROWS, CORES = 8, 0


@pytest.mark.parametrize(
    ("many_rows", "group"),
    [
        (ROWS, 32),
        (CORES, None),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((ROWS, None), (CORES, 32))),
    ],
)
def test_step_over_a_trunk_in_8_bits_agrees_with_float64(
    monkeypatch: pytest.MonkeyPatch, many_rows: int, group: int | None
) -> None:
    monkeypatch.setattr(device_step, "MANY_ROWS", many_rows)
    model = qwen3_moe(num_experts=6, top_k=2, hidden=HIDDEN, intermediate=32)
    codes = encode(model, group)
    tokens = torch.randint(0, 96, (2, 2), generator=torch.Generator().manual_seed(1))
    step = build(model, torch.float32, batch=2)
    step.weights = pack_trunk(model.to(DEVICE), step.shape, codes)
    assert isinstance(step.weights.head, ScaledMatrix)
    assert isinstance(step.weights.layers[0].qkv, ScaledMatrix)
    got, _ = run(step, tokens, [1, 0])
    assert distance(got, Reference(model.cpu()).logits(tokens)) < 2e-6


def test_bits_over_a_trunk_in_8_bits_do_not_depend_on_the_batch() -> None:
    model = qwen3_moe(num_experts=6, top_k=2, hidden=HIDDEN, intermediate=32)
    codes = encode(model, 32)
    tokens = torch.randint(0, 96, (1, 2), generator=torch.Generator().manual_seed(3))
    steps = [build(model, HALF, batch=batch) for batch in (2, 1)]
    for step in steps:
        step.weights = pack_trunk(model.to(HALF).to(DEVICE), step.shape, codes)
    together, alone = run(steps[0], tokens, [2, 0])[0], run(steps[1], tokens[:, 1:], [0])[0]
    assert torch.equal(together[:, 1], alone[:, 0])


def test_layers_are_multiplied_in_the_models_dtype_where_kernels_do_not_take_their_groups() -> None:
    model = qwen3_moe(num_experts=6, top_k=2, hidden=HIDDEN, intermediate=32)
    step = build(model, torch.float32, batch=1)
    codes = encode(model, 8)
    weights = pack_trunk(model, step.shape, codes)
    assert weights.head is model.lm_head.weight
    assert isinstance(weights.layers[0].qkv, Tensor)
