"""Mamba-2: for one token of each row, and for a prompt's chunk.

A head keeps a state [DV, DK] in fp32. A token scales it by exp(decay * dt), and adds dt times the product of its value
and its key; its query then reads the state, and the value times `skip` is added. dt is a softplus of a product of the
layer's input. Queries (C), keys (B) and values (x) go through `kernels.convolution` before; groups of heads share
queries and keys. A gated norm of all heads, or of the heads of each group, comes after. Source: Mamba-2 (Dao and Gu,
2024), and transformers' `mamba2_chunk_scan` for the roundings. Unlike its form for one token, that bounds dt for every
token; so do these.

Invariant: of a row with t tokens the state is half t % 2 of its pair, as that of `kernels.delta` is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.model.device.kernels.convolution import newest, recent
from server.model.device.kernels.delta import softplus


@triton.jit
def _updated(state, q, k, v, t, shift, decay, skip, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The state [BV, DK] after a token with q and k [DK], v [BV] and t, from which dt follows; and what it puts out
    [BV]."""
    dtype: tl.constexpr = t.dtype
    heat = (t.to(tl.float32) + shift).to(dtype).to(tl.float32)
    dt = softplus(heat).to(dtype).to(tl.float32)
    dt = tl.minimum(tl.maximum(dt, LEAST), MOST)
    state = state * tl.exp(decay * dt) + (v * dt)[:, None] * k[None, :]
    return state, tl.sum(state * q[None, :], axis=1) + skip * v


@triton.jit
def _norm(value, weight, eps, N: tl.constexpr):
    """The RMS norm of N elements, fp32; those past N are 0."""
    return value * tl.rsqrt(tl.sum(value * value, axis=0) / N + eps) * weight.to(tl.float32)


@triton.jit
def _with_gate(value, gate):
    gate = gate.to(tl.float32)
    return value * (gate / (1.0 + tl.exp(-gate)))


