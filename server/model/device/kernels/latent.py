"""One token's latent attention (MLA): all heads read one latent and one rotated key of each cached token.

The keys' rows of the product that expands latents are absorbed into the queries, and its values' rows take the sum of
latents that attention gives, so a cached token is never expanded. `attend_latent` takes a group of heads over one split
of the row's tokens to the tensor cores, with the heads as rows of the product; `expand_values` joins the splits. Splits
depend on the row's length alone, so a row's bits depend neither on the batch nor on the numbers of its blocks. Source:
DeepSeek-V2 (2024), and Flash-Decoding (Dao et al., 2023) for the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.model.device.kernels.attention import blocks_at, pairs_of
from server.model.device.kernels.trunk import normalise


@triton.jit
def absorb(
    queries, expand, out,
    B: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, NP: tl.constexpr, ROTARY: tl.constexpr,
    VALUE: tl.constexpr, RANK: tl.constexpr, STRIDE: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, HEADS, RANK]: each head's first NOPE elements of queries [B, HEADS * (NOPE + ROTARY)], whose rows are
    STRIDE apart, times the keys' rows of expand [HEADS, NOPE + VALUE, RANK]. RANK % BR == 0. Grid (HEADS, RANK / BR).
    """
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    cols = tl.program_id(1) * BR + tl.arange(0, BR)
    element = tl.arange(0, NP)
    inside = element < NOPE
    at = expand + (head.to(tl.int64) * (NOPE + VALUE) + element)[:, None] * RANK + cols[None, :]
    w = tl.load(at, mask=inside[:, None], other=0.0, cache_modifier=".cg")
    if PDL:
        gdc_wait()
    for batch in range(B):
        query = tl.load(queries + batch * STRIDE + head * (NOPE + ROTARY) + element, mask=inside, other=0.0)
        acc = tl.sum(w.to(tl.float32) * query.to(tl.float32)[:, None], axis=0)
        tl.store(out + (batch * HEADS + head) * RANK + cols, acc.to(out.dtype.element_ty))


