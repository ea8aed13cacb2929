"""A step's latent attention: rows of every length agree with float64, and blocks and other rows change no bit."""

from __future__ import annotations

import functools
import os

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

LENGTHS = [0, 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS - 1, 33, MAX_TOKENS - 1]
ROWS = list(range(len(LENGTHS)))


@pytest.fixture(scope="module")
def models():
    return functools.cache(model_of)


def latents_and_keys(step: DecodeStep, row: int) -> Tensor:
    """Random ones of a row of that number, [max_tokens, rank + rotary]."""
    size = (MAX_TOKENS, step.shape.attention(1).token_elements)
    return torch.randn(size, generator=torch.Generator().manual_seed(row)).to(step.state.memory[1])


def fill(step: DecodeStep) -> None:
    """Writes all rows, each as a prompt of two chunks does."""
    step.state.memory[1].fill_(torch.nan)
    sizes = [dim for _, dim in step.shape.attention(1).vectors]
    for row, length in enumerate(LENGTHS):
        latents, keys = latents_and_keys(step, row)[None, None, :length].split(sizes, dim=-1)
        half = length // 2
        PrefillRow(step.state, row, 0, half).update(latents[..., :half, :], keys[..., :half, :], 1)
        rest = PrefillRow(step.state, row, half, length).update(latents[..., half:, :], keys[..., half:, :], 1)
        assert torch.equal(torch.cat(rest, dim=-1), torch.cat([latents, keys], dim=-1))
        step.state.lengths[row] = length


def in_float64(step: DecodeStep, row: int) -> Tensor:
    """The same for one row with its keys and values expanded, from the entry of `step.qkv` that is its."""
    shape, weights, length = step.shape, step.weights.layers[1], LENGTHS[row]
    kind = shape.attention(1)
    new = step.qkv[step.rows.tolist().index(row)].double()
    query, latent, key = new.split([kind.queries, kind.rank, kind.head_dim])
    if kind.query_rank:
        query = weights.latent.queries.double() @ normalised(query, weights.q_norm, kind.eps)
    query = query.view(shape.num_heads, -1)

    def turned(vectors: Tensor) -> Tensor:
        cos, sin = weights.cos[length].double(), weights.sin[length].double()
        apart = kind.pairs == "halves"
        low, high = vectors.chunk(2, dim=-1) if apart else (vectors[..., 0::2], vectors[..., 1::2])
        pairs = low * cos - high * sin, high * cos + low * sin
        return torch.stack(pairs, dim=-1).flatten(-2) if kind.pairs == "neighbours" else torch.cat(pairs, dim=-1)

    kept = latents_and_keys(step, row)[:length].double()
    kept = torch.cat([kept, torch.cat([normalised(latent, weights.k_norm, kind.eps), turned(key)])[None]])
    expand = weights.latent.expand.double().view(shape.num_heads, -1, kind.rank)
    keys, values = (kept[:, : kind.rank] @ expand.mT).split([kind.nope, kind.value_dim], dim=-1)
    scores = (keys @ query[:, : kind.nope, None])[..., 0] + turned(query[:, kind.nope :]) @ kept[:, kind.rank :].T
    return ((scores * shape.scaling).softmax(dim=-1)[:, None] @ values)[:, 0].flatten()


def normalised(vector: Tensor, norm: Tensor, eps: float) -> Tensor:
    return norm.double() * vector / (vector.square().mean() + eps).sqrt()


NAMES = [
    "deepseek_v3",
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("deepseek_v2", "deepseek_v3 in halves")),
]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_length_agree_with_float64(models, name):
    step = build(models(name), torch.float32, batch=len(ROWS))
    fill(step)
    for row, got in zip(ROWS[::-1], attended(step, ROWS[::-1]), strict=True):
        assert torch.allclose(got.double(), in_float64(step, row), rtol=1e-5, atol=1e-6), LENGTHS[row]
    for row in ROWS:
        block, entry = step.state.table[row, LENGTHS[row] // BLOCK_TOKENS], LENGTHS[row] % BLOCK_TOKENS
        assert not any(held[block, :, entry].isnan().any() for held in step.state.blocks(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "block_tokens", [2 * BLOCK_TOKENS, pytest.param(BLOCK_TOKENS // 2, marks=pytest.mark.exhaustive)]
)
def test_bits_depend_neither_on_blocks_nor_on_the_batch(models, name, block_tokens):
    """Alone in blocks of the whole row; then together, in other blocks in any order."""
    alone = build(models(name), HALF, batch=1, block_tokens=MAX_TOKENS)
    fill(alone)
    wanted = torch.cat([attended(alone, [row]) for row in ROWS])
    step = build(models(name), HALF, batch=len(ROWS), block_tokens=block_tokens)
    table = step.state.table
    table.copy_(torch.randperm(table.numel(), generator=torch.Generator().manual_seed(3)).view(table.shape))
    fill(step)
    assert torch.equal(attended(step, ROWS), wanted)
