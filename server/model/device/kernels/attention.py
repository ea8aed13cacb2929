"""One token's grouped-query attention over its row's blocks of KV memory: norms, rotary, cache write, split softmax.

A program handles one KV head of one sequence over one split of its cached tokens; the last program of a head to finish
(counted on the device) joins the splits in their order, so the result does not depend on which one is last. Splits
depend on the row's length alone, so its bits depend neither on the batch nor on the numbers of its blocks. The new
token's key and value stay in registers: split 0 scores and stores them. Source of the split: Flash-Decoding (Dao et
al., 2023). The rotary embedding works in halves, as transformers' `rotate_half`, or on NEIGHBOURS, on a head's first
ROTARY elements; the other elements form pairs with an angle of 0. Heads have D elements of queries and keys and DV of
values; HP and VP are D / 2 and DV as powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _within(mask, index, N: tl.constexpr, P: tl.constexpr):
    """mask where index, of [0, P), is below N."""
    if N != P:
        mask = mask & (index < N)
    return mask


@triton.jit
def pairs_of(D: tl.constexpr, HP: tl.constexpr, ROTARY: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Offsets in a head of the first and the second element of each pair, [HP] both."""
    half = tl.arange(0, HP)
    if NEIGHBOURS:
        low = 2 * half
        high = 2 * half + 1
    elif ROTARY == D:
        low = half
        high = D // 2 + half
    else:
        VECTOR: tl.constexpr = 8 if ROTARY // 2 % 8 + (D - ROTARY) // 2 % 8 == 0 else 1
        rotated = half < ROTARY // 2
        low = tl.where(rotated, half, half + ROTARY // 2)
        high = low + tl.where(rotated, ROTARY // 2, (D - ROTARY) // 2)
        low = tl.max_contiguous(tl.multiple_of(low, VECTOR), VECTOR)
        high = tl.max_contiguous(tl.multiple_of(high, VECTOR), VECTOR)
    return low, high


@triton.jit
def _row_scale(ptr, eps, N: tl.constexpr, NP: tl.constexpr):
    """The factor of a norm over all heads together."""
    cols = tl.arange(0, NP)
    value = tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value, axis=0) / N + eps)


