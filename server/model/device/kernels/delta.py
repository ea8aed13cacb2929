"""The gated delta rule: for one token of each row, and for a prompt's chunk.

A value head keeps a state [DV, DK] in fp32. A token scales it by its decay, takes the value that the state has for its
key, and adds the difference to its own value, times beta; its query then reads the state. The decay is one number of a
head, or one of each element of its keys (BY_CHANNEL). Queries, keys and values go through a causal convolution over the
last KERNEL tokens and SiLU before, and through a gated norm after. Source: Gated Delta Networks (Yang et al., 2024),
Kimi Linear (2025) for decays by channel, and transformers' `torch_recurrent_gated_delta_rule` and
`recurrent_kimi_delta_attention` for the roundings.

Invariant: of a row with t tokens the state is half t % 2 of its pair. A step reads one half and writes the other; so a
step that runs again for the same token reads the same and writes the same, as with the ring of `kernels.convolution`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from server.model.device.kernels.convolution import newest, recent


@triton.jit
def _unit(x):
    """x [N] fp32 over its norm."""
    return x * tl.rsqrt(tl.sum(x * x, axis=0) + 1e-6)


@triton.jit
def softplus(heat):
    """log(1 + exp(heat)) in fp32."""
    more = tl.exp(tl.minimum(heat, 20.0))
    one = 1.0 + more  # log(1 + more) by Kahan's way: a sum that lost `more` is divided by what it kept
    less = tl.where(one == 1.0, more, tl.log(one) * more / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.where(heat > 20.0, heat, less)


@triton.jit
def _rates(decay, shift, b, a, BOUND: tl.constexpr, ROUNDS: tl.constexpr, dtype: tl.constexpr):
    """The factors of a head's state, of the shape of `a`, and its beta, from its decay and shift in fp32 and its
    products a and b. A factor's logarithm is decay * softplus(a + shift), or BOUND * sigmoid(-decay * (a + shift)),
    and is rounded to `dtype` if it ROUNDS."""
    heat = a.to(tl.float32) + shift
    rate = BOUND / (1.0 + tl.exp(tl.minimum(decay * heat, 80.0))) if BOUND != 0.0 else decay * softplus(heat)
    if ROUNDS:
        rate = rate.to(dtype).to(tl.float32)
    beta = (1.0 / (1.0 + tl.exp(-b.to(tl.float32)))).to(dtype).to(tl.float32)
    return tl.exp(rate), beta


@triton.jit
def _updated(state, q, k, v, factor, beta, BY_CHANNEL: tl.constexpr):
    """The state [BV, DK] after a token with q and k [DK] and v [BV], and what it puts out [BV]; `factor` is a scalar,
    or [DK] if BY_CHANNEL."""
    state = state * (factor[None, :] if BY_CHANNEL else factor)
    change = (v - tl.sum(state * k[None, :], axis=1)) * beta
    state = state + change[:, None] * k[None, :]
    return state, tl.sum(state * q[None, :], axis=1)


@triton.jit
def _gated_norm(value, weight, gate, eps, DV: tl.constexpr, SIGMOID: tl.constexpr, dtype: tl.constexpr):
    """norm(value [DV]) * silu(gate [DV]), or sigmoid(gate), value and gate in fp32, rounded as transformers does: only
    once, at the end, if weights are in fp32."""
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / DV + eps)
    if weight.dtype == tl.float32:
        value = value * weight
    else:
        value = value.to(dtype).to(tl.float32)
        value = (value * weight.to(tl.float32)).to(dtype).to(tl.float32)
    factor = 1.0 if SIGMOID else gate
    return (value * (factor / (1.0 + tl.exp(-gate)))).to(dtype)


@triton.jit
def delta_step(
    given, gates, conv, decay, shift, norm, rows, lengths, rings, states, parts, arrived, out, eps,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    KERNEL: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BY_CHANNEL: tl.constexpr, BOUND: tl.constexpr,
    ROUNDS: tl.constexpr, SIGMOID: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, VALUE_HEADS * DV] of a token of each row, from given [B, WIDTH], whose first columns are q and k
    [KEY_HEADS * DK] and v [VALUE_HEADS * DV] and whose last are b [VALUE_HEADS], and from gates, whose rows are STRIDE
    apart: the norm's gate [VALUE_HEADS * DV], then a [VALUE_HEADS], or [VALUE_HEADS * DK] if BY_CHANNEL.

    conv [KERNEL, q, k and v]; decay [VALUE_HEADS] and shift, of the size of a, fp32; norm [DV]. rings [rows, KERNEL, q,
    k and v] gets the new token's inputs and states [rows, 2, VALUE_HEADS, DV, DK] its half. A batch entry with row -1
    is skipped. BOUND, ROUNDS: see `_rates`; SIGMOID: see `_gated_norm`. A program has BV values of a head; the last of
    a head to finish joins `parts` [B, VALUE_HEADS, DV] in the norm, if they are several. Grid (DV / BV, VALUE_HEADS,
    B).

    State, ring and weights are loaded before the wait: no kernel of this step but this one writes the first two.
    """
    if PDL:
        gdc_launch_dependents()
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = given.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    SHARED_BY: tl.constexpr = VALUE_HEADS // KEY_HEADS
    row = tl.load(rows + batch)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    key = tl.arange(0, DK)
    col = part * BV + tl.arange(0, BV)
    q_at = head // SHARED_BY * DK + key
    k_at = KEY_HEADS * DK + q_at
    v_at = 2 * KEY_HEADS * DK + head * DV + col
    rate_at = head * DK + key if BY_CHANNEL else head
    pair = states + (row.to(tl.int64) * 2 * VALUE_HEADS + head) * DV * DK
    half = col[:, None] * DK + key[None, :]
    HALF: tl.constexpr = VALUE_HEADS * DV * DK
    state = tl.load(pair + position % 2 * HALF + half, mask=half < tl.minimum(position, 1) * HALF, other=0.0)
    ring = rings + row.to(tl.int64) * KERNEL * CHANNELS
    q = recent(ring, conv, q_at, position, CHANNELS, KERNEL)
    k = recent(ring, conv, k_at, position, CHANNELS, KERNEL)
    v = recent(ring, conv, v_at, position, CHANNELS, KERNEL)
    last = conv + (KERNEL - 1) * CHANNELS
    q_last, k_last, v_last = tl.load(last + q_at), tl.load(last + k_at), tl.load(last + v_at)
    own_decay, own_shift = tl.load(decay + head), tl.load(shift + rate_at)
    full = tl.arange(0, DV)
    weight = tl.load(norm + full)
    if PDL:
        gdc_wait()
    if row >= 0:
        mine = given + batch * WIDTH
        own_gates = gates + batch * STRIDE
        is_first = (part == 0) & (head % SHARED_BY == 0)
        q = _unit(newest(q, mine, q_last, ring, q_at, position, is_first, CHANNELS, KERNEL)) * DK**-0.5
        k = _unit(newest(k, mine, k_last, ring, k_at, position, is_first, CHANNELS, KERNEL))
        v = newest(v, mine, v_last, ring, v_at, position, row >= 0, CHANNELS, KERNEL)
        b, a = tl.load(mine + WIDTH - VALUE_HEADS + head), tl.load(own_gates + VALUE_HEADS * DV + rate_at)
        factor, beta = _rates(own_decay, own_shift, b, a, BOUND, ROUNDS, dtype)
        state, value = _updated(state, q, k, v, factor, beta, BY_CHANNEL)
        tl.store(pair + (position + 1) % 2 * HALF + half, state)
        value = value.to(dtype)
        heads = batch * VALUE_HEADS + head
        gate = tl.load(own_gates + head * DV + full).to(tl.float32)
        if BV == DV:
            value = _gated_norm(value.to(tl.float32), weight, gate, eps, DV, SIGMOID, dtype)
            tl.store(out + heads * DV + full, value)
        else:
            tl.store(parts + heads * DV + col, value)
            tl.debug_barrier()
            if tl.atomic_add(arrived + heads, 1) == DV // BV - 1:
                tl.store(arrived + heads, 0)
                joined = tl.load(parts + heads * DV + full, cache_modifier=".cg").to(tl.float32)
                joined = _gated_norm(joined, weight, gate, eps, DV, SIGMOID, dtype)
                tl.store(out + heads * DV + full, joined)


