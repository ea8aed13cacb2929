"""Fetching ahead: which experts the next two layers will want, guessed, and their first weights fetched while the bus
has nothing certain to do.

`fetch_ahead` runs beside the step's kernels, once a layer, after that layer's router. It applies the gates of the next
two layers to the residual stream as it is now, and fetches gate_up tiles of their best expert that is in no slot into
*lanes*: one for each layer of three in turn (the one that computes and the next two) and each distance, so that nothing
is overwritten that may be read. Nothing is evicted and no page table changes: a wrong guess costs the tiles in flight.
`gate_up` takes a tile that is in a lane from there instead of from host memory. A tile belongs to whoever raises its
state first; states carry the step and the layer (`tag`), so none is ever reset. No kernel of the step waits for this
one but for a tile that it has begun; this one waits for the step's kernels a bounded time.
Source of the guess: gates are nearly right one layer early (Eliseev & Mazur 2023; Fate, arXiv 2502.12224).
"""

# ruff: noqa: E741 (I is the experts' intermediate size everywhere)
from __future__ import annotations

import triton
import triton.language as tl

from expert_store.paging.kernels import copy_span

DISTANCES = tl.constexpr(2)
LAYERS_ALIVE = tl.constexpr(3)
NUM_LANES = tl.constexpr(6)
EXPERT_BITS = tl.constexpr(16)
NOBODY = tl.constexpr(0xFFFF)
TAKEN = tl.constexpr(1)
DONE = tl.constexpr(2)
_MOST_POLLS = tl.constexpr(8192)


@triton.jit
def _named(word, tag):
    """The expert that a word of `tag` names, or -1."""
    expert = (word & NOBODY).to(tl.int32)
    return tl.where(((word >> EXPERT_BITS) == tag) & (expert != NOBODY), expert, -1)


@triton.jit
def _watch(word):
    """A word that another kernel writes, the same for all threads; a plain scalar load would be one for each thread."""
    return tl.atomic_add(word, 0, sem="relaxed")


@triton.jit
def guessed_expert(guess, lane, tag):
    """The expert that a lane holds tiles of for the layer and step of `tag`, or -1."""
    return _named(_watch(guess + lane), tag)


@triton.jit
def staged_at(state, lane, tile, tag, tiles):
    """Whether a lane holds the tile: true once it is complete, false if the caller has to fetch it and nobody will."""
    at = state + lane * tiles + tile
    before = tl.atomic_max(at, tag * 4 + TAKEN, sem="relaxed")
    while before == tag * 4 + TAKEN:
        before = tl.load(at, volatile=True)
    if before == tag * 4 + DONE:
        before = tl.atomic_add(at, 0, sem="acquire")
    return before == tag * 4 + DONE


@triton.jit
def _agree(words, at, tag, expert):
    """Lets the first program to come decide for all: returns its `expert`, -1 for none. Others may have seen another
    page table, if the step's kernels have gone on meanwhile; so may a program's own threads."""
    old = _watch(words + at)
    if (old >> EXPERT_BITS) < tag:
        mine = (tag << EXPERT_BITS) | tl.where(expert < 0, NOBODY, expert).to(tl.int64)
        tl.atomic_cas(words + at, old, mine, sem="relaxed")
        old = _watch(words + at)
    return _named(old, tag)


@triton.jit
def _fetch_tiles(
    anchor, home, lane_at, state, lane, tag, progress, now, limit,
    H: tl.constexpr, I: tl.constexpr, BI: tl.constexpr, COPY: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Fetches this program's share of a guess's tiles, in order, until the next layer's router has decided."""
    TILES: tl.constexpr = (I + BI - 1) // BI
    tile = tl.program_id(0)
    while (tile < limit) & (_watch(progress) <= now):
        at = state + lane * TILES + tile
        if tl.atomic_max(at, tag * 4 + TAKEN, sem="relaxed") < tag * 4 + TAKEN:
            first = tile * BI * H
            size = tl.minimum(BI, I - tile * BI) * H
            copy_span(anchor, home + first, lane_at + first, size, COPY)
            copy_span(anchor, home + first + I * H, lane_at + first + I * H, size, COPY)
            tl.debug_barrier()
            tl.atomic_max(at, tag * 4 + DONE, sem="release")
        tile += PROGRAMS


@triton.jit
def _scores(
    scores, forced, masks, rows, page_table, step, target, distance, num_forced,
    K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, L: tl.constexpr,
    MASKED: tl.constexpr, FORCED: tl.constexpr,
):  # fmt: skip
    """Of layer `target`: guessed scores [EP] and which experts are among the best K by them and in no slot."""
    experts = tl.arange(0, EP)
    known = experts < E
    if FORCED:
        picks = tl.arange(0, KP)
        at = ((step % num_forced) * L + target) * 2 + distance
        ids = tl.load(forced + at * K + picks, mask=picks < K, other=-1)
        here = ids[None, :] == experts[:, None]
        score = tl.max(tl.where(here, (K - picks)[None, :].to(tl.float32), -1.0e30), axis=1)
    else:
        score = tl.load(scores + distance * E + experts, mask=known, other=-1.0e30, cache_modifier=".cg")
    if MASKED:
        row = tl.load(rows + experts * 0)
        visible = tl.load(masks + (row * L + target) * E + experts, mask=known & (row >= 0), other=0)
        score = tl.where(visible == 1, score, -1.0e30)
    before = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (experts[None, :] < experts[:, None])
    )
    rank = tl.sum((before & known[None, :]).to(tl.int32), axis=1)
    slot = tl.load(page_table + target * E + experts, mask=known, other=0)
    return score, (rank < K) & (slot < 0) & (score > -1.0e29)


