"""A step's attention reads a row through its blocks: their numbers, their size and who shares them change no bit."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from server.model.device.step.state import PrefillRow
from server.model.device.step.step import DecodeStep
from tests.server.model.device.captured import BLOCK_TOKENS, HALF, MAX_TOKENS, attended, build
from tests.server.model.device.families import model_of

LENGTHS = [0, 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS - 1, 33, 48, MAX_TOKENS - 1]
COMMON = MAX_TOKENS // 2
"""Tokens with which every row begins that is as long."""


@pytest.fixture(scope="module")
def models():
    return functools.cache(model_of)


def cases(values: tuple[int, ...], quick: tuple[str, int]) -> list[Any]:
    """Every family with every value; those but the `quick` one are exhaustive."""
    every = [(name, value) for name in ("qwen3_moe", "mixtral in a window") for value in values]
    return [pytest.param(*one, marks=() if one == quick else pytest.mark.exhaustive) for one in every]


def keys_and_values(step: DecodeStep, row: int) -> Tensor:
    """Random ones of a row of that number, [2, kv_heads, max_tokens, head_dim]; all rows begin alike."""
    size = (2, step.shape.num_kv_heads, MAX_TOKENS, step.shape.head_dim)
    common, own = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in (99, row))
    return torch.cat([common[:, :, :COMMON], own[:, :, COMMON:]], dim=2).to(step.state.memory[1])


def fill(step: DecodeStep, rows: list[int]) -> None:
    """Writes the rows, as prompts do."""
    step.state.memory[1].fill_(torch.nan)
    for row in rows:
        keys, values = keys_and_values(step, row)[:, None, :, : LENGTHS[row]]
        half = LENGTHS[row] // 2  # a chunk may begin in the middle of a block
        PrefillRow(step.state, row, 0, half).update(keys[:, :, :half], values[:, :, :half], 1)
        rest = PrefillRow(step.state, row, half, LENGTHS[row]).update(keys[:, :, half:], values[:, :, half:], 1)
        assert torch.equal(torch.cat(rest), torch.cat([keys, values]))
        step.state.lengths[row] = LENGTHS[row]


def in_float64(step: DecodeStep, row: int) -> Tensor:
    """The same for one row, from its keys and values and the entry of `step.qkv` that is its."""
    shape, weights, length = step.shape, step.weights.layers[1], LENGTHS[row]
    new = step.qkv[step.rows.tolist().index(row)].double().view(-1, shape.head_dim)
    query, key, value = new.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])

    def turned(heads: Tensor, norm: Tensor) -> Tensor:
        if shape.qk_norm == "head":
            heads = norm.double() * heads / (heads.square().mean(dim=-1, keepdim=True) + shape.eps).sqrt()
        cos, sin = (table[length].double().repeat(2) for table in (weights.cos, weights.sin))
        return heads * cos + torch.cat([-heads[:, shape.head_dim // 2 :], heads[:, : shape.head_dim // 2]], dim=1) * sin

    query, key = turned(query, weights.q_norm), turned(key, weights.k_norm)
    keys, values = keys_and_values(step, row)[:, :, :length].double()
    group = shape.num_heads // shape.num_kv_heads
    keys, values = (
        torch.cat([held, one[:, None]], dim=1).repeat_interleave(group, dim=0)
        for held, one in ((keys, key), (values, value))
    )
    scores = (keys @ query[:, :, None])[:, :, 0] * (shape.scaling or shape.head_dim**-0.5)
    window = shape.windows[1] if shape.windows else 0
    seen = slice(-window, None) if window else slice(None)
    return (scores[:, seen].softmax(dim=-1)[:, None] @ values[:, seen])[:, 0].flatten()


@pytest.mark.parametrize(("name", "batch"), cases((1, 2, 7), ("qwen3_moe", 7)))
def test_rows_of_every_length_agree_with_float64(models, name, batch):
    step = build(models(name), torch.float32, batch=batch)
    fill(step, list(range(len(LENGTHS))))
    for first in range(0, len(LENGTHS) - batch + 1, batch):
        rows = list(range(first, first + batch))[::-1]
        for row, got in zip(rows, attended(step, rows), strict=True):
            assert torch.allclose(got.double(), in_float64(step, row), rtol=1e-5, atol=1e-6), LENGTHS[row]


@pytest.mark.parametrize(
    ("name", "block_tokens"),
    cases((BLOCK_TOKENS // 2, 2 * BLOCK_TOKENS, MAX_TOKENS), ("mixtral in a window", BLOCK_TOKENS // 2)),
)
def test_bits_depend_neither_on_blocks_nor_on_the_batch(models, name, block_tokens):
    """Alone in blocks of the whole row; then together, in other blocks in any order, and in common ones."""
    rows = list(range(len(LENGTHS)))
    alone = build(models(name), HALF, batch=1, block_tokens=MAX_TOKENS)
    fill(alone, rows)
    wanted = torch.cat([attended(alone, [row]) for row in rows])
    step = build(models(name), HALF, batch=len(rows), block_tokens=block_tokens)
    table = step.state.table
    table.copy_(torch.randperm(table.numel(), generator=torch.Generator().manual_seed(3)).view(table.shape))
    fill(step, rows)
    assert torch.equal(attended(step, rows), wanted)
    for row in rows[:-1]:
        if LENGTHS[row] >= COMMON:
            step.state.memory[1][table[row, : COMMON // block_tokens]] = torch.nan
            table[row, : COMMON // block_tokens] = table[rows[-1], : COMMON // block_tokens]
    assert torch.equal(attended(step, rows), wanted)
