"""The routed experts of one layer in rows of 4 or 8 bit codes (`expert_store.encoding`), multiplied as they are.

The kernels are those of `experts` for such rows: the same work list, the same order, the same fetchers. A row is read
in words of V codes, in runs of QW words that share a scale. The activations lie in planes, in bf16 or fp32: plane p
holds the elements that the p-th codes of all words multiply, side by side, times `factor`; so codes and activations are
both read in whole lines. A code becomes a float32 by placing its bits into one, without a conversion; `factor` and
`rest` undo the power of two that it is off by. A warp holds whole rows: sums cross lanes, not warps. Sums are fp32 over
exact products. Invariant: as in `experts`.
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expert_store.paging.kernels import FETCHED
from server.model.device.kernels.experts import down_biases, fetch_rest, fetch_tile, with_shared
from server.model.device.kernels.trunk import gated, with_change

INT4 = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP4 = tl.constexpr(2)
FP8 = tl.constexpr(3)
MAGIC = 0x4B000000
"""The bits of 2 ** 23, whose mantissa takes an integer as it is. Kernels get it as an argument: as a constant, it would
cost an instruction more for each code, since no instruction takes two."""
_LIFT = tl.constexpr(float(2**60))  # keeps products with tiny floats out of the subnormal range


@triton.jit
def high_halves(words):
    """The upper halves of int32 words, shifted without their sign."""
    return (words.to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)


@triton.jit
def codes_as_floats(words, zero, magic, part: tl.constexpr, CODES: tl.constexpr):
    """The codes at place `part` of int32 words, less their zero points, in float32; `factor` and `rest` are left.

    E4M3's NaN reads as 480 or -480.
    """
    if CODES == INT4:
        field = (high_halves(words) if part >= 4 else words) & (0xF << (4 * (part % 4)))
        return (field | magic).to(tl.float32, bitcast=True) - (8388608.0 + zero * (1 << (4 * (part % 4))))
    elif CODES == INT8:
        field = (high_halves(words) if part >= 2 else words) & (0xFF << (8 * (part % 2)))
        return (field | magic).to(tl.float32, bitcast=True) - (8388608.0 + zero * (1 << (8 * (part % 2))))
    elif CODES == FP4:  # the sign goes to its place, and an arithmetic shift takes exponent and mantissa to theirs
        places = (words << (28 - 4 * part) if part < 7 else words) >> 6
        return (places & -0x7E400000).to(tl.float32, bitcast=True)
    else:
        places = (words << (24 - 8 * part) if part < 3 else words) >> 4
        return (places & -0x78100000).to(tl.float32, bitcast=True)


@triton.jit
def factor(part, CODES: tl.constexpr):
    """float32 that the activations at place `part`, a tensor, are multiplied by: a power of two."""
    if CODES == INT4:
        return ((127 - 4 * (part % 4)) << 23).to(tl.float32, bitcast=True)
    elif CODES == INT8:
        return ((127 - 8 * (part % 2)) << 23).to(tl.float32, bitcast=True)
    else:
        return (part * 0 + (187 << 23)).to(tl.float32, bitcast=True)  # 2 ** 60, as a tensor like the others


@triton.jit
def rest(CODES: tl.constexpr):
    """Sums of products are multiplied by it."""
    if CODES == FP4:
        return 7.378697629483821e19  # 2 ** 66
    elif CODES == FP8:
        return 1.152921504606847e18  # 2 ** 60
    else:
        return 1.0


@triton.jit
def scales_of(
    anchor, row, group, mask, SCALES: tl.constexpr, S_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr
):
    """float32 scales of groups of rows; `row` is the rows' word offset, S_AT and O_AT are bytes within a row."""
    if SCALES == "F32":
        scale = tl.load(anchor.to(tl.pointer_type(tl.float32)) + row + S_AT // 4 + group, mask=mask, other=0.0)
    elif SCALES == "F16":
        scale = tl.load(anchor.to(tl.pointer_type(tl.float16)) + 2 * row + S_AT // 2 + group, mask=mask, other=0.0)
    elif SCALES == "BF16":
        scale = tl.load(anchor.to(tl.pointer_type(tl.bfloat16)) + 2 * row + S_AT // 2 + group, mask=mask, other=0.0)
    elif SCALES == "F8_E8M0":
        code = tl.load(anchor.to(tl.pointer_type(tl.uint8)) + 4 * row + S_AT + group, mask=mask, other=0).to(tl.int32)
        scale = tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)
    else:
        code = tl.load(anchor.to(tl.pointer_type(tl.uint8)) + 4 * row + S_AT + group, mask=mask, other=0).to(tl.int32)
        scale = codes_as_floats(code, 0.0, 0, 0, FP8) * _LIFT * _LIFT
    scale = scale.to(tl.float32)
    if OVERALL != 0:
        overall = tl.load(anchor.to(tl.pointer_type(tl.float32)) + row + O_AT // 4, mask=mask, other=1.0)
        scale = scale * overall if OVERALL == 1 else tl.div_rn(scale, overall)
    return scale


@triton.jit
def zeros_of(anchor, row, group, mask, CODES: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr):
    """float32 zero points; the middle of the codes where the encoding has none."""
    if ZEROS == "U8":
        return tl.load(
            anchor.to(tl.pointer_type(tl.uint8)) + 4 * row + Z_AT + group, mask=mask, other=0
        ).to(tl.float32)  # fmt: skip
    elif ZEROS == "I16":
        return tl.load(
            anchor.to(tl.pointer_type(tl.int16)) + 2 * row + Z_AT // 2 + group, mask=mask, other=0
        ).to(tl.float32)  # fmt: skip
    else:
        return 8.0 if CODES == INT4 else 128.0


@triton.jit
def packed_tile(
    anchor, at, rows, inside, run, live,
    QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
):  # fmt: skip
    """Words [rows, runs, QW], scales and zero points [rows, runs] of rows that begin at word `at` [1, runs]."""
    mask = inside[:, None] & live[None, :]
    row = at + rows[:, None] * RW
    group = (run * QW // GW)[None, :]
    first = row + run[None, :] * QW
    codes = tl.load(
        anchor + first[:, :, None] + tl.arange(0, QW)[None, None, :], mask=mask[:, :, None], other=0,
        cache_modifier=".cg",
    )  # fmt: skip
    scale = scales_of(anchor, row, group, mask, SCALES, S_AT, OVERALL, O_AT)
    zero = tl.zeros(mask.shape, tl.float32)
    if CODES <= INT8:
        zero += zeros_of(anchor, row, group, mask, CODES, ZEROS, Z_AT)
    return codes, scale, zero


@triton.jit
def as_biases(anchor, BIAS: tl.constexpr):
    """The words at `anchor` as biases of the dtype BIAS."""
    if BIAS == "F32":
        return anchor.to(tl.pointer_type(tl.float32))
    elif BIAS == "F16":
        return anchor.to(tl.pointer_type(tl.float16))
    else:
        return anchor.to(tl.pointer_type(tl.bfloat16))


@triton.jit
def up_biases(anchor, word, gate_row, inside, APART: tl.constexpr, BIAS: tl.constexpr):
    """float32 biases [rows] of gate rows, and of the up rows APART rows after them; they begin at a word of a span."""
    PER: tl.constexpr = 1 if BIAS == "F32" else 2
    at = as_biases(anchor, BIAS) + word * PER + gate_row
    b_gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return b_gate, tl.load(at + APART, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums(tile, x, at, live, magic, W: tl.constexpr, V: tl.constexpr, CODES: tl.constexpr):
    """float32 [rows, runs]: a tile times the activations x [V, W], whose runs begin at `at` [runs]."""
    codes, scale, zero = tile
    total = tl.zeros(codes.shape, tl.float32)
    word = at[:, None] + tl.arange(0, codes.shape[2])[None, :]
    for part in tl.static_range(V):
        value = tl.load(x + part * W + word, mask=live[:, None], other=0.0).to(tl.float32)
        total += codes_as_floats(codes, zero[:, :, None], magic, part, CODES) * value[None, :, :]
    return tl.sum(total, axis=2) * scale


@triton.jit
def _gate_up_tile(
    planes, anchor, slot, origin, act, count, pairs, expert, tile, magic,
    ONE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, STRIDE: tl.constexpr,
    RUNS: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr,
    O_AT: tl.constexpr, VD: tl.constexpr, NEXT: tl.constexpr, ALTERNATES: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """act [pair, tile rows], in planes of VD, for every token of one expert; see `experts._gate_up_tile`. The span at
    `origin` gives the biases."""
    rows = tile * BI + tl.arange(0, BI)
    inside = rows < I
    gate_row = 2 * rows if ALTERNATES else rows
    APART: tl.constexpr = 1 if ALTERNATES else I
    if BIAS != "":
        b_gate, b_up = up_biases(anchor, origin + 2 * I * RW, gate_row, inside, APART, BIAS)
    W: tl.constexpr = H // V
    STEPS: tl.constexpr = (W // QW + RUNS - 1) // RUNS
    gates = ()
    ups = ()
    for s in tl.static_range(STEPS):
        run = s * RUNS + tl.arange(0, RUNS)
        live = run * QW < W
        gate = packed_tile(
            anchor, slot, gate_row, inside, run, live, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT
        )
        up = packed_tile(
            anchor, slot + APART * RW, gate_row, inside, run, live, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT,
            OVERALL, O_AT,
        )  # fmt: skip
        gates = gates + (gate,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
        ups = ups + (up,)  # type: ignore[assignment]  # noqa: RUF005
    place = rows % VD * (I // VD) + rows // VD
    scale = factor(rows % VD, NEXT)
    for token in range(1 if ONE else tl.load(count + expert)):
        pair = tl.load(pairs + expert * STRIDE + token)
        x = planes if ONE else planes + pair // K * H
        gate_sums = tl.zeros([BI, RUNS], tl.float32)
        up_sums = tl.zeros([BI, RUNS], tl.float32)
        for s in tl.static_range(STEPS):
            run = s * RUNS + tl.arange(0, RUNS)
            gate_sums += _sums(gates[s], x, run * QW, run * QW < W, magic, W, V, CODES)
            up_sums += _sums(ups[s], x, run * QW, run * QW < W, magic, W, V, CODES)
        gate_sum = tl.sum(gate_sums, axis=1) * rest(CODES)
        up_sum = tl.sum(up_sums, axis=1) * rest(CODES)
        if BIAS != "":
            gate_sum = gate_sum.to(DTYPE).to(tl.float32) + b_gate
            up_sum = up_sum.to(DTYPE).to(tl.float32) + b_up
        product = gated(gate_sum, up_sum, DTYPE, GATE).to(tl.float32) * scale
        tl.store(act + pair * I + place, product, mask=inside)


@triton.jit
def gate_up(
    planes, anchor, header, target, source, count, pairs, act, like, magic,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, STRIDE: tl.constexpr,
    FETCHERS: tl.constexpr, COPY: tl.constexpr, ONE: tl.constexpr, REST: tl.constexpr, MOST: tl.constexpr,
    RUNS: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr,
    O_AT: tl.constexpr, VD: tl.constexpr, NEXT: tl.constexpr, ALTERNATES: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`experts.gate_up` for packed rows: planes [B, V, H / V] -> act [B * K, VD, I / VD] for the codes NEXT of `down`,
    rounded to the dtype of `like`. RUNS: runs that a warp takes at a time. REST: words of a span after the gate_up
    rows, which are fetched here too; MOST: distinct experts that there may be; BIAS: dtype of the biases, "" for none.
    """
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
            _gate_up_tile(
                planes, anchor, slot, origin, act, count, pairs, expert, tile, magic, ONE, K, H, I, BI, STRIDE,
                RUNS, V, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT, VD, NEXT,
                ALTERNATES, BIAS, GATE, like.dtype.element_ty,
            )  # fmt: skip
        fetch_rest(anchor, source, target, program, num_miss, TILES, FETCHERS, 2 * I * RW, REST, COPY, 4)
    else:
        expert = (program - FETCHERS) // TILES + num_miss
        tile = (program - FETCHERS) % TILES
        slot = tl.multiple_of(tl.load(target + expert, mask=expert < MOST, other=0), 4)
        if expert < num_distinct:
            _gate_up_tile(
                planes, anchor, slot, slot, act, count, pairs, expert, tile, magic, ONE, K, H, I, BI, STRIDE,
                RUNS, V, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT, VD, NEXT,
                ALTERNATES, BIAS, GATE, like.dtype.element_ty,
            )  # fmt: skip


@triton.jit
def _down_tile(
    anchor, pair_target, first, flat, rows, inside, MISSING: tl.constexpr,
    K: tl.constexpr, Q: tl.constexpr, BEFORE: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr,
    OVERALL: tl.constexpr, O_AT: tl.constexpr,
):  # fmt: skip
    """A tile of the picks' down rows side by side, Q runs each: of resident experts, or of those just fetched."""
    slot = tl.load(pair_target + first + flat // Q, mask=flat < K * Q, other=-1)
    missing = slot >= FETCHED
    live = missing if MISSING else (slot >= 0) & (missing == 0)
    place = tl.multiple_of(tl.where(missing, slot - FETCHED, slot), 4)
    return packed_tile(
        anchor, place[None, :] + BEFORE, rows, inside, flat % Q, live, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT,
        OVERALL, O_AT,
    )  # fmt: skip


@triton.jit
def down(
    act, anchor, pair_target, weights, residual, shared, switch, normed, adapters, lora_b, low, out, magic,
    K: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, I: tl.constexpr, BH: tl.constexpr, RUNS: tl.constexpr,
    SHARED: tl.constexpr, PAGED: tl.constexpr, BEFORE: tl.constexpr,
    V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ROUTED: tl.constexpr, ADAPTED: tl.constexpr, RANK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`experts.down` for packed rows: act [B * K, V, I / V]. RUNS: runs that a warp takes at a time; BEFORE: words of a
    span before its down rows. Rows of resident experts are read before the wait, those of fetched ones after it."""
    if PDL:
        gdc_launch_dependents()
    batch = tl.program_id(0)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = rows < H
    first = batch * K
    W: tl.constexpr = I // V
    Q: tl.constexpr = W // QW
    STEPS: tl.constexpr = (K * Q + RUNS - 1) // RUNS
    tiles = ()
    for s in tl.static_range(STEPS):
        flat = s * RUNS + tl.arange(0, RUNS)
        tile = _down_tile(
            anchor, pair_target, first, flat, rows, inside, False, K, Q, BEFORE, QW, RW, GW, CODES, SCALES, S_AT,
            ZEROS, Z_AT, OVERALL, O_AT,
        )  # fmt: skip
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no starred tuples)
    if PDL:
        gdc_wait()
    sums = tl.zeros([BH, RUNS], tl.float32)
    for s in tl.static_range(STEPS):
        flat = s * RUNS + tl.arange(0, RUNS)
        tile = tiles[s]
        if PAGED:
            late = _down_tile(
                anchor, pair_target, first, flat, rows, inside, True, K, Q, BEFORE, QW, RW, GW, CODES, SCALES, S_AT,
                ZEROS, Z_AT, OVERALL, O_AT,
            )  # fmt: skip
            # A run is in one of the two, and reads as zeros in the other, or as the middle of the codes in both.
            tile = (tile[0] | late[0], tile[1] + late[1], tl.maximum(tile[2], late[2]))
        weight = tl.load(weights + first + flat // Q, mask=flat < K * Q, other=0.0)
        at = flat // Q * I + flat % Q * QW
        sums += _sums(tile, act + first * I, at, weight != 0.0, magic, W, V, CODES) * weight[None, :]
    acc = tl.sum(sums, axis=1) * rest(CODES)
    if BIAS != "":
        PER: tl.constexpr = 1 if BIAS == "F32" else 2
        biases = as_biases(anchor, BIAS)
        acc += down_biases(biases, pair_target, weights, first, rows, inside, (BEFORE + H * RW) * PER, PER, K)
    if RANK > 0:
        acc = with_change(acc, tl.load(adapters + batch), lora_b, low, batch, rows, inside, H, RANK)
    with_shared(
        acc, residual, shared, switch, normed, adapters, out, batch, rows, inside, H, HP, SHARED, SCALE, ROUTED, ADAPTED
    )


@triton.jit
def values_of(tile, magic, part: tl.constexpr, CODES: tl.constexpr, dtype: tl.constexpr):
    """The values [rows, words] at place `part` of a tile's words, rounded to `dtype`."""
    codes, scale, zero = tile
    as_tensor = part + 0 * magic  # a constant has no dtype to be cast from
    value = codes_as_floats(codes, zero[:, :, None], magic, part, CODES) * factor(as_tensor, CODES)
    value *= rest(CODES) * scale[:, :, None]
    return tl.reshape(value, [codes.shape[0], codes.shape[1] * codes.shape[2]]).to(dtype)
