"""Router of one layer in one kernel: norm, gate, top-k under each row's mask, and the paging plan.

Programs compute gate logits for a few experts of one row; the last to finish chooses for all rows and plans the layer
(`expert_store.paging.kernels.plan_layer`). The choice is exact under a mask: hidden experts get -inf before the
softmax, so weights equal those of a checkpoint without them; where fewer than K are available the rest of the picks
carry the sentinel id E and weight 0 and reach neither the plan nor the experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expert_store.paging.kernels import plan_layer
from server.model.device.kernels.trunk import normalise

# In a row's mask: the row may have the expert, which is nowhere in reach yet. The log tells the host, which brings it
# and runs the step again.
ABSENT = tl.constexpr(2)


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
def _weights(values, logits, allowed, RENORMALISE: tl.constexpr, dtype: tl.constexpr):
    """Softmax over the allowed logits, of the picked values [BP, KP]; 0 past the available. Rounded like
    transformers.
    """
    peak = tl.max(tl.where(allowed, logits, -float("inf")), axis=1)
    peak = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.exp(values - peak[:, None])
    if RENORMALISE:
        total = tl.sum(mass, axis=1)
    else:
        total = tl.sum(tl.where(allowed, tl.exp(logits - peak[:, None]), 0.0), axis=1)
    total = tl.where(total > 0.0, total, 1.0)
    return (mass / total[:, None]).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["layer", "num_forced"])
def route(
    x, norm, gate, normed, logits, arrived, rows, masks, temperatures, forced, bias_range,
    log_ids, log_weights, log_demand, log_mass, layer, step_at,
    page_table, slot_owner, last_use, use_count, pinned, host_offset, pool_offset, stats,
    header, target, source, count, pairs, pair_target, pair_source, weights, scratch, span, eps, resident_bias,
    num_forced,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    BP: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr, HP: tl.constexpr, PAIRS: tl.constexpr,
    STRIDE: tl.constexpr, BE: tl.constexpr, POLICY: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
    FORCED: tl.constexpr,
    BIASED: tl.constexpr, RENORMALISE: tl.constexpr, NARROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Routes x [B, H]; writes normed [B, H], weights [B, K], the work list (see `plan_layer`) and the step's log [L,
    B, K].

    masks [rows, L, E] int8 (0: hidden, 1: available, ABSENT: chosen and logged as if it were there, then left out of
    plan and experts) and temperatures [rows] fp32, which divide the logits, are a row's own (MASKED); forced
    [num_forced, L, B, K] int32 replaces the choice (FORCED, for replayed traces), bias_range [L] fp32 is the running
    range of the logits (BIASED; mutated). Grid (E / BE, B); the last program plans.
    """
    if PDL:
        gdc_launch_dependents()
    part, batch = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = x.dtype.element_ty
    cols = tl.arange(0, HP)
    inside = cols < H
    mine = part * BE + tl.arange(0, BE)
    w = tl.load(gate + mine[:, None] * H + cols[None, :], mask=(mine < E)[:, None] & inside[None, :], other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0)
    batches = tl.arange(0, BP)
    experts = tl.arange(0, EP)
    row = tl.load(rows + batches, mask=batches < B, other=-1)
    slot = tl.load(page_table + layer * E + experts, mask=experts < E, other=-1)
    pool = tl.load(pool_offset + layer)
    spill = tl.load(pool_offset + L)
    if PDL:
        gdc_wait()
    hidden = tl.load(x + batch * H + cols, mask=inside, other=0.0)
    hidden = normalise(hidden.to(tl.float32), scale, eps, H, dtype)
    if part == 0:
        tl.store(normed + batch * H + cols, hidden, mask=inside)
    gate_score = tl.sum(w.to(tl.float32) * hidden.to(tl.float32)[None, :], axis=1).to(dtype).to(tl.float32)
    tl.store(logits + batch * E + mine, gate_score, mask=mine < E)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(arrived, 0)
        step = tl.load(step_at)
        picks = tl.arange(0, KP)
        known = (row >= 0)[:, None] & (experts < E)[None, :]
        score = tl.load(
            logits + batches[:, None] * E + experts[None, :], mask=known, other=-float("inf"), cache_modifier=".cg"
        )
        log_at = (layer * B + batches[:, None]) * K + picks[None, :]
        log_mask = (batches < B)[:, None] & (picks < K)[None, :]
        allowed = known
        if MASKED:
            heat = tl.load(temperatures + row, mask=row >= 0, other=1.0).to(dtype).to(tl.float32)
            score = tl.div_rn(score, tl.broadcast_to(heat[:, None], [BP, EP])).to(dtype).to(tl.float32)
            _, _, demand_ids, demand_values = top_k(score, score, known, K, KP, BP, EP, True, NARROW)
            tl.store(log_demand + log_at, tl.where(demand_ids < 0, E, demand_ids), mask=log_mask)
            tl.store(log_mass + log_at, _weights(demand_values, score, known, RENORMALISE, dtype), mask=log_mask)
            visible = tl.load(masks + (row[:, None] * L + layer) * E + experts[None, :], mask=known, other=0)
            allowed = known & (visible != 0)
        choice = score
        if BIASED:
            peak = tl.max(tl.where(known, score, -float("inf")), axis=1)
            floor = tl.min(tl.where(known, score, float("inf")), axis=1)
            num_rows = tl.sum((row >= 0).to(tl.float32), axis=0)
            spread = tl.sum(tl.where(row >= 0, peak - floor, 0.0), axis=0) / tl.maximum(num_rows, 1.0)
            before = tl.load(bias_range + layer)
            spread = tl.where(before > 0.0, 0.9 * before + 0.1 * spread, spread)
            tl.store(bias_range + layer, spread)
            choice = score + tl.where(slot >= 0, resident_bias * spread, 0.0)[None, :]
        if FORCED:
            chosen = tl.zeros([BP, EP], tl.int32) > 0
            order = tl.zeros([BP, EP], tl.int32)
            ids = tl.load(
                forced + ((step % num_forced).to(tl.int64) * L + layer) * B * K + batches[:, None] * K + picks[None, :],
                mask=log_mask, other=-1,
            )  # fmt: skip
            values = tl.full([BP, KP], -float("inf"), tl.float32)
            for k in tl.static_range(K):
                expert = tl.max(tl.where((picks == k)[None, :], ids, -1), axis=1)
                here = (experts[None, :] == expert[:, None]) & known
                chosen = chosen | here
                order = tl.where(here, k, order)
                value = tl.max(tl.where(here, score, -float("inf")), axis=1)
                values = tl.where((picks == k)[None, :], value[:, None], values)
        else:
            chosen, order, ids, values = top_k(choice, score, allowed, K, KP, BP, EP, not BIASED, NARROW and not BIASED)
        weight = _weights(values, score, allowed, RENORMALISE, dtype)
        pick_at = batches[:, None] * K + picks[None, :]
        tl.store(log_ids + log_at, tl.where(ids < 0, E, ids), mask=log_mask)
        tl.store(log_weights + log_at, weight, mask=log_mask)
        if MASKED:
            chosen = chosen & (visible != ABSENT)
            mark = tl.load(masks + (row[:, None] * L + layer) * E + ids, mask=(row >= 0)[:, None] & (ids >= 0), other=0)
            weight = tl.where(mark == ABSENT, 0.0, weight)
        tl.store(weights + pick_at, weight, mask=log_mask)
        plan_layer(
            chosen, order, slot, pool, spill, layer, step,
            page_table, slot_owner, last_use, use_count, pinned, host_offset, stats,
            header, target, source, count, pairs, pair_target, pair_source, scratch, span,
            B, K, E, S, BP, EP, SP, PAIRS, STRIDE, POLICY, PAGED,
        )  # fmt: skip
