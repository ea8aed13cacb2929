"""The step's kernels over experts in 4 and 8 bits, in Triton's interpreter, against transformers in float64."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from transformers import Qwen3MoeForCausalLM

from server.model.device.capture.modules import moe_blocks
from server.model.device.step import step as device_step
from server.model.device.step.prefill import ExpertStream
from tests.expert_store.test_rows import ENCODINGS
from tests.server.model.device.captured import HALF, Reference, build, distance, pack_experts, qwen3_moe, run

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 6, 2, 64, 64


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    return qwen3_moe(num_experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, intermediate=INTERMEDIATE)


QUICK = ("int4", "fp8 in blocks", "nvfp4, modelopt")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in ENCODINGS]


@pytest.fixture(params=[8, 0], ids=["by rows", "by tensor cores"])
def products(monkeypatch, request):
    """The products of servers of a few rows, and of those of many."""
    monkeypatch.setattr(device_step, "MANY_ROWS", request.param)


@pytest.mark.parametrize("name", EVERY)
def test_step_over_packed_experts_agrees_with_float64(model, name, products):
    encodings = (ENCODINGS[name], ENCODINGS[name])
    spans = pack_experts(model, encodings)
    tokens = torch.randint(0, 96, (2, 1), generator=torch.Generator().manual_seed(1))
    step = build(model, torch.float32, batch=1, slots=TOP_K, packed=(encodings, spans))
    got, _ = run(step, tokens, [1])
    assert distance(got, Reference(model).logits(tokens)) < 1e-5
    step.pages.check_integrity(contents=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_prompts_products_over_packed_experts_agree_with_float64(model, name):
    encodings = (ENCODINGS[name], ENCODINGS[name])
    spans = pack_experts(model, encodings)
    step = build(model, torch.float32, batch=1, slots=TOP_K, packed=(encodings, spans))
    stream = ExpertStream(step.pages, step.shape)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(5)])
    weights = torch.rand(5, TOP_K, generator=generator)
    stream.begin(5, np.ones((LAYERS, EXPERTS), dtype=np.bool_))
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    wanted = moe_blocks(exact)[1][1].experts(hidden.double(), index, weights.double()).detach()
    device = step.pages.device
    got = stream.forward(1, hidden.to(device), index.to(device), weights.to(device))
    assert distance(got.cpu().double(), wanted) < 1e-5


def test_bits_over_packed_experts_depend_neither_on_residency_nor_on_the_batch(model, products):
    encodings = (ENCODINGS["int4"], ENCODINGS["fp8 in blocks"])
    spans = pack_experts(model, encodings)
    tokens = torch.randint(0, 96, (1, 2), generator=torch.Generator().manual_seed(3))
    together = build(model, HALF, batch=2, slots=TOP_K, packed=(encodings, spans))
    got, _ = run(together, tokens, [2, 0])
    for at in range(2):
        alone = build(model, HALF, batch=1, slots=(EXPERTS, TOP_K)[at], packed=(encodings, spans))
        assert torch.equal(run(alone, tokens[:, at : at + 1], [0])[0][:, 0], got[:, at])
