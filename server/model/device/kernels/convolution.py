"""Causal convolutions over a row's last KERNEL tokens, channel by channel: for one token of each row, and for a chunk.

The layers that keep a state share them: gated delta nets, Mamba-2, and short convolutions between two gates, which are
all that their layer does. Source: transformers' `causal_conv1d_fn` for the roundings, `modeling_lfm2_moe.py`.

Invariant: the convolution's input of token u of a row is entry u % KERNEL of the row's ring. No entry that a step reads
is the one that it writes; so a step that runs again for the same token reads the same and writes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def activated(acc, weights: tl.constexpr, dtype: tl.constexpr):
    """SiLU of a convolution's sums, rounded to the dtype of its weights before and to `dtype` after."""
    acc = acc.to(weights).to(tl.float32)
    return (acc / (1.0 + tl.exp(-acc))).to(dtype).to(tl.float32)


@triton.jit
def recent(ring, weight, cols, position, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
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
def with_token(acc, value, last, ring, cols, position, writes, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
    """The sum with the new token's input times the weights `last`; the input goes into the ring if this program
    `writes` it."""
    tl.store(ring + position % KERNEL * CHANNELS + cols, value, mask=cols < tl.where(writes, CHANNELS, 0))
    return acc + value.to(tl.float32) * last.to(tl.float32)


@triton.jit
def newest(acc, given, last, ring, cols, position, writes, CHANNELS: tl.constexpr, KERNEL: tl.constexpr):
    """The activated sum with the new token's input, which is in `given`; see `with_token`."""
    acc = with_token(acc, tl.load(given + cols), last, ring, cols, position, writes, CHANNELS, KERNEL)
    return activated(acc, last.dtype, given.dtype.element_ty)


@triton.jit
def _gated(value, gate):
    """The product in fp32, rounded to the inputs' dtype."""
    return (value.to(tl.float32) * gate.to(tl.float32)).to(value.dtype)


@triton.jit
def convolve_step(
    given, conv, bias, rows, lengths, rings, out,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, CHANNELS] of a token of each row, a short convolution: from given [B, 3 * CHANNELS] the gate of its
    input, the gate of its result, and its input.

    conv [KERNEL, CHANNELS]; bias [CHANNELS]; rings [rows, KERNEL, CHANNELS] gets the gated input. A batch entry with
    row -1 is skipped. CHANNELS % BC == 0. Grid (CHANNELS / BC, B). Ring and weights are loaded before the wait: no
    kernel of this step but this one writes the ring.
    """
    if PDL:
        gdc_launch_dependents()
    batch = tl.program_id(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    row = tl.load(rows + batch)
    position = tl.load(lengths + row, mask=row >= 0, other=0)
    ring = rings + row.to(tl.int64) * KERNEL * CHANNELS
    acc = recent(ring, conv, cols, position, CHANNELS, KERNEL)
    if BIAS:
        acc += tl.load(bias + cols).to(tl.float32)
    last = tl.load(conv + (KERNEL - 1) * CHANNELS + cols)
    if PDL:
        gdc_wait()
    if row >= 0:
        mine = given + batch * 3 * CHANNELS + cols
        value = _gated(tl.load(mine + 2 * CHANNELS), tl.load(mine))
        total = with_token(acc, value, last, ring, cols, position, row >= 0, CHANNELS, KERNEL)
        result = _gated(total.to(out.dtype.element_ty), tl.load(mine + CHANNELS))
        tl.store(out + batch * CHANNELS + cols, result)


@triton.jit
def _input(given, at, cols, is_wanted, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, GATED: tl.constexpr):
    """A token's input of the convolution, 0 where it is not wanted."""
    mine = given + at.to(tl.int64) * WIDTH + cols
    if GATED:
        value = tl.load(mine + 2 * CHANNELS, mask=is_wanted, other=0.0)
        value = _gated(value, tl.load(mine, mask=is_wanted, other=0.0))
    else:
        value = tl.load(mine, mask=is_wanted, other=0.0)
    return value


@triton.jit(do_not_specialize=["start", "num_tokens"])
def convolve_chunk(
    given, conv, bias, ring, new_ring, out, start, num_tokens,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr, BC: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """out [T, CHANNELS] of a chunk's tokens start ... start + T - 1 from given [T, WIDTH] and, before them, the row's
    ring [KERNEL, CHANNELS]; the last KERNEL inputs go to their places in new_ring. Grid (T, ceil(CHANNELS / BC)).

    GATED: as `convolve_step` does it; else the inputs are the first columns of given, and results are activated.
    """
    token = tl.program_id(0)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = cols < CHANNELS
    value = _input(given, token, cols, inside, WIDTH, CHANNELS, GATED)
    tl.store(
        new_ring + (start + token) % KERNEL * CHANNELS + cols,
        value,
        mask=cols < tl.where(token >= num_tokens - KERNEL, CHANNELS, 0),
    )
    acc = value.to(tl.float32) * tl.load(conv + (KERNEL - 1) * CHANNELS + cols, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    for back in tl.static_range(1, KERNEL):
        at = token - back
        place = (start + at + KERNEL) % KERNEL
        is_near = cols < tl.where(at >= 0, CHANNELS, 0)
        near = _input(given, at, cols, is_near, WIDTH, CHANNELS, GATED).to(tl.float32)
        is_old = cols < tl.where((at < 0) & (start + at >= 0), CHANNELS, 0)
        old = tl.load(ring + place * CHANNELS + cols, mask=is_old, other=0.0).to(tl.float32)
        weight = tl.load(conv + (KERNEL - 1 - back) * CHANNELS + cols, mask=inside, other=0.0).to(tl.float32)
        acc += (near + old) * weight
    dtype: tl.constexpr = out.dtype.element_ty
    if GATED:
        gate = tl.load(given + token.to(tl.int64) * WIDTH + CHANNELS + cols, mask=inside, other=0.0)
        acc = _gated(acc.to(dtype), gate)
    else:
        acc = activated(acc, conv.dtype.element_ty, dtype).to(dtype)
    tl.store(out + token.to(tl.int64) * CHANNELS + cols, acc, mask=inside)
