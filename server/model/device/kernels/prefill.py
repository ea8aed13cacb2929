"""Computes a group of experts for many tokens: one launch each for gate/up and down, with weights at given addresses.

Pairs (token, pick) come sorted by expert; `offsets` [E + 1] bounds each expert's pairs. A program owns a tile of one
expert's weight rows and loops over all of its pairs, so a weight tile is read from memory once, then from L2. Spans
and the switches ALTERNATES, BIAS and GATE are those of `experts`.
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl

from expert_store.paging.kernels import copy_span
from server.model.device.kernels.trunk import gated


@triton.jit(do_not_specialize=["num_spans"], do_not_specialize_on_alignment=["sources", "targets"])
def copy_spans(
    anchor, sources, targets, num_spans,
    SPAN: tl.constexpr, PIECES: tl.constexpr, PROGRAMS: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Copies spans of SPAN elements from sources[g] to targets[g], offsets from the anchor, in PIECES each. One launch
    takes the host no longer than one copy, wherever the spans lie. Grid (PROGRAMS,)."""
    for unit in range(tl.program_id(0), num_spans * PIECES, PROGRAMS):
        span = unit // PIECES
        piece = unit % PIECES
        share = SPAN // PIECES // 8 * 8
        first = piece * share
        size = tl.where(piece == PIECES - 1, SPAN - first, share)
        source = tl.multiple_of(tl.load(sources + span), 4)
        target = tl.multiple_of(tl.load(targets + span), 4)
        copy_span(anchor, source + first, target + first, size, COPY)


# The start of a group's ids may have any alignment: one compiled kernel serves all, so serving never compiles.
@triton.jit(do_not_specialize_on_alignment=["ids", "targets"])
def gate_up_group(
    hidden, anchor, ids, targets, offsets, order, act,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr,
    ALTERNATES: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """act [T * K, I], in sorted order, of the group's experts ids[g], whose spans lie at targets[g].

    hidden [T, H]; order [T * K] int64: sorted position -> pair. H % BK == 0. Grid (group, ceil(I / BI)).
    """
    expert = tl.load(ids + tl.program_id(0))
    span = tl.multiple_of(tl.load(targets + tl.program_id(0)), 8)
    rows = tl.program_id(1) * BI + tl.arange(0, BI)
    lane = tl.arange(0, BT)
    cols = tl.arange(0, BK)
    gate_row = 2 * rows if ALTERNATES else rows
    APART: tl.constexpr = 1 if ALTERNATES else I
    dtype: tl.constexpr = act.dtype.element_ty
    w_at = anchor + span + gate_row[None, :] * H + cols[:, None]
    w_mask = (rows < I)[None, :]
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, BT):
        place = start + lane
        live = place < end
        token = tl.load(order + place, mask=live, other=0) // K
        x_at = hidden + token[:, None] * H + cols[None, :]
        gate = tl.zeros([BT, BI], tl.float32)
        up = tl.zeros([BT, BI], tl.float32)
        for k in range(0, H, BK):
            x = tl.load(x_at + k, mask=live[:, None], other=0.0)
            gate = tl.dot(x, tl.load(w_at + k, mask=w_mask, other=0.0), gate, input_precision="ieee")
            up = tl.dot(x, tl.load(w_at + APART * H + k, mask=w_mask, other=0.0), up, input_precision="ieee")
        if BIAS:
            b_at = anchor + span + 2 * I * H + gate_row
            b_gate = tl.load(b_at, mask=rows < I, other=0.0).to(tl.float32)
            b_up = tl.load(b_at + APART, mask=rows < I, other=0.0).to(tl.float32)
            gate = gate.to(dtype).to(tl.float32) + b_gate[None, :]
            up = up.to(dtype).to(tl.float32) + b_up[None, :]
        out = gated(gate, up, dtype, GATE)
        tl.store(act + place[:, None] * I + rows[None, :], out, mask=live[:, None] & w_mask)


@triton.jit(do_not_specialize_on_alignment=["ids", "targets"])
def down_group(
    act, anchor, ids, targets, offsets, order, out,
    H: tl.constexpr, I: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out [T * K, H], at the pairs' own places, of the group's experts; I % BK == 0. Grid (group, ceil(H / BH))."""
    expert = tl.load(ids + tl.program_id(0))
    span = tl.multiple_of(tl.load(targets + tl.program_id(0)), 8)
    rows = tl.program_id(1) * BH + tl.arange(0, BH)
    lane = tl.arange(0, BT)
    cols = tl.arange(0, BK)
    BEFORE: tl.constexpr = 2 * I * H + (2 * I if BIAS else 0)
    dtype: tl.constexpr = out.dtype.element_ty
    w_at = anchor + span + BEFORE + rows[None, :] * I + cols[:, None]
    w_mask = (rows < H)[None, :]
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, BT):
        place = start + lane
        live = place < end
        pair = tl.load(order + place, mask=live, other=0)
        a_at = act + place.to(tl.int64)[:, None] * I + cols[None, :]
        acc = tl.zeros([BT, BH], tl.float32)
        for k in range(0, I, BK):
            a = tl.load(a_at + k, mask=live[:, None], other=0.0)
            acc = tl.dot(a, tl.load(w_at + k, mask=w_mask, other=0.0), acc, input_precision="ieee")
        if BIAS:
            bias = tl.load(anchor + span + BEFORE + H * I + rows, mask=rows < H, other=0.0).to(tl.float32)
            acc = acc.to(dtype).to(tl.float32) + bias[None, :]
        tl.store(out + pair[:, None] * H + rows[None, :], acc.to(dtype), mask=live[:, None] & w_mask)
