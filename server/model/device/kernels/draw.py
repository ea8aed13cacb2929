"""Kernels that choose each row's next token: adjusted, allowed, narrowed and drawn, without sorting the vocabulary.

Probabilities are whole numbers, `exp(score - peak)` in units of `UNIT`: their sums are exact, so a row's token depends
neither on the number of programs nor on their order. A threshold (top-k, top-p) is searched over the scores' bits as
whole numbers: each pass splits the range into `PIVOTS` parts. Programs take a part of the vocabulary each; the last one
of a row joins what all of them found.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(float(2**40))
LOW, HIGH, TARGET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Of a row's search, int64 [B, 3]: the highest key known to reach the weight, the lowest known not to, the weight."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, DRAW = (tl.constexpr(at) for at in range(5))
"""Of a row's choice, float64 [5, B]; a negative draw takes the most likely token."""
KEYS = tl.constexpr(2**32)


@triton.jit
def key_of(score):
    """float32 → int64 in [0, 2^32) in the same order; the two zeros are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def mass_of(score, peak):
    """Probability up to a factor, int64: `UNIT` for the peak."""
    return (tl.exp((score - peak).to(tl.float64)) * UNIT).to(tl.int64)


@triton.jit(do_not_specialize=["B"])
def scale(
    logits, scores, choices, allowed, search, V, B,
    BLOCK: tl.constexpr, CONSTRAINED: tl.constexpr,
):  # fmt: skip
    """scores [B, V] = logits / temperature, minus infinity where `allowed` [B, ceil(V / 32)] has no bit; begins each
    row's search of the k-th best. Grid (PARTS, B)."""
    part, row = tl.program_id(0), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    inside = cols < V
    score = tl.load(logits + row.to(tl.int64) * V + cols, mask=inside, other=0.0)
    if CONSTRAINED:
        words = tl.load(allowed + row * tl.cdiv(V, 32) + (cols >> 5), mask=inside, other=0)
        score = tl.where(((words >> (cols & 31)) & 1) != 0, score, -float("inf"))
    score = tl.div_rn(score, tl.load(choices + TEMPERATURE * B + row).to(tl.float32))
    tl.store(scores + row.to(tl.int64) * V + cols, score, mask=inside)
    if part == 0:
        tl.store(search + row * 3 + LOW, 0)
        tl.store(search + row * 3 + HIGH, KEYS)
        tl.store(search + row * 3 + TARGET, tl.load(choices + TOP_K * B + row).to(tl.int64))


@triton.jit(do_not_specialize=["B"])
def adjust(logits, scores, choices, ids, values, V, B, N, BLOCK: tl.constexpr):
    """scores[b, ids[b]] = (logits[b, ids[b]] + values[b]) / temperature, for ids [B, N] ≥ 0 whose score is finite.
    Grid (ceil(N / BLOCK), B)."""
    block, row = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row * N + at, mask=at < N, other=-1)
    given = token >= 0
    place = row.to(tl.int64) * V + token
    score = tl.load(logits + place, mask=given, other=0.0) + tl.load(values + row * N + at, mask=given, other=0.0)
    score = tl.div_rn(score, tl.load(choices + TEMPERATURE * B + row).to(tl.float32))
    may = given & (tl.load(scores + place, mask=given, other=0.0) > -float("inf"))
    tl.store(scores + place, score, mask=may)


@triton.jit
def peak(
    scores, part_best, part_token, best, token, arrived, V,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """best [B] = the highest score, token [B] its lowest id. Grid (PARTS, B)."""
    part, row = tl.program_id(0), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + row.to(tl.int64) * V + cols, mask=cols < V, other=-float("inf"))
    highest = tl.max(score, axis=0)
    tl.store(part_best + row * PARTS + part, highest)
    tl.store(
        part_token + row * PARTS + part, tl.min(tl.where((score == highest) & (cols < V), cols, 0x7FFFFFFF), axis=0)
    )
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1) == PARTS - 1:
        tl.store(arrived + row, 0)
        parts = row * PARTS + tl.arange(0, PARTS)
        bests = tl.load(part_best + parts, cache_modifier=".cg")
        tokens = tl.load(part_token + parts, cache_modifier=".cg")
        highest = tl.max(bests, axis=0)
        tl.store(best + row, highest)
        tl.store(token + row, tl.min(tl.where(bests == highest, tokens, 0x7FFFFFFF), axis=0))


