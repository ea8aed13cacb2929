"""The routed experts of one layer, in the order of the router's work list; fetches overlap with compute.

`gate_up`: the first FETCHERS programs fetch the missing experts from pinned host memory, tile by tile, and compute each
tile when it arrives, then fetch their down projections; all other programs compute the resident experts. So PCIe and
HBM are used at the same time, and at the kernel's end all experts that the layer needs are in slots. A span is gate_up
[2I, H], bias [2I], down [H, I], bias [H], without biases where BIAS is false; rows of gate and up alternate if
ALTERNATES. Sums are fp32 and in pick order. Invariant: a token's sums are the same instructions in the same order for
any resident experts and any batch size.
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expert_store.paging.kernels import FETCHED, copy_span
from server.model.device.kernels.trunk import gated, scaled, with_change


@triton.jit
def _gate_up_token(
    w_gate, w_up, b_gate, b_up, normed, act, pair, rows,
    K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, I: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """act [pair, rows] of one token with weights [rows, H] and biases [rows] that are in registers."""
    dtype: tl.constexpr = act.dtype.element_ty
    cols = tl.arange(0, HP)
    x = tl.load(normed + pair // K * H + cols, mask=cols < H, other=0.0).to(tl.float32)[None, :]
    gate = tl.sum(w_gate.to(tl.float32) * x, axis=1)
    up = tl.sum(w_up.to(tl.float32) * x, axis=1)
    if BIAS:
        gate = gate.to(dtype).to(tl.float32) + b_gate
        up = up.to(dtype).to(tl.float32) + b_up
    tl.store(act + pair * I + rows, gated(gate, up, dtype, GATE), mask=rows < I)


@triton.jit
def _gate_up_tile(
    normed, anchor, weight_at, bias_at, act, count, pairs, expert, tile,
    ONE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, I: tl.constexpr, BI: tl.constexpr,
    STRIDE: tl.constexpr, ALTERNATES: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """act [pair, tile rows] for every token of one expert; a tile is BI gate rows and the BI up rows that belong to
    them. The span at `bias_at` gives the biases: that of a fetched expert may not be in its slot yet."""
    cols = tl.arange(0, HP)
    rows = tile * BI + tl.arange(0, BI)
    gate_row = 2 * rows if ALTERNATES else rows
    APART: tl.constexpr = 1 if ALTERNATES else I
    mask = (rows < I)[:, None] & (cols < H)[None, :]
    at = anchor + weight_at + gate_row[:, None] * H + cols[None, :]
    w_gate = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    w_up = tl.load(at + APART * H, mask=mask, other=0.0, cache_modifier=".cg")
    b_gate = tl.zeros([BI], tl.float32)
    b_up = tl.zeros([BI], tl.float32)
    if BIAS:
        at = anchor + bias_at + 2 * I * H + gate_row
        b_gate = tl.load(at, mask=rows < I, other=0.0).to(tl.float32)
        b_up = tl.load(at + APART, mask=rows < I, other=0.0).to(tl.float32)
    for token in range(1 if ONE else tl.load(count + expert)):
        pair = tl.load(pairs + expert * STRIDE + token)
        _gate_up_token(w_gate, w_up, b_gate, b_up, normed, act, pair, rows, K, H, HP, I, BIAS, GATE)


@triton.jit
def fetch_tile(
    anchor, source, target, expert, tile,
    I: tl.constexpr, BI: tl.constexpr, ROW: tl.constexpr, ALTERNATES: tl.constexpr, COPY: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Copies a tile of a missing expert to its slot: BI gate rows and the BI up rows that belong to them, of ROW
    elements each. Returns the places of span and slot, which are multiples of MULTIPLE elements."""
    origin = tl.multiple_of(tl.load(source + expert), MULTIPLE)
    slot = tl.multiple_of(tl.load(target + expert), MULTIPLE)
    size = tl.minimum(BI, I - tile * BI) * ROW
    first = tile * BI * ROW
    if ALTERNATES:
        copy_span(anchor, origin + 2 * first, slot + 2 * first, 2 * size, COPY)
    else:
        copy_span(anchor, origin + first, slot + first, size, COPY)
        copy_span(anchor, origin + first + I * ROW, slot + first + I * ROW, size, COPY)
    tl.debug_barrier()
    return origin, slot


