"""The gated delta rule: for one token of each row, and for a prompt's chunk.

A value head keeps a state [DV, DK] in fp32. A token scales it by its decay, takes the value that the state has for its
key, and adds the difference to its own value, times beta; its query then reads the state. Queries, keys and values go
through a causal convolution over the last KERNEL tokens and SiLU before, and through a gated norm after. Source: Gated
Delta Networks (Yang et al., 2024), and transformers' `torch_recurrent_gated_delta_rule` for the roundings.

Invariant: of a row with t tokens the state is half t % 2 of its pair, and the convolution's input of token u is entry u
% KERNEL of its ring. A step reads one half and writes the other, and no entry that it reads is the one that it writes;
so a step that runs again for the same token reads the same and writes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _unit(x):
    """x [N] fp32 over its norm."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit
def _activated(acc, dtype: tl.constexpr):
    """SiLU of a convolution's sums, rounded before and after."""
    acc = acc.to(dtype).to(tl.float32)
    return (acc / (1.0 + tl.exp(-acc))).to(dtype).to(tl.float32)


@triton.jit
def _rates(decay, shift, b, a, dtype: tl.constexpr):
    """The factor of the state and beta of a head, from its decay and shift in fp32 and its products b and a."""
    heat = a.to(tl.float32) + shift
    more = tl.exp(tl.minimum(heat, 20.0))
    one = 1.0 + more  # log(1 + more) by Kahan's way: a sum that lost `more` is divided by what it kept
    softplus = tl.where(one == 1.0, more, tl.log(one) * more / tl.where(one == 1.0, 1.0, one - 1.0))
    softplus = tl.where(heat > 20.0, heat, softplus)
    beta = (1.0 / (1.0 + tl.exp(-b.to(tl.float32)))).to(dtype).to(tl.float32)
    return tl.exp(decay * softplus), beta


@triton.jit
def _updated(state, q, k, v, factor, beta):
    """The state [BV, DK] after a token with q and k [DK] and v [BV], and what it puts out [BV]."""
    state = state * factor
    change = (v - tl.sum(state * k[None, :], axis=1)) * beta
    state = state + change[:, None] * k[None, :]
    return state, tl.sum(state * q[None, :], axis=1)


@triton.jit
def _gated_norm(value, weight, gate, eps, DV: tl.constexpr, dtype: tl.constexpr):
    """norm(value [DV]) * silu(gate [DV]), fp32 inputs, rounded as transformers does."""
    value = (value * tl.rsqrt(tl.sum(value * value, axis=0) / DV + eps)).to(dtype).to(tl.float32)
    value = (value * weight.to(tl.float32)).to(dtype).to(tl.float32)
    return (value * (gate / (1.0 + tl.exp(-gate)))).to(dtype)


