"""Embedding, normalisation and dense products of one decode step.

A program of a product holds a few whole weight rows in registers, so the entire matrix is in flight at once, and goes
through the batch with them; a program of `tiled_product` takes a tile of weights and all rows to the tensor cores.
Sums are fp32. Invariant: a batch entry's sums are the same instructions in the same order for every batch size, so its
bits do not depend on the other entries; the two kinds of products differ from each other.
Results are rounded to the model's dtype where transformers rounds.

ADAPTED steps have entries with adapters: `adapters` [B] int32 is the adapter of each, from 1 on, 0: none. Norms then
have a row for each adapter, row 0 for none, and RANK > 0 says that adapters change a product by lora_b · lora_a · x,
where `shrink` has computed the first half into `low` [B, RANK]. A product of rows takes all entries as if they had
none, and then those that have one again, with the weights that it holds. Where one loop did both, the compiler gave its
sums another order, and entries without an adapter lost their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def normalise(x, weight, eps, n, dtype: tl.constexpr):
    """RMS norm of one row x (fp32), rounded like transformers: normalise, round, scale, round; with fp32 weights the
    first rounding is left out (see `step.weights.LayerWeights`)."""
    value = x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    if weight.dtype != tl.float32:
        value = value.to(dtype).to(tl.float32)
    return (value * weight.to(tl.float32)).to(dtype)


@triton.jit
def norm_row(x, weight, norm, cols, eps, N: tl.constexpr, dtype: tl.constexpr, NORM: tl.constexpr):
    """One row x (fp32, 0 past N) normalised: NORM 1 by `normalise`, 2 by a layer norm, whose bias follows on its
    weights at `norm`. `weight` is what was loaded from there."""
    if NORM == 2:
        shift = tl.load(norm + N + cols, mask=cols < N, other=0.0)
        x = tl.where(cols < N, x - tl.sum(x, axis=0) / N, 0.0)
        x = (x * tl.rsqrt(tl.sum(x * x, axis=0) / N + eps) * weight + shift).to(dtype)
    else:
        x = normalise(x, weight, eps, N, dtype)
    return x


@triton.jit
def gated(gate, up, dtype: tl.constexpr, GATE: tl.constexpr):
    """(up + shift) * gate * sigmoid(alpha * (gate + cubic * gate³)) within a limit, with transformers' roundings to the
    model's dtype. GATE: (alpha, limit, shift, cubic) of `step.parts.GateKind`."""
    ALPHA: tl.constexpr = GATE[0]
    LIMIT: tl.constexpr = GATE[1]
    SHIFT: tl.constexpr = GATE[2]
    CUBIC: tl.constexpr = GATE[3]
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    if LIMIT > 0.0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if CUBIC != 0.0:
        heat = ALPHA * (gate + CUBIC * gate * gate * gate)
        gate = (gate / (1.0 + tl.exp(-heat))).to(dtype).to(tl.float32)
    elif ALPHA == 1.0:
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    else:
        heat = (gate * ALPHA).to(dtype).to(tl.float32)
        gate = (gate * (1.0 / (1.0 + tl.exp(-heat))).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    if SHIFT != 0.0:
        up = (up + SHIFT).to(dtype).to(tl.float32)
    return (gate * up).to(dtype)


@triton.jit
def scaled(value, dtype: tl.constexpr, SCALE: tl.constexpr):
    """value * SCALE in fp32, rounded to dtype before it is multiplied."""
    if SCALE != 1.0:
        value = value.to(dtype).to(tl.float32) * SCALE
    return value


@triton.jit
def capped(value, CAP: tl.constexpr):
    """CAP * tanh(value / CAP) in fp32; CAP 0: the value."""
    if CAP != 0.0:
        value = CAP * (2.0 / (1.0 + tl.exp(value * (-2.0 / CAP))) - 1.0)
    return value


@triton.jit
def with_change(acc, adapter, lora_b, low, batch, rows, inside, N, RANK: tl.constexpr):
    """acc [rows] of one entry, with the change of its adapter at `rows` of lora_b [adapters, N, RANK]."""
    if adapter > 0:
        ranks = tl.arange(0, RANK)
        at = lora_b + ((adapter - 1).to(tl.int64) * N + rows)[:, None] * RANK + ranks[None, :]
        b = tl.load(at, mask=inside[:, None], other=0.0)
        acc += tl.sum(b.to(tl.float32) * tl.load(low + batch * RANK + ranks)[None, :], axis=1)
    return acc


@triton.jit
def shrink(
    x, norm, lora_a, adapters, low, eps,
    K: tl.constexpr, KP: tl.constexpr, STRIDE: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """low [B, RANK] fp32 = lora_a[adapter] [RANK, K] · norm?(x [B, K]) of the entries that have an adapter; rows of x
    are STRIDE apart; norm is [1 + adapters, K]. GATED: lora_a has RANK rows of gate, then as many of up, and low is
    silu(gate · x) * (up · x). Grid (RANK / BR, B)."""
    if PDL:
        gdc_launch_dependents()
    ranks = tl.program_id(0) * BR + tl.arange(0, BR)
    batch = tl.program_id(1)
    cols = tl.arange(0, KP)
    adapter = tl.load(adapters + batch)
    if PDL:
        gdc_wait()
    if adapter > 0:
        ROWS: tl.constexpr = 2 * RANK if GATED else RANK
        a_at = lora_a + ((adapter - 1).to(tl.int64) * ROWS + ranks)[:, None] * K + cols[None, :]
        a = tl.load(a_at, mask=(cols < K)[None, :], other=0.0)
        value = tl.load(x + batch * STRIDE + cols, mask=cols < K, other=0.0)
        if NORM:
            scale = tl.load(norm + adapter * K + cols, mask=cols < K, other=0.0)
            value = normalise(value.to(tl.float32), scale, eps, K, x.dtype.element_ty)
        first = tl.sum(a.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
        if GATED:
            up = tl.load(a_at + RANK * K, mask=(cols < K)[None, :], other=0.0)
            first = first / (1.0 + tl.exp(-first)) * tl.sum(up.to(tl.float32) * value.to(tl.float32)[None, :], axis=1)
        tl.store(low + batch * RANK + ranks, first)


@triton.jit
def embed(tokens, table, x, step, H: tl.constexpr, HP: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr):
    """x[b] = table[tokens[b]] * SCALE. Program 0 begins a new step. Grid (B,)."""
    row = tl.program_id(0)
    if PDL:  # in this order, so that a kernel that starts early finds the step before complete
        gdc_wait()
        gdc_launch_dependents()
    cols = tl.arange(0, HP)
    token = tl.load(tokens + row).to(tl.int64)
    value = scaled(tl.load(table + token * H + cols, mask=cols < H, other=0.0), x.dtype.element_ty, SCALE)
    tl.store(x + row * H + cols, value, mask=cols < H)
    if row == 0:
        tl.store(step, tl.load(step) + 1)


@triton.jit
def _row(
    w, factors, x, norm, scale, bias, rows, cols, inside, batch, eps, dtype: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """w [rows, K] · norm?(x [batch]) + bias?, in fp32; scale [K] is what was loaded of the norm, factors [rows, groups]
    multiply w."""
    value = tl.load(x + batch * STRIDE + cols, mask=cols < K, other=0.0)
    if NORM:
        value = norm_row(value.to(tl.float32), scale, norm, cols, eps, K, dtype, NORM)
    products = w.to(tl.float32) * value.to(tl.float32)[None, :]
    if GROUP > 0:
        GROUPED: tl.constexpr = [w.shape[0], w.shape[1] // GROUP, GROUP]
        acc = tl.sum(tl.sum(tl.reshape(products, GROUPED), axis=2) * factors, axis=1)
    else:
        acc = tl.sum(products, axis=1)
    if BIAS:
        acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _store_row(
    acc, residual, out, at, inside, dtype: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr
):
    """out [at] = capped(acc * SCALE) + residual?."""
    acc = capped(scaled(acc, dtype, SCALE), CAP)
    if RESIDUAL:
        acc = acc.to(dtype).to(tl.float32)
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product(
    x, norm, weight, scales, bias, residual, out, adapters, lora_b, low, eps, N,
    B: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    ADAPTED: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, N] = capped((norm?(x [B, K]) · weight [N, K]ᵀ + bias?) * SCALE) + residual?; rows of x are STRIDE apart.
    Grid (ceil(N / BN),).

    GROUP: weights are in 8 bits, and scales [N, ceil(K / GROUP)] fp32 multiply them; a power of two, 0: they have none.
    """
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, KP)
    inside = rows < N
    w = tl.load(
        weight + rows.to(tl.int64)[:, None] * K + cols[None, :],
        mask=inside[:, None] & (cols[None, :] < K), other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    factors = rows  # of no use without scales
    if GROUP > 0:
        group = tl.arange(0, KP // GROUP)
        NUM: tl.constexpr = (K + GROUP - 1) // GROUP
        mask = inside[:, None] & (group < NUM)[None, :]
        factors = tl.load(scales + rows.to(tl.int64)[:, None] * NUM + group[None, :], mask=mask, other=0.0)
    scale = rows  # of no use without a norm
    if NORM:
        scale = tl.load(norm + cols, mask=cols < K, other=0.0)
    if PDL:
        gdc_wait()
    dtype: tl.constexpr = x.dtype.element_ty
    for batch in range(B):
        acc = _row(
            w, factors, x, norm, scale, bias, rows, cols, inside, batch, eps, dtype, K, STRIDE, GROUP, NORM, BIAS
        )  # fmt: skip
        _store_row(acc, residual, out, batch * N + rows, inside, dtype, RESIDUAL, SCALE, CAP)
    if ADAPTED:
        tl.debug_barrier()  # the second store of an entry comes after the first
        for batch in range(B):
            adapter = tl.load(adapters + batch)
            if adapter > 0:
                own = scale
                if NORM:
                    own = tl.load(norm + adapter * K + cols, mask=cols < K, other=0.0)
                acc = _row(
                    w, factors, x, norm, own, bias, rows, cols, inside, batch, eps, dtype, K, STRIDE, GROUP, NORM, BIAS
                )  # fmt: skip
                if RANK > 0:
                    acc = with_change(acc, adapter, lora_b, low, batch, rows, inside, N, RANK)
                _store_row(acc, residual, out, batch * N + rows, inside, dtype, RESIDUAL, SCALE, CAP)


@triton.jit
def norm_rows(
    x, norm, out, adapters, eps,
    K: tl.constexpr, KP: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, ADAPTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [B, K] = norm(x [B, K]), whose rows are STRIDE apart. Grid (B,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    cols = tl.arange(0, KP)
    value = tl.load(x + row * STRIDE + cols, mask=cols < K, other=0.0).to(tl.float32)
    if ADAPTED:
        norm += tl.load(adapters + row) * K
    weight = tl.load(norm + cols, mask=cols < K, other=0.0)
    value = norm_row(value, weight, norm, cols, eps, K, x.dtype.element_ty, NORM)
    tl.store(out + row * K + cols, value, mask=cols < K)


@triton.jit
def join(
    residual, branch, branch_norm, beside, beside_norm, norm, factor, out, adapters, eps,
    H: tl.constexpr, HP: tl.constexpr, BRANCH_NORM: tl.constexpr, BESIDE: tl.constexpr, BESIDE_NORM: tl.constexpr,
    NORM: tl.constexpr, FACTOR: tl.constexpr, SCALE: tl.constexpr, ADAPTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, H] = (residual + SCALE * norm?(branch_norm?(branch) + beside_norm?(beside?))) * factor?, all [B, H] but
    the norms' weights [H] and factor [1]. Grid (B,)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: tl.constexpr = out.dtype.element_ty
    cols = tl.arange(0, HP)
    inside = cols < H
    at = tl.program_id(0) * H + cols
    if ADAPTED:
        own = tl.load(adapters + tl.program_id(0)) * H
        branch_norm += own
        beside_norm += own
        norm += own
    value = tl.load(branch + at, mask=inside, other=0.0)
    if BRANCH_NORM:
        weight = tl.load(branch_norm + cols, mask=inside, other=0.0)
        value = norm_row(value.to(tl.float32), weight, branch_norm, cols, eps, H, dtype, BRANCH_NORM)
    if BESIDE:
        other = tl.load(beside + at, mask=inside, other=0.0)
        if BESIDE_NORM:
            weight = tl.load(beside_norm + cols, mask=inside, other=0.0)
            other = norm_row(other.to(tl.float32), weight, beside_norm, cols, eps, H, dtype, BESIDE_NORM)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(dtype)
    if NORM:
        weight = tl.load(norm + cols, mask=inside, other=0.0)
        value = norm_row(value.to(tl.float32), weight, norm, cols, eps, H, dtype, NORM)
    value = scaled(value, dtype, SCALE).to(dtype).to(tl.float32)
    value = (value + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    if FACTOR:
        value = (value.to(tl.float32) * tl.load(factor).to(tl.float32)).to(dtype)
    tl.store(out + at, value, mask=inside)


@triton.jit
def tiled_product(
    x, weight, scales, bias, residual, out, adapters, lora_b, low, N,
    B: tl.constexpr, BP: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`product` without its norm by tensor cores, for several rows faster and with sums in another order; rows of x are
    STRIDE apart; K % BK == 0, and GROUP % BK == 0 for weights in 8 bits. Grid (ceil(N / BN),).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    batch = tl.arange(0, BP)
    cols = tl.arange(0, BK)
    inside = rows < N
    w_at = weight + rows.to(tl.int64)[:, None] * K + cols[None, :]
    x_at = x + batch[None, :] * STRIDE + cols[:, None]
    acc = tl.zeros([BN, BP], tl.float32)
    for start in range(0, K, BK):
        w = tl.load(w_at + start, mask=inside[:, None], other=0.0)
        value = tl.load(x_at + start, mask=(batch < B)[None, :], other=0.0)
        if GROUP > 0:
            at = rows.to(tl.int64) * ((K + GROUP - 1) // GROUP) + start // GROUP
            factors = tl.load(scales + at, mask=inside, other=0.0)
            acc += tl.dot(w.to(tl.float32).to(value.dtype), value, input_precision="ieee") * factors[:, None]
        else:
            acc = tl.dot(w, value, acc, input_precision="ieee")
    at = batch[None, :] * N + rows[:, None]
    mask = inside[:, None] & (batch < B)[None, :]
    if BIAS:
        acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    if RANK > 0:
        for entry in range(B):
            adapter = tl.load(adapters + entry)
            if adapter > 0:
                change = tl.zeros([BN], tl.float32)
                change = with_change(change, adapter, lora_b, low, entry, rows, inside, N, RANK)
                acc = tl.where((batch == entry)[None, :], acc + change[:, None], acc)
    acc = capped(scaled(acc, x.dtype.element_ty, SCALE), CAP)
    if RESIDUAL:
        acc = acc.to(x.dtype.element_ty).to(tl.float32)
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _input(x, norm, scale, cols, batch, eps, dtype: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr):
    """norm?(x [batch]) as [1, K] in fp32."""
    value = tl.load(x + batch * K + cols, mask=cols < K, other=0.0)
    if NORM:
        value = norm_row(value.to(tl.float32), scale, norm, cols, eps, K, dtype, NORM)
    return value.to(tl.float32)[None, :]


@triton.jit
def gated_product(
    x, norm, weight, out, adapters, lora_b, low, eps, N,
    B: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    ADAPTED: tl.constexpr, RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, N] = gated(gate · y, up · y), y = norm?(x [B, K]), weight [2N, K] is gate then up. Grid (ceil(N /
    BN),).
    """
    if PDL:
        gdc_launch_dependents()
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.arange(0, KP)
    inside = rows < N
    mask = inside[:, None] & (cols[None, :] < K)
    at = weight + rows.to(tl.int64)[:, None] * K + cols[None, :]
    w_gate = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    w_up = tl.load(at + N.to(tl.int64) * K, mask=mask, other=0.0, cache_modifier=".cg")
    scale = rows  # of no use without a norm
    if NORM:
        scale = tl.load(norm + cols, mask=cols < K, other=0.0)
    if PDL:
        gdc_wait()
    dtype: tl.constexpr = x.dtype.element_ty
    for batch in range(B):
        value = _input(x, norm, scale, cols, batch, eps, dtype, K, NORM)
        gate = tl.sum(w_gate.to(tl.float32) * value, axis=1)
        up = tl.sum(w_up.to(tl.float32) * value, axis=1)
        tl.store(out + batch * N + rows, gated(gate, up, out.dtype.element_ty, GATE), mask=inside)
    if ADAPTED:
        tl.debug_barrier()
        for batch in range(B):
            adapter = tl.load(adapters + batch)
            if adapter > 0:
                own = scale
                if NORM:
                    own = tl.load(norm + adapter * K + cols, mask=cols < K, other=0.0)
                value = _input(x, norm, own, cols, batch, eps, dtype, K, NORM)
                gate = tl.sum(w_gate.to(tl.float32) * value, axis=1)
                up = tl.sum(w_up.to(tl.float32) * value, axis=1)
                if RANK > 0:
                    gate = with_change(gate, adapter, lora_b, low, batch, rows, inside, 2 * N, RANK)
                    up = with_change(up, adapter, lora_b, low, batch, N + rows, inside, 2 * N, RANK)
                tl.store(out + batch * N + rows, gated(gate, up, out.dtype.element_ty, GATE), mask=inside)


@triton.jit
def finish(
    logits, rows, lengths, part_best, part_sum, part_token, arrived, best_token, best_logit, normaliser, V,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """lengths[rows[b]] += 1; best_token[b] = argmax(logits[b]), the lowest id of equals, with its logit, and
    normaliser[b] = logsumexp(logits[b]).

    Grid (PARTS, B), PARTS * BLOCK >= V: each program takes a part of the vocabulary, the last one of a row joins them.
    """
    part, batch = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    cols = part * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + batch.to(tl.int64) * V + cols, mask=cols < V, other=-float("inf"))
    best = tl.max(value, axis=0)
    tl.store(part_best + batch * PARTS + part, best)
    # A part past the vocabulary has no finite maximum; exp(-inf - 0) is the 0 that it adds.
    tl.store(part_sum + batch * PARTS + part, tl.sum(tl.exp(value - tl.maximum(best, -3.0e38)), axis=0))
    tl.store(part_token + batch * PARTS + part, tl.min(tl.where(value == best, cols, 0x7FFFFFFF), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + batch, 1) == PARTS - 1:
        tl.store(arrived + batch, 0)
        parts = batch * PARTS + tl.arange(0, PARTS)
        bests = tl.load(part_best + parts, cache_modifier=".cg")
        sums = tl.load(part_sum + parts, cache_modifier=".cg")
        ids = tl.load(part_token + parts, cache_modifier=".cg")
        peak = tl.max(bests, axis=0)
        token = tl.min(tl.where(bests == peak, ids, 0x7FFFFFFF), axis=0)
        tl.store(best_token + batch, token)
        tl.store(best_logit + batch, peak)
        tl.store(normaliser + batch, peak + tl.log(tl.sum(sums * tl.exp(bests - peak), axis=0)))
    row = tl.load(rows + batch)
    if (row >= 0) & (part == 0):
        tl.store(lengths + row, tl.load(lengths + row) + 1)