@triton.jit
def mamba_step(
    given, conv, bias, decay, shift, skip, norm, rows, lengths, rings, states, parts, arrived, out, eps,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    NORMS: tl.constexpr, NP: tl.constexpr, KERNEL: tl.constexpr, BIAS: tl.constexpr, LEAST: tl.constexpr,
    MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, HEADS * DV] of a token of each row, from given [B, products of the layer's input], which are q and k
    [GROUPS * DK], v and the norm's gate [HEADS * DV], and t [HEADS].

    conv [KERNEL, q, k and v] and its bias; decay, shift, skip [HEADS] fp32; norm [HEADS * DV]. rings [rows, KERNEL, q,
    k and v] gets the new token's inputs and states [rows, 2, HEADS, DV, DK] its half. A batch entry with row -1 is
    skipped. A program has BV values of a head; the heads are normed in NORMS parts, and the last of a part to finish
    norms its gated values, in `parts` [B, HEADS * DV] fp32; NP is the power of two from their number. Grid (DV / BV,
    HEADS, B).

    State, ring and weights are loaded before the wait: no kernel of this step but this one writes the first two.
    """
    if PDL:
        gdc_launch_dependents()
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    WIDTH: tl.constexpr = HEADS * DV
    CHANNELS: tl.constexpr = 2 * GROUPS * DK + WIDTH
    SHARED_BY: tl.constexpr = HEADS // GROUPS
    row = tl.load(rows + batch)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    key = tl.arange(0, DK)
    col = part * BV + tl.arange(0, BV)
    group = head // SHARED_BY
    q_at = group * DK + key
    k_at = GROUPS * DK + q_at
    v_at = 2 * GROUPS * DK + head * DV + col
    pair = states + (row.to(tl.int64) * 2 * HEADS + head) * DV * DK
    half = col[:, None] * DK + key[None, :]
    HALF: tl.constexpr = WIDTH * DK
    state = tl.load(pair + position % 2 * HALF + half, mask=half < tl.minimum(position, 1) * HALF, other=0.0)
    ring = rings + row.to(tl.int64) * KERNEL * CHANNELS
    q = recent(ring, conv, q_at, position, CHANNELS, KERNEL)
    k = recent(ring, conv, k_at, position, CHANNELS, KERNEL)
    v = recent(ring, conv, v_at, position, CHANNELS, KERNEL)
    if BIAS:
        q += tl.load(bias + q_at).to(tl.float32)
        k += tl.load(bias + k_at).to(tl.float32)
        v += tl.load(bias + v_at).to(tl.float32)
    last = conv + (KERNEL - 1) * CHANNELS
    q_last, k_last, v_last = tl.load(last + q_at), tl.load(last + k_at), tl.load(last + v_at)
    own_decay, own_shift, own_skip = tl.load(decay + head), tl.load(shift + head), tl.load(skip + head)
    if PDL:
        gdc_wait()
    if row >= 0:
        mine = given + batch * (CHANNELS + WIDTH + HEADS)
        is_first = (part == 0) & (head % SHARED_BY == 0)
        q = newest(q, mine, q_last, ring, q_at, position, is_first, CHANNELS, KERNEL)
        k = newest(k, mine, k_last, ring, k_at, position, is_first, CHANNELS, KERNEL)
        v = newest(v, mine, v_last, ring, v_at, position, row >= 0, CHANNELS, KERNEL)
        t = tl.load(mine + CHANNELS + WIDTH + head)
        state, value = _updated(state, q, k, v, t, own_shift, own_decay, own_skip, LEAST, MOST)
        tl.store(pair + (position + 1) % 2 * HALF + half, state)
        at = head * DV + col
        tl.store(parts + batch * WIDTH + at, _with_gate(value, tl.load(mine + CHANNELS + at)))
        tl.debug_barrier()
        SIZE: tl.constexpr = WIDTH // NORMS
        norm_part = head // (HEADS // NORMS)
        done = arrived + batch * NORMS + norm_part
        if tl.atomic_add(done, 1) == SIZE // BV - 1:
            tl.store(done, 0)
            lane = tl.arange(0, NP)
            all_at = norm_part * SIZE + lane
            joined = tl.load(parts + batch * WIDTH + all_at, mask=lane < SIZE, other=0.0, cache_modifier=".cg")
            joined = _norm(joined, tl.load(norm + all_at, mask=lane < SIZE, other=0.0), eps, SIZE)
            tl.store(out + batch * WIDTH + all_at, joined.to(out.dtype.element_ty), mask=lane < SIZE)


@triton.jit(do_not_specialize=["start", "num_tokens"])
def mamba_chunk(
    mixed, given, decay, shift, skip, state, new_state, out, start, num_tokens,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """out [T, HEADS, DV] fp32 of a chunk's tokens from mixed [T, q, k and v] after the convolution and from t, the last
    columns of given; state [HEADS, DV, DK] is that before the chunk, if start > 0, and new_state gets that after it.
    One token after the other. Grid (DV / BV, HEADS).
    """
    head = tl.program_id(1)
    CHANNELS: tl.constexpr = 2 * GROUPS * DK + HEADS * DV
    GIVEN: tl.constexpr = CHANNELS + HEADS * DV + HEADS
    key = tl.arange(0, DK)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    q_at = head // (HEADS // GROUPS) * DK + key
    k_at = GROUPS * DK + q_at
    v_at = 2 * GROUPS * DK + head * DV + col
    half = head * DV * DK + col[:, None] * DK + key[None, :]
    memory = tl.load(state + half, mask=half < tl.minimum(start, 1) * HEADS * DV * DK, other=0.0)
    t_at = given + CHANNELS + HEADS * DV + head
    out_at = out + head * DV + col
    own_decay, own_shift, own_skip = tl.load(decay + head), tl.load(shift + head), tl.load(skip + head)
    q_next, k_next, v_next, t_next = tl.load(mixed + q_at), tl.load(mixed + k_at), tl.load(mixed + v_at), tl.load(t_at)
    for left in range(num_tokens - 1, -1, -1):  # the next token's inputs are loaded while this one's are used
        q, k, v, t = q_next.to(tl.float32), k_next.to(tl.float32), v_next.to(tl.float32), t_next
        mixed += CHANNELS
        t_at += GIVEN
        inside = tl.where(left > 0, CHANNELS, 0)
        q_next = tl.load(mixed + q_at, mask=q_at < inside, other=0.0)
        k_next = tl.load(mixed + k_at, mask=k_at < inside, other=0.0)
        v_next = tl.load(mixed + v_at, mask=v_at < inside, other=0.0)
        t_next = tl.load(t_at, mask=left > 0, other=0.0)
        memory, value = _updated(memory, q, k, v, t, own_shift, own_decay, own_skip, LEAST, MOST)
        tl.store(out_at, value)
        out_at += HEADS * DV
    tl.store(new_state + half, memory)


@triton.jit
def norm_chunk(
    value, given, norm, out, eps,
    GATE_AT: tl.constexpr, WIDTH: tl.constexpr, GIVEN: tl.constexpr, SIZE: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """out [T, WIDTH] = norm(value [T, WIDTH] fp32 * silu(gate)) of each SIZE elements of each token; the gates are the
    columns of given [T, GIVEN] from GATE_AT; NP is the power of two from SIZE. Grid (T, WIDTH / SIZE)."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, NP)
    at = tl.program_id(1) * SIZE + lane
    inside = lane < SIZE
    gate = tl.load(given + token * GIVEN + GATE_AT + at, mask=inside, other=0.0)
    mine = _with_gate(tl.load(value + token * WIDTH + at, mask=inside, other=0.0), gate)
    mine = _norm(mine, tl.load(norm + at, mask=inside, other=0.0), eps, SIZE)
    tl.store(out + token * WIDTH + at, mine.to(out.dtype.element_ty), mask=inside)