@triton.jit
def _recent(ring, weight, cols, position, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
    """The convolution's sum over the tokens before `position`, from the row's ring [KERNEL, CHANNELS]."""
    acc = tl.zeros(cols.shape, tl.float32)
    for back in tl.static_range(1, KERNEL):
        place = (position + KERNEL - back) % KERNEL
        value = tl.load(
            ring + place * CHANNELS + cols, mask=cols < tl.where(position >= back, CHANNELS, 0), other=0.0
        ).to(tl.float32)
        acc += value * tl.load(weight + (KERNEL - 1 - back) * CHANNELS + cols).to(tl.float32)
    return acc


@triton.jit
def _newest(acc, given, last, ring, cols, position, writes, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
    """The activated sum with the new token's input times the weights `last`; the input goes into the ring if this
    program `writes` it."""
    value = tl.load(given + cols)
    tl.store(ring + position % KERNEL * CHANNELS + cols, value, mask=cols < tl.where(writes, CHANNELS, 0))
    return _activated(acc + value.to(tl.float32) * last.to(tl.float32), given.dtype.element_ty)


@triton.jit
def delta_step(
    given, conv, decay, shift, norm, rows, lengths, rings, states, parts, arrived, out, eps,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    KERNEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, VALUE_HEADS * DV] of a token of each row, from given [B, products of the layer's input], which are q and
    k [KEY_HEADS * DK], v and the norm's gate [VALUE_HEADS * DV], b and a [VALUE_HEADS].

    conv [KERNEL, q, k and v]; decay, shift [VALUE_HEADS] fp32; norm [DV]. rings [rows, KERNEL, q, k and v] gets the new
    token's inputs and states [rows, 2, VALUE_HEADS, DV, DK] its half. A batch entry with row -1 is skipped. A program
    has BV values of a head; the last of a head to finish joins `parts` [B, VALUE_HEADS, DV] in the norm, if they are
    several. Grid (DV / BV, VALUE_HEADS, B).

    State, ring and weights are loaded before the wait: no kernel of this step but this one writes the first two.
    """
    if PDL:
        gdc_launch_dependents()
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = given.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    WIDTH: tl.constexpr = CHANNELS + VALUE_HEADS * DV + 2 * VALUE_HEADS
    SHARED_BY: tl.constexpr = VALUE_HEADS // KEY_HEADS
    row = tl.load(rows + batch)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    key = tl.arange(0, DK)
    col = part * BV + tl.arange(0, BV)
    q_at = head // SHARED_BY * DK + key
    k_at = KEY_HEADS * DK + q_at
    v_at = 2 * KEY_HEADS * DK + head * DV + col
    pair = states + (row.to(tl.int64) * 2 * VALUE_HEADS + head) * DV * DK
    half = col[:, None] * DK + key[None, :]
    HALF: tl.constexpr = VALUE_HEADS * DV * DK
    state = tl.load(pair + position % 2 * HALF + half, mask=half < tl.minimum(position, 1) * HALF, other=0.0)
    ring = rings + row.to(tl.int64) * KERNEL * CHANNELS
    q = _recent(ring, conv, q_at, position, CHANNELS, KERNEL)
    k = _recent(ring, conv, k_at, position, CHANNELS, KERNEL)
    v = _recent(ring, conv, v_at, position, CHANNELS, KERNEL)
    last = conv + (KERNEL - 1) * CHANNELS
    q_last, k_last, v_last = tl.load(last + q_at), tl.load(last + k_at), tl.load(last + v_at)
    own_decay, own_shift = tl.load(decay + head), tl.load(shift + head)
    full = tl.arange(0, DV)
    weight = tl.load(norm + full)
    if PDL:
        gdc_wait()
    if row >= 0:
        mine = given + batch * WIDTH
        is_first = (part == 0) & (head % SHARED_BY == 0)
        q = _unit(_newest(q, mine, q_last, ring, q_at, position, is_first, CHANNELS, KERNEL)) * DK**-0.5
        k = _unit(_newest(k, mine, k_last, ring, k_at, position, is_first, CHANNELS, KERNEL))
        v = _newest(v, mine, v_last, ring, v_at, position, row >= 0, CHANNELS, KERNEL)
        b_at = mine + CHANNELS + VALUE_HEADS * DV + head
        b, a = tl.load(b_at), tl.load(b_at + VALUE_HEADS)
        factor, beta = _rates(own_decay, own_shift, b, a, dtype)
        state, value = _updated(state, q, k, v, factor, beta)
        tl.store(pair + (position + 1) % 2 * HALF + half, state)
        value = value.to(dtype)
        heads = batch * VALUE_HEADS + head
        gate = tl.load(mine + CHANNELS + head * DV + full).to(tl.float32)
        if BV == DV:
            value = _gated_norm(value.to(tl.float32), weight, gate, eps, DV, dtype)
            tl.store(out + heads * DV + full, value)
        else:
            tl.store(parts + heads * DV + col, value)
            tl.debug_barrier()
            if tl.atomic_add(arrived + heads, 1) == DV // BV - 1:
                tl.store(arrived + heads, 0)
                joined = tl.load(parts + heads * DV + full, cache_modifier=".cg").to(tl.float32)
                joined = _gated_norm(joined, weight, gate, eps, DV, dtype)
                tl.store(out + heads * DV + full, joined)


@triton.jit(do_not_specialize=["start", "num_tokens"])
def convolve_chunk(
    given, conv, ring, new_ring, out, start, num_tokens,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [T, CHANNELS] of a chunk's tokens start ... start + T - 1 from given [T, WIDTH] and, before them, the row's
    ring [KERNEL, CHANNELS]; the last KERNEL inputs go to their places in new_ring. Grid (T, ceil(CHANNELS / BC)).
    """
    token = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = cols < CHANNELS
    value = tl.load(given + token.to(tl.int64) * WIDTH + cols, mask=inside, other=0.0)
    tl.store(
        new_ring + (start + token) % KERNEL * CHANNELS + cols,
        value,
        mask=cols < tl.where(token >= num_tokens - KERNEL, CHANNELS, 0),
    )
    acc = value.to(tl.float32) * tl.load(conv + (KERNEL - 1) * CHANNELS + cols, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(1, KERNEL):
        at = token - back
        place = (start + at + KERNEL) % KERNEL
        is_near = cols < tl.where(at >= 0, CHANNELS, 0)
        near = tl.load(given + at.to(tl.int64) * WIDTH + cols, mask=is_near, other=0.0).to(tl.float32)
        is_old = cols < tl.where((at < 0) & (start + at >= 0), CHANNELS, 0)
        old = tl.load(ring + place * CHANNELS + cols, mask=is_old, other=0.0).to(tl.float32)
        weight = tl.load(conv + (KERNEL - 1 - back) * CHANNELS + cols, mask=inside, other=0.0).to(tl.float32)
        acc += (near + old) * weight
    value = _activated(acc, out.dtype.element_ty).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * CHANNELS + cols, value, mask=inside)


@triton.jit(do_not_specialize=["start", "num_tokens"])
def scan_chunk(
    mixed, given, decay, shift, state, new_state, out, start, num_tokens,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out [T, VALUE_HEADS, DV] of a chunk's tokens from mixed [T, q, k and v] after the convolution and from b and a,
    the last columns of given; state [VALUE_HEADS, DV, DK] is that before the chunk, if start > 0, and new_state gets
    that after it. One token after the other. Grid (DV / BV, VALUE_HEADS).
    """
    head = tl.program_id(1)
    dtype: tl.constexpr = given.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    WIDTH: tl.constexpr = CHANNELS + VALUE_HEADS * DV + 2 * VALUE_HEADS
    key = tl.arange(0, DK)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    q_at = head // (VALUE_HEADS // KEY_HEADS) * DK + key
    k_at = KEY_HEADS * DK + q_at
    v_at = 2 * KEY_HEADS * DK + head * DV + col
    half = head * DV * DK + col[:, None] * DK + key[None, :]
    memory = tl.load(state + half, mask=half < tl.minimum(start, 1) * VALUE_HEADS * DV * DK, other=0.0)
    b_at = given + CHANNELS + VALUE_HEADS * DV + head
    out_at = out + head * DV + col
    own_decay, own_shift = tl.load(decay + head), tl.load(shift + head)
    q_next, k_next, v_next = tl.load(mixed + q_at), tl.load(mixed + k_at), tl.load(mixed + v_at)
    b_next, a_next = tl.load(b_at), tl.load(b_at + VALUE_HEADS)
    for left in range(num_tokens - 1, -1, -1):  # the next token's inputs are loaded while this one's are used
        q = _unit(q_next.to(tl.float32)) * DK**-0.5
        k = _unit(k_next.to(tl.float32))
        v, b, a = v_next.to(tl.float32), b_next, a_next
        mixed += CHANNELS
        b_at += WIDTH
        inside = tl.where(left > 0, CHANNELS, 0)
        q_next = tl.load(mixed + q_at, mask=q_at < inside, other=0.0)
        k_next = tl.load(mixed + k_at, mask=k_at < inside, other=0.0)
        v_next = tl.load(mixed + v_at, mask=v_at < inside, other=0.0)
        b_next = tl.load(b_at, mask=left > 0, other=0.0)
        a_next = tl.load(b_at + VALUE_HEADS, mask=left > 0, other=0.0)
        factor, beta = _rates(own_decay, own_shift, b, a, dtype)
        memory, value = _updated(memory, q, k, v, factor, beta)
        tl.store(out_at, value.to(dtype))
        out_at += VALUE_HEADS * DV
    tl.store(new_state + half, memory)


@triton.jit
def gate_chunk(
    value, given, norm, out, eps,
    GATE_AT: tl.constexpr, WIDTH: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """out = norm(value) * silu(gate), [T, VALUE_HEADS, DV], of each head of each token; the gates are the columns of
    given [T, WIDTH] from GATE_AT. Grid (T, VALUE_HEADS)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    full = tl.arange(0, DV)
    at = (token * VALUE_HEADS + head) * DV + full
    gate = tl.load(given + token * WIDTH + GATE_AT + head * DV + full).to(tl.float32)
    mine = tl.load(value + at).to(tl.float32)
    tl.store(out + at, _gated_norm(mine, tl.load(norm + full), gate, eps, DV, out.dtype.element_ty))
