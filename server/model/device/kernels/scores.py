"""Computes picks and their weights from a layer's scores: top-k, groups of experts, softmax and sigmoid weights.

Device functions of the router (`kernels.routing`), over a whole batch in one program. Their rules are those of
`router.gating.rules`, which the host-driven path follows, masks included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sortable(value):
    """fp32 -> int32 whose order is that of the values (-0 sorts below +0)."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def top_k(
    choice, logits, allowed,
    K: tl.constexpr, KP: tl.constexpr, BP: tl.constexpr, EP: tl.constexpr, SAME: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The K largest of choice [BP, EP] among allowed, lowest id first where equal.

    SAME: choice is logits; NARROW: their values are bf16, so that value and id fit one 32-bit key.
    Returns chosen [BP, EP], order [BP, EP] (which pick it is), ids [BP, KP] (-1 past the available) and the chosen
    entries of `logits` [BP, KP] (-inf past the available).
    """
    experts = tl.arange(0, EP)
    picks = tl.arange(0, KP)
    if NARROW:
        key = (_sortable(choice) & -65536) | (EP - 1 - experts)[None, :]
    else:
        key = (_sortable(choice).to(tl.int64) << 32) | (EP - 1 - experts)[None, :].to(tl.int64)
    nothing: tl.constexpr = -0x80000000 if NARROW else -0x8000000000000000
    key = tl.where(allowed, key, nothing)
    chosen = tl.zeros([BP, EP], tl.int32) > 0
    order = tl.zeros([BP, EP], tl.int32)
    ids = tl.full([BP, KP], -1, tl.int32)
    values = tl.full([BP, KP], -float("inf"), tl.float32)
    for k in tl.static_range(K):
        best = tl.max(key, axis=1)
        found = best != nothing
        if NARROW:
            expert = (EP - 1) - (best & 0xFFFF)
            high = best & -65536
        else:
            expert = (EP - 1) - (best & 0xFFFFFFFF).to(tl.int32)
            high = (best >> 32).to(tl.int32)
        here = (experts[None, :] == expert[:, None]) & found[:, None]
        if SAME:
            value = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
            if NARROW:
                value = value.to(tl.int32, bitcast=True)
                value = tl.where(value < 0, value & -65536, value).to(tl.float32, bitcast=True)
            value = tl.where(found, value, -float("inf"))
        else:
            value = tl.max(tl.where(here, logits, -float("inf")), axis=1)
        chosen = chosen | here
        order = tl.where(here, k, order)
        ids = tl.where((picks == k)[None, :] & found[:, None], expert[:, None], ids)
        values = tl.where((picks == k)[None, :], value[:, None], values)
        key = tl.where(here, nothing, key)
    return chosen, order, ids, values


@triton.jit
def within_groups(
    choice, allowed,
    K: tl.constexpr, E: tl.constexpr, BP: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """allowed [BP, EP] without the experts of groups that are not among the KEPT best of GROUPS.

    A group's score is the sum of its BEST best allowed members; while the kept groups hold fewer allowed experts than
    a row can pick, the next best are kept too.
    """
    group_of = tl.arange(0, EP) // (E // GROUPS)
    groups = tl.arange(0, GP)
    scores = tl.full([BP, GP], -float("inf"), tl.float32)
    held = tl.zeros([BP, GP], tl.int32)
    for g in tl.static_range(GROUPS):
        mine = allowed & (group_of == g)[None, :]
        value = tl.where(mine, choice, -float("inf"))
        num = tl.sum(mine.to(tl.int32), axis=1)
        total = tl.max(value, axis=1)
        if BEST == 2:
            first = tl.argmax(value, axis=1)
            rest = tl.where(tl.arange(0, EP)[None, :] == first[:, None], -float("inf"), value)
            total = tl.where(num > 1, total + tl.max(rest, axis=1), total)
        scores = tl.where((groups == g)[None, :], total[:, None], scores)
        held = tl.where((groups == g)[None, :], num[:, None], held)
    most = tl.minimum(tl.sum(held, axis=1), K)
    for g in tl.static_range(GROUPS):
        mine = tl.max(tl.where((groups == g)[None, :], scores, -float("inf")), axis=1)
        ahead = (scores > mine[:, None]) | ((scores == mine[:, None]) & (groups < g)[None, :])
        rank = tl.sum(ahead.to(tl.int32), axis=1)
        before = tl.sum(tl.where(ahead, held, 0), axis=1)
        kept = (rank < KEPT) | (before < most)
        allowed = allowed & (kept[:, None] | (group_of != g)[None, :])
    return allowed


@triton.jit
def _sigmoid_weights(values, RENORMALISE: tl.constexpr, EPS: tl.constexpr):
    """The picked scores [BP, KP], 0 past the available, divided by their sum if the router does so."""
    mass = tl.maximum(values, 0.0)
    if RENORMALISE:
        total = tl.sum(mass, axis=1) + EPS
        mass = mass / tl.where(total > 0.0, total, 1.0)[:, None]
    return mass


@triton.jit
def softmax(logits, allowed):
    """Softmax over the allowed logits [BP, EP], 0 elsewhere."""
    peak = tl.max(tl.where(allowed, logits, -float("inf")), axis=1)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.where(allowed, tl.exp(logits - peak[:, None]), 0.0)
    total = tl.sum(mass, axis=1)
    return mass / tl.where(total > 0.0, total, 1.0)[:, None]


@triton.jit
def _softmax_weights(values, logits, allowed, RENORMALISE: tl.constexpr, FLOOR: tl.constexpr):
    """Softmax over the allowed logits, of the picked values [BP, KP]; 0 past the available. FLOOR: the least share of
    the mass by which it is divided."""
    peak = tl.max(tl.where(allowed, logits, -float("inf")), axis=1)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.exp(values - peak[:, None])
    if RENORMALISE:
        total = tl.sum(mass, axis=1)
    if FLOOR > 0.0 or not RENORMALISE:
        everything = tl.sum(tl.where(allowed, tl.exp(logits - peak[:, None]), 0.0), axis=1)
        total = tl.maximum(total, everything * FLOOR) if RENORMALISE else everything
    total = tl.where(total > 0.0, total, 1.0)
    return mass / total[:, None]


@triton.jit
def weights_of(
    values, score, allowed,
    SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr,
    SCALE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Weights [BP, KP] of the picked values, rounded to dtype as transformers does."""
    if SIGMOID:
        weight = _sigmoid_weights(values, RENORMALISE, EPS)
    else:
        weight = _softmax_weights(values, score, allowed, RENORMALISE, FLOOR)
    if SCALE != 1.0:
        weight = weight * SCALE
    return weight.to(dtype).to(tl.float32)


@triton.jit
def mixed_weights(
    values, score, allowed, chosen, order,
    K: tl.constexpr, KP: tl.constexpr, TOLERANCE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """SparseMixer's weights [BP, KP] of picks by the highest of score [BP, EP]: a pick's softmax among the allowed
    experts that are not picked before it and whose scores are close enough to its own, by TOLERANCE. The other
    arguments are as `top_k` returns them. Source: `router.gating.special.SparseMixerRule`."""
    picks = tl.arange(0, KP)
    weights = tl.zeros(values.shape, tl.float32)
    for k in tl.static_range(K):
        best = tl.sum(tl.where((picks == k)[None, :], values, 0.0), axis=1)
        exists = best > -float("inf")
        best = tl.where(exists, best, 0.0)[:, None]
        left = allowed & ((chosen == 0) | (order >= k))
        close = (best - score) <= TOLERANCE * tl.maximum(tl.abs(score), best)
        mass = tl.sum(tl.where(left & close, tl.exp(score - best), 0.0), axis=1)
        weight = tl.where(exists, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
        weights = tl.where((picks == k)[None, :], weight[:, None], weights)
    return weights.to(dtype).to(tl.float32)
