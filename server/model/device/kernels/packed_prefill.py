"""`prefill` for experts in rows of 4 or 8 bit codes: tiles of codes are decoded, rounded and go to the tensor cores.

Activations lie in planes, as for the kernels of `packed`; a dot takes one plane, so the columns of a product need no
reordering. Codes are rounded to the activations' dtype, as if the experts had been stored in it.
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl

from server.model.device.kernels.packed import as_biases, packed_tile, up_biases, values_of
from server.model.device.kernels.trunk import gated


@triton.jit
def _product(
    acc, x_at, live, anchor, at, rows, inside, start, magic,
    W: tl.constexpr, BW: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr, S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr,
    O_AT: tl.constexpr,
):  # fmt: skip
    """acc [BT, rows] + x [BT, V, W] at the words from `start` on, times those of the rows that begin at word `at`."""
    dtype: tl.constexpr = x_at.dtype.element_ty
    word = start + tl.arange(0, BW)
    run = start // QW + tl.arange(0, BW // QW)
    tile = packed_tile(
        anchor, at, rows, inside, run, run * QW < W, QW, RW, GW, CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT
    )
    for part in tl.static_range(V):
        x = tl.load(x_at + part * W + word[None, :], mask=live[:, None] & (word < W)[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(values_of(tile, magic, part, CODES, dtype)), acc, input_precision="ieee")
    return acc


# The start of a group's ids may have any alignment: one compiled kernel serves all, so serving never compiles.
@triton.jit(do_not_specialize_on_alignment=["ids", "targets"])
def gate_up_group(
    hidden, anchor, ids, targets, offsets, order, act, magic,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
    VD: tl.constexpr, V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr,
    S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
    ALTERNATES: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """`prefill.gate_up_group`: hidden [T, V, H / V] -> act [T * K, VD, I / VD], in sorted order."""
    dtype: tl.constexpr = act.dtype.element_ty
    expert = tl.load(ids + tl.program_id(0))
    span = tl.multiple_of(tl.load(targets + tl.program_id(0)), 4)
    rows = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = rows < I
    gate_row = 2 * rows if ALTERNATES else rows
    APART: tl.constexpr = 1 if ALTERNATES else I
    lane = tl.arange(0, BT)
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, BT):
        place = start + lane
        live = place < end
        token = tl.load(order + place, mask=live, other=0) // K
        x_at = hidden + token[:, None] * H
        gate = tl.zeros([BT, BI], tl.float32)
        up = tl.zeros([BT, BI], tl.float32)
        for first in range(0, H // V, BW):
            gate = _product(
                gate, x_at, live, anchor, span, gate_row, inside, first, magic, H // V, BW, V, QW, RW, GW, CODES,
                SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT,
            )  # fmt: skip
            up = _product(
                up, x_at, live, anchor, span + APART * RW, gate_row, inside, first, magic, H // V, BW, V, QW, RW, GW,
                CODES, SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT,
            )  # fmt: skip
        if BIAS != "":
            b_gate, b_up = up_biases(anchor, span + 2 * I * RW, gate_row, inside, APART, BIAS)
            gate = gate.to(dtype).to(tl.float32) + b_gate[None, :]
            up = up.to(dtype).to(tl.float32) + b_up[None, :]
        out = gated(gate, up, dtype, GATE)
        at = place.to(tl.int64)[:, None] * I + (rows % VD * (I // VD) + rows // VD)[None, :]
        tl.store(act + at, out, mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize_on_alignment=["ids", "targets"])
def down_group(
    act, anchor, ids, targets, offsets, order, out, magic,
    H: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BEFORE: tl.constexpr,
    V: tl.constexpr, QW: tl.constexpr, RW: tl.constexpr, GW: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr,
    S_AT: tl.constexpr, ZEROS: tl.constexpr, Z_AT: tl.constexpr, OVERALL: tl.constexpr, O_AT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """`prefill.down_group`: act [T * K, V, I / V] -> out [T * K, H], at the pairs' own places. BEFORE: words of a span
    before its down rows."""
    expert = tl.load(ids + tl.program_id(0))
    span = tl.multiple_of(tl.load(targets + tl.program_id(0)), 4)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = rows < H
    lane = tl.arange(0, BT)
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, BT):
        place = start + lane
        live = place < end
        pair = tl.load(order + place, mask=live, other=0)
        a_at = act + place.to(tl.int64)[:, None] * I
        acc = tl.zeros([BT, BH], tl.float32)
        for first in range(0, I // V, BW):
            acc = _product(
                acc, a_at, live, anchor, span + BEFORE, rows, inside, first, magic, I // V, BW, V, QW, RW, GW, CODES,
                SCALES, S_AT, ZEROS, Z_AT, OVERALL, O_AT,
            )  # fmt: skip
        if BIAS != "":
            PER: tl.constexpr = 1 if BIAS == "F32" else 2
            bias_at = as_biases(anchor, BIAS) + (span + BEFORE + H * RW) * PER + rows
            acc = acc.to(out.dtype.element_ty).to(tl.float32)
            acc += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        mask = live[:, None] & inside[None, :]
        tl.store(out + pair[:, None] * H + rows[None, :], acc.to(out.dtype.element_ty), mask=mask)