@triton.jit
def _first_rounded(value, norm, dtype: tl.constexpr):
    """A normalised value, rounded before it is multiplied by the norm's weights unless these are fp32."""
    if norm.dtype.element_ty != tl.float32:
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def _norm_heads(low, high, norm, eps, D: tl.constexpr, HP: tl.constexpr, first, second, dtype: tl.constexpr):
    """Pairs [R, HP] of heads, each head normalised by itself, in fp32."""
    half = tl.arange(0, HP)
    scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + eps)
    w_low = tl.load(norm + first, mask=half < D // 2, other=0.0).to(tl.float32)
    w_high = tl.load(norm + second, mask=half < D // 2, other=0.0).to(tl.float32)
    low = (_first_rounded(low * scale[:, None], norm, dtype) * w_low[None, :]).to(dtype).to(tl.float32)
    high = (_first_rounded(high * scale[:, None], norm, dtype) * w_high[None, :]).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def _head(
    ptr, norm, cos, sin, eps, heads, valid,
    D: tl.constexpr, HP: tl.constexpr, ROTARY: tl.constexpr, NEIGHBOURS: tl.constexpr, NORM: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Loads head rows [R, D], normalises and rotates them; returns the pairs' first and second elements [R, HP] in the
    model's dtype, 0 past D / 2. NORM: 0 none, 1 each head by itself, 2 all N elements of the token together, 3 as 1 but
    after the rotation.
    """
    first, second = pairs_of(D, HP, ROTARY, NEIGHBOURS)
    at = ptr + heads[:, None] * D
    real = _within(valid[:, None], tl.arange(0, HP)[None, :], D // 2, HP)
    low = tl.load(at + first[None, :], mask=real, other=0.0).to(tl.float32)
    high = tl.load(at + second[None, :], mask=real, other=0.0).to(tl.float32)
    if NORM == 1:
        low, high = _norm_heads(low, high, norm, eps, D, HP, first, second, dtype)
    if NORM == 2:
        common = _row_scale(ptr, eps, N, NP)
        weight_at = norm + heads[:, None] * D
        w_low = tl.load(weight_at + first[None, :], mask=real, other=0.0).to(tl.float32)
        w_high = tl.load(weight_at + second[None, :], mask=real, other=0.0).to(tl.float32)
        low = (_first_rounded(low * common, norm, dtype) * w_low).to(dtype).to(tl.float32)
        high = (_first_rounded(high * common, norm, dtype) * w_high).to(dtype).to(tl.float32)
    rotated_low = (low * cos[None, :] - high * sin[None, :]).to(dtype)
    rotated_high = (high * cos[None, :] + low * sin[None, :]).to(dtype)
    if NORM == 3:
        low, high = _norm_heads(
            rotated_low.to(tl.float32), rotated_high.to(tl.float32), norm, eps, D, HP, first, second, dtype
        )
        rotated_low = low.to(dtype)
        rotated_high = high.to(dtype)
    return rotated_low, rotated_high


@triton.jit
def _through_gate(value, gates, head, full, mask, DV: tl.constexpr, dtype: tl.constexpr, GATE: tl.constexpr):
    """value [heads, VP] times the function GATE (`parts.OutputGate`) of the heads' gates, rounded as transformers does;
    without a GATE the value alone."""
    value = value.to(dtype)
    if GATE > 0:
        at = gates + (head[:, None] + 0 * full[None, :] if GATE == 3 else head[:, None] * DV + full[None, :])
        heat = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if GATE == 1:
            share = 1.0 / (1.0 + tl.exp(-heat))
        else:
            share = tl.where(heat > 20.0, heat, tl.log(1.0 + tl.exp(tl.minimum(heat, 20.0))))
        value = (value.to(tl.float32) * share.to(dtype).to(tl.float32)).to(dtype)
    return value


@triton.jit
def _value(
    ptr, eps, full, DV: tl.constexpr, VALUE_NORM: tl.constexpr, VALUE_SCALE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A head's value at ptr, of elements `full`, normalised without weights and multiplied where the layer does so."""
    value = tl.load(ptr + full, mask=full < DV, other=0.0)
    if VALUE_NORM:
        wide = value.to(tl.float32)
        value = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / DV + eps)).to(dtype)
    if VALUE_SCALE != 1.0:
        value = (value.to(tl.float32) * VALUE_SCALE).to(dtype)
    return value


@triton.jit
def _join(
    part_max, part_sum, part_out, gates, out, first_head, num_heads, num_splits,
    G2: tl.constexpr, DV: tl.constexpr, VP: tl.constexpr, SPLITS: tl.constexpr, dtype: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """Joins the splits of at most G2 heads, first_head ... first_head + num_heads - 1, in one sweep of independent
    loads; `gates` are those of these heads."""
    head = tl.arange(0, G2)
    split = tl.arange(0, SPLITS)
    full = tl.arange(0, VP)
    part = (first_head + head)[:, None] * SPLITS + split[None, :]
    mask = (head < num_heads)[:, None] & (split < num_splits)[None, :]
    peaks = tl.load(part_max + part, mask=mask, other=-1.0e30, cache_modifier=".cg")
    totals = tl.load(part_sum + part, mask=mask, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        part_out + part[:, :, None] * DV + full[None, None, :],
        mask=_within(mask[:, :, None], full[None, None, :], DV, VP), other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    gain = tl.exp(peaks - tl.max(peaks, axis=1)[:, None])
    total = tl.sum(totals * gain, axis=1)
    gain = gain / tl.where(total > 0.0, total, 1.0)[:, None]
    joined = tl.sum(parts * gain[:, :, None], axis=1)
    at = head[:, None] * DV + full[None, :]
    live = _within((head < num_heads)[:, None], full[None, :], DV, VP)
    tl.store(out + first_head * DV + at, _through_gate(joined, gates, head, full, live, DV, dtype, GATE), mask=live)


@triton.jit
def blocks_at(row_table, start, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The row's block at `start`, or that of each token of the tile there, [TILE], if blocks are smaller."""
    block = tl.load(row_table + start // BLOCK, mask=start < end, other=0)
    for part in tl.static_range(1, TILE // BLOCK):
        at = start + part * BLOCK
        following = tl.load(row_table + at // BLOCK, mask=at < end, other=0)
        block = tl.where(tl.arange(0, TILE) < part * BLOCK, block, following)
    return block


@triton.jit
def _vectors(
    memory, block, kv_head, position, NUM_KV: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr
):
    """Pointers to the keys and to the values of the tokens at `position`, which are in `block`; both may be tensors."""
    keys = memory + block.to(tl.int64) * (NUM_KV * BLOCK * (D + DV))
    values = keys + NUM_KV * BLOCK * D + (kv_head * BLOCK + position % BLOCK) * DV
    return keys + (kv_head * BLOCK + position % BLOCK) * D, values


@triton.jit
def attend(
    qkv, q_norm, k_norm, sinks, cos_table, sin_table, rows, adapters, lengths, table, memory, out,
    part_max, part_sum, part_out, arrived, eps, scaling, max_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DV: tl.constexpr,
    VP: tl.constexpr, VALUES_AT: tl.constexpr, VALUE_NORM: tl.constexpr, VALUE_SCALE: tl.constexpr,
    QKV: tl.constexpr, GP: tl.constexpr, JOINED: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr,
    ROTARY: tl.constexpr, NEIGHBOURS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    GATE: tl.constexpr, ADAPTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, NUM_HEADS * DV] from qkv [B, QKV], heads of queries, keys and values, those of values from VALUES_AT on
    (which may be the keys' place), and with a GATE the queries' gates; writes position lengths[row] of the row's keys
    and values. Token t of a row is entry t % BLOCK of block table[row, t // BLOCK] of memory, whose blocks are keys
    [NUM_KV, BLOCK, D] then values [NUM_KV, BLOCK, DV]; table is [rows, max_blocks]. A batch entry with row -1 is
    skipped. TILE: tokens of a product, like BLOCK a power of two. WINDOW: number of tokens to attend to, the new one
    included; 0: all. SINKS: a head's softmax has one more score, of sinks [NUM_HEADS] fp32, without a value. QP, KP:
    widths of all query and all key heads, padded. JOINED: heads whose splits are joined together. ADAPTED: see
    `trunk`. Grid (SPLITS, NUM_KV, B).

    The split's first tile of cached keys and values is loaded before the wait: no kernel of this step writes it, nor
    the table. Later tiles' blocks are looked up one tile ahead, so only the first waits for its entry of the table.
    """
    if PDL:
        gdc_launch_dependents()
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = qkv.dtype.element_ty
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HP)
    first, second = pairs_of(D, HP, ROTARY, NEIGHBOURS)
    full = tl.arange(0, VP)
    tile = tl.arange(0, TILE)
    group = tl.arange(0, GP)
    row = tl.load(rows + batch)
    if ADAPTED:
        adapter = tl.load(adapters + batch)
        q_norm += adapter * (NUM_HEADS * D if NORM == 2 else D)
        k_norm += adapter * (NUM_KV * D if NORM == 2 else D)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    seen = position
    if WINDOW > 0:
        seen = tl.minimum(position, WINDOW - 1)
    oldest = position - seen
    origin = oldest // TILE * TILE
    per_split = tl.cdiv(tl.cdiv(position - origin, SPLITS), TILE) * TILE
    num_splits = tl.maximum(tl.cdiv(position - origin, tl.maximum(per_split, 1)), 1)
    begin = origin + split * per_split
    end = tl.where(row >= 0, tl.minimum(begin + per_split, position), 0)
    row_table = table + row.to(tl.int64) * max_blocks
    block = blocks_at(row_table, begin, end, BLOCK, TILE)
    next_block = blocks_at(row_table, begin + TILE, end, BLOCK, TILE)
    own_block = tl.load(row_table + position // BLOCK, mask=row >= 0, other=0)
    cos = tl.load(cos_table + position * HALF + half, mask=half < HALF, other=1.0)
    sin = tl.load(sin_table + position * HALF + half, mask=half < HALF, other=0.0)
    inside = (begin + tile >= oldest) & (begin + tile < end)
    k_at, v_at = _vectors(memory, block, kv_head, begin + tile, NUM_KV, BLOCK, D, DV)
    k_inside = _within(inside[None, :], half[:, None], HALF, HP)
    k_low = tl.load(k_at[None, :] + first[:, None], mask=k_inside, other=0.0)
    k_high = tl.load(k_at[None, :] + second[:, None], mask=k_inside, other=0.0)
    v = tl.load(v_at[:, None] + full[None, :], mask=_within(inside[:, None], full[None, :], DV, VP), other=0.0)
    if PDL:
        gdc_wait()
    if (row >= 0) & (split < num_splits):
        mine = qkv + batch * QKV
        q_low, q_high = _head(
            mine, q_norm, cos, sin, eps, kv_head * GROUP + group, group < GROUP,
            D, HP, ROTARY, NEIGHBOURS, NORM, NUM_HEADS * D, QP, dtype,
        )  # fmt: skip
        peak = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, VP], tl.float32)
        if split == 0:
            one = tl.arange(0, 1)
            new_low, new_high = _head(
                mine + NUM_HEADS * D, k_norm, cos, sin, eps, kv_head + one, one < 1,
                D, HP, ROTARY, NEIGHBOURS, NORM, NUM_KV * D, KP, dtype,
            )  # fmt: skip
            v_new = _value(mine + VALUES_AT + kv_head * DV, eps, full, DV, VALUE_NORM, VALUE_SCALE, dtype)
            k_here, v_here = _vectors(memory, own_block, kv_head, position, NUM_KV, BLOCK, D, DV)
            tl.store(k_here + first[None, :], new_low, mask=(half < HALF)[None, :])
            tl.store(k_here + second[None, :], new_high, mask=(half < HALF)[None, :])
            tl.store(v_here + full, v_new, mask=full < DV)
            peak = scaling * (
                tl.sum(q_low.to(tl.float32) * new_low.to(tl.float32), axis=1)
                + tl.sum(q_high.to(tl.float32) * new_high.to(tl.float32), axis=1)
            )
            total += 1.0
            acc += v_new.to(tl.float32)[None, :]
            if SINKS:
                sink = tl.load(sinks + kv_head * GROUP + group, mask=group < GROUP, other=-float("inf"))
                highest = tl.maximum(peak, sink)
                decay = tl.exp(peak - highest)
                total = decay + tl.exp(sink - highest)
                acc = acc * decay[:, None]
                peak = highest
        for start in range(begin, end, TILE):
            score = tl.dot(q_low, k_low, input_precision="ieee")
            score = tl.dot(q_high, k_high, score, input_precision="ieee") * scaling
            score = tl.where(inside[None, :], score, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(score, axis=1))
            decay = tl.exp(peak - new_peak)
            weight = tl.exp(score - new_peak[:, None])
            total = total * decay + tl.sum(weight, axis=1)
            acc = tl.dot(weight.to(dtype), v, acc * decay[:, None], input_precision="ieee")
            peak = new_peak
            following = start + TILE
            inside = following + tile < end
            k_at, v_at = _vectors(memory, next_block, kv_head, following + tile, NUM_KV, BLOCK, D, DV)
            k_inside = _within(inside[None, :], half[:, None], HALF, HP)
            k_low = tl.load(k_at[None, :] + first[:, None], mask=k_inside, other=0.0)
            k_high = tl.load(k_at[None, :] + second[:, None], mask=k_inside, other=0.0)
            v = tl.load(v_at[:, None] + full[None, :], mask=_within(inside[:, None], full[None, :], DV, VP), other=0.0)
            next_block = blocks_at(row_table, following + TILE, end, BLOCK, TILE)
        heads = batch * NUM_HEADS + kv_head * GROUP + group
        mask = group < GROUP
        wide = _within(mask[:, None], full[None, :], DV, VP)
        GATE_ROWS: tl.constexpr = 1 if GATE == 3 else DV  # of a head
        gates = mine + VALUES_AT + NUM_KV * DV + kv_head * GROUP * GATE_ROWS
        if num_splits == 1:
            value = _through_gate(acc / total[:, None], gates, group, full, wide, DV, dtype, GATE)
            tl.store(out + heads[:, None] * DV + full[None, :], value, mask=wide)
        else:
            part = heads * SPLITS + split
            tl.store(part_max + part, peak, mask=mask)
            tl.store(part_sum + part, total, mask=mask)
            tl.store(part_out + part[:, None] * DV + full[None, :], acc, mask=wide)
            tl.debug_barrier()
            counter = arrived + batch * NUM_KV + kv_head
            if tl.atomic_add(counter, 1) == num_splits - 1:
                tl.store(counter, 0)
                for joined in range(0, GROUP, JOINED):
                    _join(
                        part_max, part_sum, part_out, gates + joined * GATE_ROWS, out,
                        batch * NUM_HEADS + kv_head * GROUP + joined, GROUP - joined, num_splits,
                        JOINED, DV, VP, SPLITS, dtype, GATE,
                    )  # fmt: skip