@triton.jit(do_not_specialize=["start", "num_tokens"])
def scan_chunk(
    mixed, given, gates, decay, shift, state, new_state, out, start, num_tokens,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, BY_CHANNEL: tl.constexpr, BOUND: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """out [T, VALUE_HEADS, DV] of a chunk's tokens from mixed [T, q, k and v] after the convolution, from b, the last
    columns of given, and from a behind the gates in `gates`, both as in `delta_step`; state [VALUE_HEADS, DV, DK] is
    that before the chunk, if start > 0, and new_state gets that after it. One token after the other. Grid (DV / BV,
    VALUE_HEADS).
    """
    head = tl.program_id(1)
    dtype: tl.constexpr = given.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * DK + VALUE_HEADS * DV
    key = tl.arange(0, DK)
    col = tl.program_id(0) * BV + tl.arange(0, BV)
    q_at = head // (VALUE_HEADS // KEY_HEADS) * DK + key
    k_at = KEY_HEADS * DK + q_at
    v_at = 2 * KEY_HEADS * DK + head * DV + col
    rate_at = head * DK + key if BY_CHANNEL else head
    half = head * DV * DK + col[:, None] * DK + key[None, :]
    memory = tl.load(state + half, mask=half < tl.minimum(start, 1) * VALUE_HEADS * DV * DK, other=0.0)
    b_at = given + WIDTH - VALUE_HEADS + head
    a_at = gates + VALUE_HEADS * DV + rate_at
    out_at = out + head * DV + col
    own_decay, own_shift = tl.load(decay + head), tl.load(shift + rate_at)
    q_next, k_next, v_next = tl.load(mixed + q_at), tl.load(mixed + k_at), tl.load(mixed + v_at)
    b_next, a_next = tl.load(b_at), tl.load(a_at)
    for left in range(num_tokens - 1, -1, -1):  # the next token's inputs are loaded while this one's are used
        q = _unit(q_next.to(tl.float32)) * DK**-0.5
        k = _unit(k_next.to(tl.float32))
        v, b, a = v_next.to(tl.float32), b_next, a_next
        mixed += CHANNELS
        b_at += WIDTH
        a_at += STRIDE
        inside = tl.where(left > 0, CHANNELS, 0)
        q_next = tl.load(mixed + q_at, mask=q_at < inside, other=0.0)
        k_next = tl.load(mixed + k_at, mask=k_at < inside, other=0.0)
        v_next = tl.load(mixed + v_at, mask=v_at < inside, other=0.0)
        b_next = tl.load(b_at, mask=left > 0, other=0.0)
        a_next = tl.load(a_at, mask=rate_at < tl.where(left > 0, VALUE_HEADS * DK, 0), other=0.0)
        factor, beta = _rates(own_decay, own_shift, b, a, BOUND, ROUNDS, dtype)
        memory, value = _updated(memory, q, k, v, factor, beta, BY_CHANNEL)
        tl.store(out_at, value.to(dtype))
        out_at += VALUE_HEADS * DV
    tl.store(new_state + half, memory)


@triton.jit
def gate_chunk(
    value, gates, norm, out, eps,
    STRIDE: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """out = norm(value) * silu(gate), or sigmoid(gate), [T, VALUE_HEADS, DV], of each head of each token; gates are the
    first columns of `gates`, whose rows are STRIDE apart. Grid (T, VALUE_HEADS)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    full = tl.arange(0, DV)
    at = (token * VALUE_HEADS + head) * DV + full
    gate = tl.load(gates + token * STRIDE + head * DV + full).to(tl.float32)
    mine = tl.load(value + at).to(tl.float32)
    weight = tl.load(norm + full)
    tl.store(out + at, _gated_norm(mine, weight, gate, eps, DV, SIGMOID, out.dtype.element_ty))