@triton.jit
def fetch_rest(
    anchor, source, target, program, num_miss,
    TILES: tl.constexpr, FETCHERS: tl.constexpr, BEFORE: tl.constexpr, REST: tl.constexpr, COPY: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Copies a fetcher's shares, one of TILES each, of what missing spans hold after BEFORE elements: REST elements."""
    for unit in range(program, num_miss * TILES, FETCHERS):
        expert = unit // TILES
        share = REST // TILES // MULTIPLE * MULTIPLE
        first = BEFORE + (unit % TILES) * share
        size = tl.where(unit % TILES == TILES - 1, REST - (TILES - 1) * share, share)
        origin = tl.multiple_of(tl.load(source + expert), MULTIPLE)
        slot = tl.multiple_of(tl.load(target + expert), MULTIPLE)
        copy_span(anchor, origin + first, slot + first, size, COPY)


@triton.jit
def gate_up(
    normed, anchor, header, target, source, count, pairs, act,
    K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, I: tl.constexpr, BI: tl.constexpr,
    STRIDE: tl.constexpr, FETCHERS: tl.constexpr, COPY: tl.constexpr, ONE: tl.constexpr,
    DOWN: tl.constexpr, ALTERNATES: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act [B * K, I] = gated(gate, up) of each pick; missing spans are copied to their slots on the way.

    Grid (FETCHERS + distinct experts at most * ceil(I / BI),). ONE: a batch of one token; DOWN: fetch the down
    projections too, and all biases (else `down` fetches, and there are no biases).
    """
    REST: tl.constexpr = H * I + (2 * I + H if BIAS else 0)  # elements of a span after gate_up
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    TILES: tl.constexpr = (I + BI - 1) // BI
    program = tl.program_id(0)
    num_distinct = tl.load(header)
    num_miss = tl.load(header + 1)
    if program < FETCHERS:
        for unit in range(program, num_miss * TILES, FETCHERS):
            expert = unit // TILES
            tile = unit % TILES
            origin, slot = fetch_tile(anchor, source, target, expert, tile, I, BI, H, ALTERNATES, COPY, 8)
            _gate_up_tile(
                normed, anchor, slot, origin, act, count, pairs, expert, tile,
                ONE, K, H, HP, I, BI, STRIDE, ALTERNATES, BIAS, GATE,
            )  # fmt: skip
        if DOWN:
            fetch_rest(anchor, source, target, program, num_miss, TILES, FETCHERS, 2 * I * H, REST, COPY, 8)
    else:
        expert = (program - FETCHERS) // TILES + num_miss
        tile = (program - FETCHERS) % TILES
        if expert < num_distinct:
            slot = tl.multiple_of(tl.load(target + expert), 8)
            _gate_up_tile(
                normed, anchor, slot, slot, act, count, pairs, expert, tile,
                ONE, K, H, HP, I, BI, STRIDE, ALTERNATES, BIAS, GATE,
            )  # fmt: skip


@triton.jit
def _switched(shared, switch, normed, rows, inside, H: tl.constexpr, HP: tl.constexpr, dtype: tl.constexpr):
    """shared [rows] * sigmoid(switch [H] · normed [H]) of one token, with transformers' roundings."""
    cols = tl.arange(0, HP)
    x = tl.load(normed + cols, mask=cols < H, other=0.0).to(tl.float32)
    w = tl.load(switch + cols, mask=cols < H, other=0.0).to(tl.float32)
    share = tl.sum(x * w, axis=0).to(dtype).to(tl.float32)
    share = (1.0 / (1.0 + tl.exp(-share))).to(dtype).to(tl.float32)
    return (share * tl.load(shared + rows, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def with_shared(
    acc, residual, shared, switch, normed, adapters, out, batch, rows, inside, H: tl.constexpr, HP: tl.constexpr,
    SHARED: tl.constexpr, SCALE: tl.constexpr, ROUTED: tl.constexpr, ADAPTED: tl.constexpr,
):  # fmt: skip
    """out [batch, rows] = residual + SCALE * (ROUTED * acc [rows] + the term of SHARED); see `down`."""
    dtype: tl.constexpr = out.dtype.element_ty
    at = batch * H + rows
    before = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    routed = scaled(acc, dtype, ROUTED).to(dtype).to(tl.float32)
    if SHARED == 1:
        routed = (routed + tl.load(shared + at, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if SHARED == 2:
        if ADAPTED:
            switch += tl.load(adapters + batch) * H
        beside = _switched(shared + batch * H, switch, normed + batch * H, rows, inside, H, HP, dtype)
        routed = (routed + beside).to(dtype).to(tl.float32)
    tl.store(out + at, (before + scaled(routed, dtype, SCALE).to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit
def down_biases(
    biases, pair_target, weights, first, rows, inside, AT: tl.constexpr, PER: tl.constexpr, K: tl.constexpr
):
    """The sum of the down biases [rows] of a token's picks, weighted. A span's bias is AT elements of `biases` after
    its start; PER: elements of a bias in one of the slots' elements. Reads slots after `gate_up` has filled them."""
    total = tl.zeros(rows.shape, tl.float32)
    for k in tl.static_range(K):
        pick = first + k + 0 * rows  # for each row: Triton's interpreter loads under no mask made with a number
        slot = tl.load(pair_target + pick)
        weight = tl.load(weights + pick)
        slot = tl.where(slot >= FETCHED, slot - FETCHED, slot)
        bias = tl.load(biases + slot * PER + AT + rows, mask=inside & (slot >= 0), other=0.0).to(tl.float32)
        total += tl.where(weight == 0.0, 0.0, bias * weight)
    return total


@triton.jit
def down(
    act, anchor, pair_target, pair_source, weights, residual, shared, switch, normed, adapters, lora_b, low, out,
    K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, I: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
    SHARED: tl.constexpr, PAGED: tl.constexpr, FETCH: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, ROUTED: tl.constexpr, ADAPTED: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, H] = residual + SCALE * (ROUTED * sum of a token's K picks of weight * (down · act + bias) + the term of
    SHARED). Grid (B, ceil(H / BH)): programs of neighbouring tokens read the same rows of experts that they share.

    SHARED: 0 nothing, 1 shared [B, H], 2 shared [B, H] * sigmoid(switch [H] · normed [B, H]); ADAPTED: a switch for
    each adapter, see `trunk`. RANK: lora_b [adapters, H, RANK] · low [B, RANK] is added to the sum of the picks.

    The picks' down rows are read side by side as one row of K * I columns, before the wait: see the package's note.
    FETCH: rows of missing experts are read from host memory and also stored in their slots, so that PCIe stays busy
    while `gate_up` ends; without it `gate_up` has stored them, and they are read after the wait.
    """
    if PDL:
        gdc_launch_dependents()
    batch = tl.program_id(0)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    first = batch * K
    STEPS: tl.constexpr = (K * I + BC - 1) // BC
    BEFORE: tl.constexpr = 2 * I * H + (2 * I if BIAS else 0)
    tiles = ()
    for s in tl.static_range(STEPS):
        flat = s * BC + tl.arange(0, BC)
        slot = tl.max_constancy(tl.load(pair_target + first + flat // I, mask=flat < K * I, other=-1), 8)
        mask = (rows < H)[:, None] & (slot >= 0)[None, :]
        within = (BEFORE + flat % I)[None, :] + rows[:, None] * I
        if PAGED:
            missing = slot >= FETCHED
            if FETCH:
                home = tl.max_constancy(tl.load(pair_source + first + flat // I, mask=missing, other=0), 8)
                origin = tl.multiple_of(tl.where(missing, home, slot), 8)
                tile = tl.load(anchor + origin[None, :] + within, mask=mask, other=0.0, cache_modifier=".cg")
                place = tl.multiple_of(tl.where(missing, slot - FETCHED, 0), 8)
                tl.store(anchor + place[None, :] + within, tile, mask=mask & missing[None, :])
            else:
                origin = tl.multiple_of(slot, 8)
                here = mask & (missing == 0)[None, :]
                tile = tl.load(anchor + origin[None, :] + within, mask=here, other=0.0, cache_modifier=".cg")
        else:
            origin = tl.multiple_of(slot, 8)
            tile = tl.load(anchor + origin[None, :] + within, mask=mask, other=0.0, cache_modifier=".cg")
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    if PDL:
        gdc_wait()
    acc = tl.zeros([BH], tl.float32)
    for s in tl.static_range(STEPS):
        flat = s * BC + tl.arange(0, BC)
        live = flat < K * I
        tile = tiles[s]
        if PAGED and not FETCH:
            slot = tl.max_constancy(tl.load(pair_target + first + flat // I, mask=live, other=-1), 8)
            missing = slot >= FETCHED
            place = tl.multiple_of(tl.where(missing, slot - FETCHED, 0), 8)
            within = (BEFORE + flat % I)[None, :] + rows[:, None] * I
            late = tl.load(
                anchor + place[None, :] + within, mask=(rows < H)[:, None] & missing[None, :], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            tile = tl.where(missing[None, :], late, tile)
        value = tl.load(act + first * I + flat, mask=live, other=0.0).to(tl.float32)
        weight = tl.load(weights + first + flat // I, mask=live, other=0.0)
        value = tl.where(weight == 0.0, 0.0, value * weight)
        acc += tl.sum(tile.to(tl.float32) * value[None, :], axis=1)
    if BIAS:
        acc += down_biases(anchor, pair_target, weights, first, rows, rows < H, BEFORE + H * I, 1, K)
    if RANK > 0:
        acc = with_change(acc, tl.load(adapters + batch), lora_b, low, batch, rows, rows < H, H, RANK)
    with_shared(
        acc, residual, shared, switch, normed, adapters, out, batch, rows, rows < H, H, HP, SHARED, SCALE, ROUTED,
        ADAPTED,
    )  # fmt: skip