@triton.jit
def _best(score, wanted):
    """The expert with the highest score among `wanted`, -1 if there is none."""
    best = tl.argmax(tl.where(wanted, score, -float("inf")), axis=0)
    return tl.where(tl.max(wanted.to(tl.int32), axis=0) > 0, best, -1)


@triton.jit(do_not_specialize=["layer", "num_forced", "limit"])
def fetch_ahead(
    normed, near, far, rows, masks, forced, scores, flags, guess, state, progress, idle, step_at, page_table,
    host_offset, anchor, lanes_at, layer, num_forced, limit,
    K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    I: tl.constexpr, L: tl.constexpr, BI: tl.constexpr, BE: tl.constexpr, COPY: tl.constexpr, PROGRAMS: tl.constexpr,
    MASKED: tl.constexpr, FORCED: tl.constexpr, SLEEP: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row's step, after the router of `layer`, beside what follows it; at most `limit` tiles of a guess.

    normed [H]: what that router read; near, far [E, H]: gates of the next two layers. Mutates scores [2, E], flags
    [PROGRAMS], guess [12] and state [6, tiles], all of them this kernel's alone but for `gate_up`'s claims; lanes_at is
    the offset of the lanes [6, 2 I H] from the anchor. progress: the last layer whose router has decided; idle: the
    last whose fetches have ended; both as step * L + layer. Grid (PROGRAMS,).
    """
    program = tl.program_id(0)
    step = tl.load(step_at).to(tl.int64)
    now = step * L + layer
    if _watch(progress) <= now:
        if not FORCED:
            cols = tl.arange(0, HP)
            inside = cols < H
            hidden = tl.load(normed + cols, mask=inside, other=0.0).to(tl.float32)
            for first in range(program * BE, E, PROGRAMS * BE):
                mine = first + tl.arange(0, BE)
                mask = (mine < E)[:, None] & inside[None, :]
                w = tl.load(near + mine[:, None] * H + cols[None, :], mask=mask, other=0.0)
                tl.store(scores + mine, tl.sum(w.to(tl.float32) * hidden[None, :], axis=1), mask=mine < E)
                w = tl.load(far + mine[:, None] * H + cols[None, :], mask=mask, other=0.0)
                tl.store(scores + E + mine, tl.sum(w.to(tl.float32) * hidden[None, :], axis=1), mask=mine < E)
            tl.debug_barrier()
        tl.atomic_max(flags + program, now, sem="release")
        polls = 0
        others = tl.arange(0, THREADS) % PROGRAMS
        missing = 1
        while (missing > 0) & (polls < _MOST_POLLS):
            late = tl.load(flags + others, volatile=True) < now
            late = (late | (tl.load(idle + others * 0, volatile=True) < now)).to(tl.int32)
            if SLEEP:
                late = tl.inline_asm_elementwise(
                    "nanosleep.u32 300; mov.b32 $0, $1;", "=r,r", [late], dtype=tl.int32, is_pure=False, pack=1
                )
            missing = tl.sum(late, axis=0)
            polls += 1
        if missing == 0:
            tl.atomic_add(flags + program, 0, sem="acquire")
            tl.debug_barrier()
            span = 2 * I * H
            score, wanted = _scores(
                scores, forced, masks, rows, page_table, step, layer + 1, 0, num_forced,
                K, KP, E, EP, L, MASKED, FORCED,
            )  # fmt: skip
            tag = now + 1
            experts = tl.arange(0, EP)
            lane = ((layer + 1) % LAYERS_ALIVE) * DISTANCES
            known = guessed_expert(guess, lane + 1, tag)
            if known >= 0:
                still = tl.max(tl.where((experts == known) & wanted, 1, 0), axis=0) > 0
                known = _agree(guess, NUM_LANES + lane + 1, tag, tl.where(still, known, -1))
                if known >= 0:
                    home = tl.multiple_of(tl.load(host_offset + (layer + 1) * E + known), 8)
                    _fetch_tiles(
                        anchor, home, tl.multiple_of(lanes_at + (lane + 1) * span, 8), state,
                        lane + 1, tag, progress, now, limit, H, I, BI, COPY, PROGRAMS,
                    )  # fmt: skip
            best = _agree(guess, lane, tag, _best(score, wanted & (experts != known)))
            if best >= 0:
                home = tl.multiple_of(tl.load(host_offset + (layer + 1) * E + best), 8)
                _fetch_tiles(
                    anchor, home, tl.multiple_of(lanes_at + lane * span, 8), state,
                    lane, tag, progress, now, limit, H, I, BI, COPY, PROGRAMS,
                )  # fmt: skip
            if layer + 2 < L:
                score, wanted = _scores(
                    scores, forced, masks, rows, page_table, step, layer + 2, 1, num_forced,
                    K, KP, E, EP, L, MASKED, FORCED,
                )  # fmt: skip
                lane = ((layer + 2) % LAYERS_ALIVE) * DISTANCES + 1
                best = _agree(guess, lane, tag + 1, _best(score, wanted))
                if best >= 0:
                    home = tl.multiple_of(tl.load(host_offset + (layer + 2) * E + best), 8)
                    _fetch_tiles(
                        anchor, home, tl.multiple_of(lanes_at + lane * span, 8), state,
                        lane, tag + 1, progress, now, limit, H, I, BI, COPY, PROGRAMS,
                    )  # fmt: skip
