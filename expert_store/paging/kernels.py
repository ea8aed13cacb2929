"""Triton device functions of paging: they make a work list from a batch's choice of experts, and fetch missing experts.

They run inside the caller's kernels (`server.model.device`), so that a decode step never returns to the host. One
program makes a layer's work list (`list_work`); any number of programs may fetch (`copy_span`). Invariants, for layer
l:
`slot_owner[l, page_table[l, e]] == e` for every resident e; a slot used in step t has `last_use == t` and is never a
victim in t; a miss that finds no victim goes to the spill area, which belongs to no layer and is in no page table.
All offsets count elements of the weights' dtype from one anchor tensor, also those of pinned host memory (one address
space).
"""

# Triton code is Python that mypy cannot follow: see the override for `*.kernels` in pyproject.toml.
from __future__ import annotations

import triton
import triton.language as tl

LRU = tl.constexpr(0)
LFU = tl.constexpr(1)

# Marks an entry of `pair_target` whose expert is being fetched; it is larger than any offset.
FETCHED = tl.constexpr(1 << 62)
_NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # sorts after every slot that may be evicted


@triton.jit
def copy_span(anchor, source, target, num_elements, BLOCK: tl.constexpr):
    """Copies `num_elements` elements from anchor+source to anchor+target.

    The caller marks both offsets with `tl.multiple_of(…, 8)` where it loads them (the mark is lost on an argument),
    or the copy moves single elements.
    """
    lanes = tl.arange(0, BLOCK)
    for start in range(0, num_elements, BLOCK):
        inside = start + lanes < num_elements
        data = tl.load(anchor + source + start + lanes, mask=inside, cache_modifier=".cg")
        tl.store(anchor + target + start + lanes, data, mask=inside)