@triton.jit
def _splits(position, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Tokens of one split of a row of `position` cached ones, and the number of splits that have any, at least 1."""
    per_split = tl.cdiv(tl.cdiv(position, SPLITS), TILE) * TILE
    return per_split, tl.maximum(tl.cdiv(position, tl.maximum(per_split, 1)), 1)


@triton.jit
def _turned(at, cos, sin, mask, ROTARY: tl.constexpr, NEIGHBOURS: tl.constexpr, dtype: tl.constexpr):
    """Rotated pairs, first and second elements [..., ROTARY / 2] in `dtype`, of the vectors at pointers [..., 1]."""
    first, second = pairs_of(ROTARY, ROTARY // 2, ROTARY, NEIGHBOURS)
    low = tl.load(at + first[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + second[None, :], mask=mask, other=0.0).to(tl.float32)
    return (
        (low * cos[None, :] - high * sin[None, :]).to(dtype),
        (high * cos[None, :] + low * sin[None, :]).to(dtype),
    )


@triton.jit
def _kept(memory, block, position, BLOCK: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr):
    """Pointers to the latents and the keys of the tokens at `position`, which are in `block`; both may be tensors."""
    latents = memory + block.to(tl.int64) * (BLOCK * (RANK + ROTARY))
    return latents + position % BLOCK * RANK, latents + BLOCK * RANK + position % BLOCK * ROTARY


@triton.jit
def attend_latent(
    queries, absorbed, new, norm, cos_table, sin_table, rows, adapters, lengths, table, memory,
    part_max, part_sum, part_out, eps, scaling, max_blocks,
    HEADS: tl.constexpr, GP: tl.constexpr, RANK: tl.constexpr, NOPE: tl.constexpr, ROTARY: tl.constexpr,
    NEIGHBOURS: tl.constexpr, HALVES: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    Q_STRIDE: tl.constexpr, NEW_STRIDE: tl.constexpr, ADAPTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums of latents part_out [B, HEADS, SPLITS, RANK] fp32, weighed by exp(score - part_max), and the weights' sums
    part_sum; both [B, HEADS, SPLITS] fp32. Writes position lengths[row] of the row's memory, which split 0 attends to.

    queries [B, HEADS * (NOPE + ROTARY)] and new [B, RANK + ROTARY], the latent and the key to be rotated, have rows
    Q_STRIDE and NEW_STRIDE apart; absorbed [B, HEADS, RANK]; norm [RANK] of latents. Token t of a row is entry t %
    BLOCK of block table[row, t // BLOCK] of memory, whose blocks are latents [BLOCK, RANK] then keys [BLOCK, ROTARY];
    table is [rows, max_blocks]. A batch entry with row -1 is skipped. NEIGHBOURS: an element is rotated with the one
    beside it, else with the one half of them away; HALVES: memory has the first elements of all pairs before the second
    ones, whichever they were. TILE: tokens of a product, like BLOCK a power of two; GP: heads of a program. ADAPTED:
    norm is [1 + adapters, RANK] (see `trunk`). Grid (SPLITS, ceil(HEADS / GP), B).

    The split's first tile of cached tokens is loaded before the wait: no kernel of this step writes it, nor the table.
    """
    if PDL:
        gdc_launch_dependents()
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = absorbed.dtype.element_ty
    half = tl.arange(0, ROTARY // 2)
    first, second = pairs_of(ROTARY, ROTARY // 2, ROTARY, NEIGHBOURS and not HALVES)
    cols = tl.arange(0, RANK)
    tile = tl.arange(0, TILE)
    heads = group * GP + tl.arange(0, GP)
    valid = (heads < HEADS)[:, None]
    row = tl.load(rows + batch)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    per_split, num_splits = _splits(position, SPLITS, TILE)
    begin = split * per_split
    end = tl.where(row >= 0, tl.minimum(begin + per_split, position), 0)
    row_table = table + row.to(tl.int64) * max_blocks
    block = blocks_at(row_table, begin, end, BLOCK, TILE)
    next_block = blocks_at(row_table, begin + TILE, end, BLOCK, TILE)
    own_block = tl.load(row_table + position // BLOCK, mask=row >= 0, other=0)
    cos = tl.load(cos_table + position * (ROTARY // 2) + half)
    sin = tl.load(sin_table + position * (ROTARY // 2) + half)
    if ADAPTED:
        norm += tl.load(adapters + batch) * RANK
    scale = tl.load(norm + cols)
    inside = begin + tile < end
    at, k_at = _kept(memory, block, begin + tile, BLOCK, RANK, ROTARY)
    latent = tl.load(at[:, None] + cols[None, :], mask=inside[:, None], other=0.0)
    k_low = tl.load(k_at[None, :] + first[:, None], mask=inside[None, :], other=0.0)
    k_high = tl.load(k_at[None, :] + second[:, None], mask=inside[None, :], other=0.0)
    if PDL:
        gdc_wait()
    if (row >= 0) & (split < num_splits):
        query = tl.load(absorbed + (batch * HEADS + heads)[:, None] * RANK + cols[None, :], mask=valid, other=0.0)
        q_at = queries + batch * Q_STRIDE + heads[:, None] * (NOPE + ROTARY) + NOPE
        q_low, q_high = _turned(q_at, cos, sin, valid, ROTARY, NEIGHBOURS, dtype)
        peak = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, RANK], tl.float32)
        if split == 0:
            mine = new + batch * NEW_STRIDE
            own = normalise(tl.load(mine + cols).to(tl.float32), scale, eps, RANK, dtype)
            one = tl.zeros([1, 1], tl.int32)
            new_low, new_high = _turned(mine + RANK + one, cos, sin, one == 0, ROTARY, NEIGHBOURS, dtype)
            if group == 0:
                here, k_here = _kept(memory, own_block, position, BLOCK, RANK, ROTARY)
                tl.store(here + cols, own)
                tl.store(k_here + first[None, :], new_low)
                tl.store(k_here + second[None, :], new_high)
            peak = scaling * (
                tl.sum(query.to(tl.float32) * own.to(tl.float32)[None, :], axis=1)
                + tl.sum(q_low.to(tl.float32) * new_low.to(tl.float32), axis=1)
                + tl.sum(q_high.to(tl.float32) * new_high.to(tl.float32), axis=1)
            )
            total += 1.0
            acc += own.to(tl.float32)[None, :]
        for start in range(begin, end, TILE):
            score = tl.dot(query, tl.trans(latent), input_precision="ieee")
            score = tl.dot(q_low, k_low, score, input_precision="ieee")
            score = tl.dot(q_high, k_high, score, input_precision="ieee") * scaling
            score = tl.where(inside[None, :], score, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(score, axis=1))
            decay = tl.exp(peak - new_peak)
            weight = tl.exp(score - new_peak[:, None])
            total = total * decay + tl.sum(weight, axis=1)
            acc = tl.dot(weight.to(dtype), latent, acc * decay[:, None], input_precision="ieee")
            peak = new_peak
            following = start + TILE
            inside = following + tile < end
            at, k_at = _kept(memory, next_block, following + tile, BLOCK, RANK, ROTARY)
            latent = tl.load(at[:, None] + cols[None, :], mask=inside[:, None], other=0.0)
            k_low = tl.load(k_at[None, :] + first[:, None], mask=inside[None, :], other=0.0)
            k_high = tl.load(k_at[None, :] + second[:, None], mask=inside[None, :], other=0.0)
            next_block = blocks_at(row_table, following + TILE, end, BLOCK, TILE)
        part = (batch * HEADS + heads) * SPLITS + split
        tl.store(part_max + part, peak, mask=heads < HEADS)
        tl.store(part_sum + part, total, mask=heads < HEADS)
        tl.store(part_out + part[:, None] * RANK + cols[None, :], acc, mask=valid)


@triton.jit
def expand_values(
    part_max, part_sum, part_out, expand, gates, rows, lengths, out,
    B: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr, STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [B, HEADS * VALUE]: the splits of `attend_latent`, joined in their order, times the values' rows of expand
    [HEADS, NOPE + VALUE, RANK], and if GATED times the sigmoid of gates [B, HEADS], whose rows are STRIDE apart. Grid
    (HEADS, ceil(VALUE / BV))."""
    if PDL:
        gdc_launch_dependents()
    head = tl.program_id(0)
    value = tl.program_id(1) * BV + tl.arange(0, BV)
    cols = tl.arange(0, RANK)
    split = tl.arange(0, SPLITS)
    inside = value < VALUE
    at = expand + (head.to(tl.int64) * (NOPE + VALUE) + NOPE + value)[:, None] * RANK + cols[None, :]
    w = tl.load(at, mask=inside[:, None], other=0.0, cache_modifier=".cg")
    if PDL:
        gdc_wait()
    for batch in range(B):
        row = tl.load(rows + batch)
        position = tl.load(lengths + row, mask=row >= 0, other=0)
        _, num_splits = _splits(position, SPLITS, TILE)
        here = split < tl.where(row >= 0, num_splits, 0)
        part = (batch * HEADS + head) * SPLITS + split
        peaks = tl.load(part_max + part, mask=here, other=-1.0e30)
        totals = tl.load(part_sum + part, mask=here, other=0.0)
        parts = tl.load(part_out + part[:, None] * RANK + cols[None, :], mask=here[:, None], other=0.0)
        gain = tl.exp(peaks - tl.max(peaks, axis=0))
        total = tl.sum(totals * gain, axis=0)
        gain = gain / tl.where(total > 0.0, total, 1.0)
        joined = tl.sum(parts * gain[:, None], axis=0)
        acc = tl.sum(w.to(tl.float32) * joined[None, :], axis=1)
        result = acc.to(out.dtype.element_ty)
        if GATED:
            gate = tl.load(gates + batch * STRIDE + head).to(tl.float32)
            gate = (1.0 / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
            result = (result.to(tl.float32) * gate.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + (batch * HEADS + head) * VALUE + value, result, mask=inside)