@triton.jit(do_not_specialize=["B"])
def narrow(
    scores, best, choices, search, part_weight, arrived, V, B,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PIVOTS: tl.constexpr, BY_MASS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One pass of a row's search: LOW becomes the highest of the pivots at or above which the weight is TARGET.

    The weight counts tokens, or is their mass among those that top-k kept. Does nothing for a row that keeps all, or
    draws nothing. Grid (PARTS, B).
    """
    part, row = tl.program_id(0), tl.program_id(1)
    share = tl.load(choices + TOP_P * B + row)
    wanted = share < 1.0 if BY_MASS else tl.load(choices + TOP_K * B + row) < V
    if wanted & (tl.load(choices + DRAW * B + row) >= 0):
        low, high = tl.load(search + row * 3 + LOW), tl.load(search + row * 3 + HIGH)
        if BY_MASS and FIRST:
            high = tl.zeros_like(high) + KEYS
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = low + step * tl.arange(0, PIVOTS)
        highest = tl.load(best + row)
        weight = tl.zeros([CHUNK, PIVOTS], tl.int64)
        for start in range(0, BLOCK, CHUNK):
            cols = part * BLOCK + start + tl.arange(0, CHUNK)
            score = tl.load(scores + row.to(tl.int64) * V + cols, mask=cols < V, other=-float("inf"))
            one = mass_of(score, highest) if BY_MASS else (cols < V).to(tl.int64)
            weight += tl.where(key_of(score)[:, None] >= pivots[None, :], one[:, None], 0)
        tl.store(part_weight + (row * PARTS + part) * PIVOTS + tl.arange(0, PIVOTS), tl.sum(weight, axis=0))
        tl.debug_barrier()
        if tl.atomic_add(arrived + row, 1) == PARTS - 1:
            tl.store(arrived + row, 0)
            at = (row * PARTS + tl.arange(0, PARTS)[:, None]) * PIVOTS + tl.arange(0, PIVOTS)[None, :]
            found = tl.sum(tl.load(part_weight + at, cache_modifier=".cg"), axis=0)
            if BY_MASS and FIRST:  # at the first pivot is all that top-k kept
                target = tl.maximum(tl.ceil(share * tl.max(found, axis=0).to(tl.float64)).to(tl.int64), 1)
            else:
                target = tl.load(search + row * 3 + TARGET)
            reached = tl.maximum(tl.sum((found >= target).to(tl.int64), axis=0) - 1, 0)
            tl.store(search + row * 3 + LOW, low + reached * step)
            tl.store(search + row * 3 + HIGH, tl.minimum(high, low + (reached + 1) * step))
            tl.store(search + row * 3 + TARGET, target)


@triton.jit
def kept_mass(score, highest, low, share):
    """The mass of tokens that are kept; 0 of the others."""
    mass = mass_of(score, highest)
    return tl.where((key_of(score) >= low) & (mass.to(tl.float64) >= share * UNIT), mass, 0)


@triton.jit(do_not_specialize=["B"])
def pick(
    logits, scores, best, best_token, choices, search, part_mass, arrived, drawn, V, B,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """drawn [2, B] float64: each row's token, and its logit. Grid (PARTS, B)."""
    part, row = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    row_scores = scores + row.to(tl.int64) * V
    highest, low = tl.load(best + row), tl.load(search + row * 3 + LOW)
    share, draw = tl.load(choices + MIN_P * B + row), tl.load(choices + DRAW * B + row)
    score = tl.load(row_scores + part * BLOCK + at, mask=part * BLOCK + at < V, other=-float("inf"))
    tl.store(part_mass + row * PARTS + part, tl.sum(kept_mass(score, highest, low, share), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1) == PARTS - 1:
        tl.store(arrived + row, 0)
        token = tl.load(best_token + row)
        if draw >= 0:
            masses = tl.load(part_mass + row * PARTS + tl.arange(0, PARTS), cache_modifier=".cg")
            upto = tl.cumsum(masses, axis=0)
            total = tl.max(upto, axis=0)
            target = tl.minimum((draw * total.to(tl.float64)).to(tl.int64), total - 1)
            chosen = tl.sum((upto <= target).to(tl.int32), axis=0)
            before = tl.max(tl.where(upto <= target, upto, 0), axis=0)
            cols = chosen * BLOCK + at
            score = tl.load(row_scores + cols, mask=cols < V, other=-float("inf"))
            inner = before + tl.cumsum(kept_mass(score, highest, low, share), axis=0)
            token = chosen * BLOCK + tl.sum((inner <= target).to(tl.int32), axis=0)
        tl.store(drawn + row, token.to(tl.float64))
        tl.store(drawn + B + row, tl.load(logits + row.to(tl.int64) * V + token).to(tl.float64))