@triton.jit
def _rank_victims(
    layer, step, slot_owner, last_use, use_count, kept, scratch,
    E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Writes the evictable slots of a layer to scratch[SP:], best victim first; returns how many there are."""
    slots = tl.arange(0, SP)
    inside = slots < S
    owner = tl.load(slot_owner + layer * S + slots, mask=inside, other=-1)
    used = tl.load(last_use + layer * S + slots, mask=inside, other=0)
    never = tl.load(kept + layer * S + slots, mask=inside, other=1)
    evictable = inside & (used != step) & (never == 0)
    key = used.to(tl.int64)
    if POLICY == LFU:
        count = tl.load(use_count + layer * E + owner, mask=inside & (owner >= 0), other=0)
        key = (count.to(tl.int64) << 32) | key
    key = tl.where(owner < 0, -1, key)
    key = tl.where(evictable, key, _NEVER)
    tl.store(scratch + slots, key)
    tl.debug_barrier()
    rank = tl.zeros([SP], tl.int32)
    CHUNK: tl.constexpr = 32 if SP >= 32 else SP
    for start in range(0, SP, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_key = tl.load(scratch + other)
        before = (other_key[None, :] < key[:, None]) | (
            (other_key[None, :] == key[:, None]) & (other[None, :] < slots[:, None])
        )
        rank += tl.sum(before.to(tl.int32), axis=1)
    tl.store(scratch + SP + rank, slots.to(tl.int64), mask=evictable)
    tl.debug_barrier()
    return tl.sum(evictable.to(tl.int32), axis=0)


@triton.jit
def list_work(
    chosen, order, slot, pool, spill, layer, step,
    page_table, slot_owner, last_use, use_count, kept, host_offset, stats,
    header, target, source, count, pairs, pair_target, pair_source, scratch, span,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    BP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr, PAIRS: tl.constexpr, STRIDE: tl.constexpr,
    POLICY: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Makes a work list from one layer's choice, and evicts experts if necessary; called by exactly one program.

    chosen [BP, EP] bool: row b picked expert e, as its order[b, e]-th pick; slot [EP] is the layer's page table; pool
    and spill are the offsets of its slots and of the spill area. Mutates the layer's page table, slot owners, last
    uses, use counts and stats [L, 4] (distinct experts that hit, that missed, that spilled; steps). Writes header
    (distinct experts, misses), then for each distinct expert d, misses first: target[d], source[d] (0: it is there),
    count[d] and pairs[d, :count] (b * K + pick; rows of STRIDE); and pair_target[b * K + pick], plus FETCHED if it
    was missing (then pair_source has its offset in host memory), -1 where nothing was picked.
    """
    rows = tl.arange(0, BP)
    experts = tl.arange(0, EP)
    known = experts < E
    picks = chosen.to(tl.int32)
    tokens = tl.sum(picks, axis=0)
    wanted = tokens > 0
    hit = wanted & (slot >= 0)
    miss = wanted & (slot < 0)
    num_miss = tl.sum(miss.to(tl.int32), axis=0)
    num_hit = tl.sum(hit.to(tl.int32), axis=0)
    miss_index = tl.cumsum(miss.to(tl.int32), axis=0) - 1
    hit_index = tl.cumsum(hit.to(tl.int32), axis=0) - 1
    num_spilled = 0
    if PAGED:
        tl.store(last_use + layer * S + slot, step, mask=hit)
        if num_miss > 0:
            tl.debug_barrier()
            num_victims = _rank_victims(
                layer, step, slot_owner, last_use, use_count, kept, scratch, E, S, SP, POLICY
            )  # fmt: skip
            placed = miss & (miss_index < num_victims)
            victim = tl.load(scratch + SP + miss_index, mask=placed, other=0).to(tl.int32)
            evicted = tl.load(slot_owner + layer * S + victim, mask=placed, other=-1)
            tl.store(page_table + layer * E + evicted, -1, mask=placed & (evicted >= 0))
            tl.debug_barrier()
            tl.store(page_table + layer * E + experts, victim, mask=placed)
            tl.store(slot_owner + layer * S + victim, experts, mask=placed)
            tl.store(last_use + layer * S + victim, step, mask=placed)
            slot = tl.where(placed, victim, slot)
            num_spilled = tl.maximum(num_miss - num_victims, 0)
            slot = tl.where(miss & (miss_index >= num_victims), S + miss_index - num_victims, slot)
    wide_slot = slot.to(tl.int64)
    offset = tl.where(wide_slot < S, pool + wide_slot * span, spill + (wide_slot - S) * span)
    home = tl.load(host_offset + layer * E + experts, mask=miss, other=0)
    index = tl.where(miss, miss_index, num_miss + hit_index)
    tl.store(header, num_miss + num_hit)
    tl.store(header + 1, num_miss)
    tl.store(target + index, offset, mask=wanted)
    tl.store(source + index, tl.where(miss, home, 0), mask=wanted)
    tl.store(count + index, tokens, mask=wanted)
    pair = rows[:, None] * K + order
    before = tl.cumsum(picks, axis=0) - picks
    tl.store(pairs + index[None, :] * STRIDE + before, pair, mask=chosen)
    tl.store(pair_target + tl.arange(0, PAIRS), -1)
    tl.debug_barrier()
    tl.store(
        pair_target + pair, tl.broadcast_to(tl.where(miss, offset + FETCHED, offset)[None, :], [BP, EP]), mask=chosen
    )
    if PAGED:
        tl.store(pair_source + pair, tl.broadcast_to(home[None, :], [BP, EP]), mask=chosen & miss[None, :])
        uses = tl.load(use_count + layer * E + experts, mask=known, other=0)
        tl.store(use_count + layer * E + experts, uses + tokens, mask=known & wanted)
        tl.store(stats + layer * 4, tl.load(stats + layer * 4) + num_hit)
        tl.store(stats + layer * 4 + 1, tl.load(stats + layer * 4 + 1) + num_miss)
        tl.store(stats + layer * 4 + 2, tl.load(stats + layer * 4 + 2) + num_spilled)
        tl.store(stats + layer * 4 + 3, tl.load(stats + layer * 4 + 3) + 1)
