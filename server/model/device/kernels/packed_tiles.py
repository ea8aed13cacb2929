"""The routed experts of one layer in rows of 4 or 8 bit codes, by tensor cores: a tile of rows is decoded once for all
tokens that picked its expert.

The work list, the fetchers, rows, planes and codes are those of `packed`. A program holds a tile of words in registers,
decodes them part by part, rounds the values to the activations' dtype as `packed_prefill` does, and multiplies them by
BT tokens at a time. Sums are fp32. Invariant: a token's sums are the same instructions in the same order for any
resident experts and any batch size, since columns of a product do not depend on each other.
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.model.device.kernels.experts import fetch_rest, fetch_tile, with_shared
from server.model.device.kernels.packed import (
    FP4,
    INT4,
    INT8,
    as_biases,
    codes_as_floats,
    factor,
    high_halves,
    rest,
    scales_of,
    up_biases,
    zeros_of,
)
from server.model.device.kernels.trunk import gated, with_change

_LIFT = tl.constexpr(float(2**100))
_REST = tl.constexpr(float(2**49))  # 2 ** 149, what an integer in a float's bits is short of, less _LIFT


@triton.jit
def _tile(
    anchor, at, rows, inside, step: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BW: tl.constexpr,
    QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, S_AT: tl.constexpr,
    ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
):  # fmt: skip
    """Words [S, rows, BW] of rows that begin at word `at`, and for each run of QW words the scale and, of integers,
    what it makes of the zero point, both [S, rows, runs]. Split s takes words (step * S + s) * BW and following."""
    row = at + rows * RW
    first = (step * S + tl.arange(0, S)) * BW
    word = first[:, None] + tl.arange(0, BW)[None, :]
    codes = tl.load(
        anchor + row[None, :, None] + word[:, None, :], mask=inside[None, :, None] & (word < W)[:, None, :], other=0,
        cache_modifier=".cg",
    )  # fmt: skip
    if QW == GW:  # in this form neighbouring scales are read together, and so ahead of the products
        group = (step * S + tl.arange(0, S))[:, None] * (BW // QW) + tl.arange(0, BW // QW)[None, :]
    else:
        group = (first[:, None] + tl.arange(0, BW // QW)[None, :] * QW) // GW
    mask = inside[None, :, None] & (group < W // GW)[:, None, :]
    group = group[:, None, :]
    scale = scales_of(anchor, row[None, :, None], group, mask, SCALES, S_AT, OVERALL, O_AT)
    if CODES < FP4:
        shift = scale * (1.0 / _REST) * zeros_of(anchor, row[None, :, None], group, mask, CODES, ZEROS, Z_AT)
        scale = scale * _LIFT
    else:
        shift = scale
        scale = scale * rest(CODES)
    return codes, scale, shift


@triton.jit
def _values(codes, scale, shift, part: tl.constexpr, CODES: tl.constexpr):
    """float32 values of the codes at place `part`, but for `factor` and, of integers, 1 / _REST. The bits of an integer
    are those of a tiny float, so one operation takes them out and one scales them and subtracts the zero point."""
    if CODES == INT4:
        field = (high_halves(codes) if part >= 4 else codes) & (0xF << (4 * (part % 4)))
        return field.to(tl.float32, bitcast=True) * scale - shift * (1 << (4 * (part % 4)))
    elif CODES == INT8:
        field = (high_halves(codes) if part >= 2 else codes) & (0xFF << (8 * (part % 2)))
        return field.to(tl.float32, bitcast=True) * scale - shift * (1 << (8 * (part % 2)))
    else:
        return codes_as_floats(codes, 0.0, 0, part, CODES) * scale


@triton.jit
def _widened(numbers, QW: tl.constexpr):
    """[S, rows, runs] for each of QW words: [S, rows, runs * QW]."""
    WIDE: tl.constexpr = [numbers.shape[0], numbers.shape[1], numbers.shape[2], QW]
    FLAT: tl.constexpr = [numbers.shape[0], numbers.shape[1], numbers.shape[2] * QW]
    return tl.reshape(tl.broadcast_to(numbers[:, :, :, None], WIDE), FLAT)


@triton.jit
def _activations(
    x_at, live, W: tl.constexpr, S: tl.constexpr, BW: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The tokens' activations [V, W], which begin at x_at [tokens]: [S, BW, tokens] for each step and plane."""
    found = ()
    for s in tl.static_range((W + S * BW - 1) // (S * BW)):
        word = (s * S + tl.arange(0, S))[:, None] * BW + tl.arange(0, BW)[None, :]
        mask = (word < W)[:, :, None] & live[None, None, :]
        for part in tl.static_range(V):
            x = tl.load(x_at[None, None, :] + (part * W + word)[:, :, None], mask=mask, other=0.0)
            found = found + (x,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    return found


@triton.jit
def _sums(
    x, anchor, at, rows, inside, BT: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BW: tl.constexpr,
    V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
):  # fmt: skip
    """float32 [rows, tokens]: rows that begin at word `at`, times the `_activations` x."""
    STEPS: tl.constexpr = (W + S * BW - 1) // (S * BW)
    tiles = ()
    for s in tl.static_range(STEPS):
        tile = _tile(anchor, at, rows, inside, s, W, S, BW, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT)
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    acc = tl.zeros([S, rows.shape[0], BT], tl.float32)
    for s in tl.static_range(STEPS):
        tile = tiles[s]
        for part in tl.static_range(V):
            values = _values(tile[0], _widened(tile[1], QW), _widened(tile[2], QW), part, CODES)
            acc = tl.dot(values.to(x[0].dtype), x[s * V + part], acc, input_precision="ieee")
    total = tl.sum(acc, axis=0)
    return total * _REST if CODES < FP4 else total


@triton.jit
def _gate_up_rows(
    planes, anchor, slot, origin, act, num_tokens, pairs, expert, first_tile, last_tile,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, STRIDE: tl.constexpr,
    S: tl.constexpr, BW: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr,
    OVERALL: tl.constexpr, O_AT: tl.constexpr, VD: tl.constexpr, NEXT: tl.constexpr, ALTERNATES: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """act [pair, rows of the tiles], in planes of VD, for every token of one expert; see `packed._gate_up_tile`. A tile
    is BI gate rows, then the BI up rows that belong to them."""
    both = tl.arange(0, 2 * BI)
    is_up = both // BI
    for start in range(0, num_tokens, BT):
        lane = start + tl.arange(0, BT)
        live = lane < num_tokens
        pair = tl.load(pairs + expert * STRIDE + lane, mask=live, other=0)
        x = _activations(planes + pair // K * H, live, H // V, S, BW, V)
        for tile in range(first_tile, last_tile):
            mine = tile * BI + both % BI
            row = 2 * mine + is_up if ALTERNATES else mine + is_up * I
            sums = _sums(
                x, anchor, slot, row, mine < I, BT, H // V, S, BW, V, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT,
                OVERALL, O_AT,
            )  # fmt: skip
            gate, up = tl.split(tl.permute(tl.reshape(sums, [2, BI, BT]), [1, 2, 0]))
            rows = tile * BI + tl.arange(0, BI)
            if BIAS != "":
                first = 2 * rows if ALTERNATES else rows
                b_gate, b_up = up_biases(
                    anchor, origin + 2 * I * RW, first, rows < I, 1 if ALTERNATES else I, BIAS
                )  # fmt: skip
                gate = gate.to(DTYPE).to(tl.float32) + b_gate[:, None]
                up = up.to(DTYPE).to(tl.float32) + b_up[:, None]
            product = gated(gate, up, DTYPE, GATE).to(tl.float32) * factor(rows % VD, NEXT)[:, None]
            place = rows % VD * (I // VD) + rows // VD
            tl.store(act + pair[None, :] * I + place[:, None], product, mask=(rows < I)[:, None] & live[None, :])


# One compiled kernel serves every length of a run, so the batch does not change the instructions of a sum.
@triton.jit(do_not_specialize=["run"])
def gate_up_tiles(
    planes, anchor, header, target, source, count, pairs, act, like, run,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, STRIDE: tl.constexpr,
    FETCHERS: tl.constexpr, COPY: tl.constexpr, REST: tl.constexpr, MOST: tl.constexpr,
    S: tl.constexpr, BW: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr,
    OVERALL: tl.constexpr, O_AT: tl.constexpr, VD: tl.constexpr, NEXT: tl.constexpr, ALTERNATES: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`packed.gate_up` by tensor cores, in tiles of BI gate and BI up rows and BT tokens; S splits of the columns. A
    program reads the activations once for `run` tiles of a resident expert."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    TILES: tl.constexpr = (I + BI - 1) // BI
    program = tl.program_id(0)
    num_distinct = tl.load(header)
    num_miss = tl.load(header + 1) if FETCHERS > 0 else 0
    if program < FETCHERS:
        for unit in range(program, num_miss * TILES, FETCHERS):
            expert = unit // TILES
            tile = unit % TILES
            origin, slot = fetch_tile(anchor, source, target, expert, tile, I, BI, RW, ALTERNATES, COPY, 4)
            _gate_up_rows(
                planes, anchor, slot, origin, act, tl.load(count + expert), pairs, expert, tile, tile + 1, K, H, I, BI,
                BT, STRIDE, S, BW, V, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT, VD, NEXT, ALTERNATES,
                BIAS, GATE, like.dtype.element_ty,
            )  # fmt: skip
        fetch_rest(anchor, source, target, program, num_miss, TILES, FETCHERS, 2 * I * RW, REST, COPY, 4)
    else:
        runs = (TILES + run - 1) // run
        expert = (program - FETCHERS) // runs + num_miss
        first_tile = (program - FETCHERS) % runs * run
        slot = tl.multiple_of(tl.load(target + expert, mask=expert < MOST, other=0), 4)
        if expert < num_distinct:
            _gate_up_rows(
                planes, anchor, slot, slot, act, tl.load(count + expert), pairs, expert, first_tile,
                tl.minimum(first_tile + run, TILES), K, H, I, BI, BT, STRIDE, S, BW, V, QW, RW, GW, CODES, SCALES,
                S_AT, ZEROS, Z_AT, OVERALL, O_AT, VD, NEXT, ALTERNATES, BIAS, GATE, like.dtype.element_ty,
            )  # fmt: skip


@triton.jit(do_not_specialize=["run"])
def down_tiles(
    act, anchor, header, target, count, pairs, out, run,
    H: tl.constexpr, I: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, STRIDE: tl.constexpr,
    BEFORE: tl.constexpr, S: tl.constexpr, BW: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr,
    GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr,
    Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B * K, H] fp32: each pick's second product and bias, act [B * K, V, I / V]. Grid (distinct experts at most,
    ceil(H / BH / run)). BEFORE: words of a span before its down rows, which `gate_up_tiles` has put into slots."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.program_id(0)
    if expert < tl.load(header):
        slot = tl.multiple_of(tl.load(target + expert), 4)
        num_tokens = tl.load(count + expert)
        for start in range(0, num_tokens, BT):
            lane = start + tl.arange(0, BT)
            live = lane < num_tokens
            pair = tl.load(pairs + expert * STRIDE + lane, mask=live, other=0)
            x = _activations(act + pair * I, live, I // V, S, BW, V)
            for tile in range(tl.program_id(1) * run, tl.minimum((tl.program_id(1) + 1) * run, (H + BH - 1) // BH)):
                rows = tile * BH + tl.arange(0, BH)
                inside = rows < H
                total = _sums(
                    x, anchor, slot + BEFORE, rows, inside, BT, I // V, S, BW, V, QW, RW, GW, CODES, SCALES, S_AT,
                    ZEROS, Z_AT, OVERALL, O_AT,
                )  # fmt: skip
                if BIAS != "":
                    PER: tl.constexpr = 1 if BIAS == "F32" else 2
                    at = as_biases(anchor, BIAS) + (slot + BEFORE + H * RW) * PER + rows
                    total += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None]
                tl.store(out + pair[None, :] * H + rows[:, None], total, mask=inside[:, None] & live[None, :])


@triton.jit
def join_picks(
    picks, weights, residual, shared, switch, normed, adapters, lora_b, low, out,
    K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BH: tl.constexpr,
    SHARED: tl.constexpr, SCALE: tl.constexpr, ROUTED: tl.constexpr, ADAPTED: tl.constexpr, RANK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [B, H]: as `experts.down` of the picks' products [B * K, H] fp32, summed in pick order. Grid (B, ceil(H /
    BH))."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    batch = tl.program_id(0)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = rows < H
    acc = tl.zeros([BH], tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights + batch * K + k + 0 * rows)  # for each row: see `experts.down_biases`
        value = tl.load(picks + (batch * K + k) * H + rows, mask=inside & (weight != 0.0), other=0.0)
        acc += value * weight
    if RANK > 0:
        acc = with_change(acc, tl.load(adapters + batch), lora_b, low, batch, rows, inside, H, RANK)
    with_shared(
        acc, residual, shared, switch, normed, adapters, out, batch, rows, inside, H, HP, SHARED, SCALE, ROUTED, ADAPTED
    )
