"""Router of one layer in one kernel: norm, gate, top-k under each row's mask, and the layer's work list.

Programs compute gate logits for a few experts of one row. The last of a row to finish chooses for it, and the last of
all lists the work (`expert_store.paging.kernels.list_work`), so a row's choice and weights are the same instructions
for every batch size. The choice is exact under a mask: hidden experts get -inf before they are scored, so weights equal
those of a checkpoint without them. If fewer than K experts are available, the other picks have the sentinel id E and
weight 0, and are neither in the work list nor computed. `server.model.device.step.router_kind` sets the switches for
differences between families; the scores are in `kernels.scores`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expert_store.paging.kernels import list_work
from server.model.device.kernels.packed import factor
from server.model.device.kernels.scores import mixed_weights, softmax, top_k, weights_of, within_groups
from server.model.device.kernels.trunk import norm_row, normalise, scaled

# In a row's mask: the row may have the expert, but it is not in reach. The host finds it in the step's log, reads the
# expert and runs the step again.
ABSENT = tl.constexpr(2)


@triton.jit
def _scores(
    logits, at, known, temperatures, row, EP: tl.constexpr, TEMPERED: tl.constexpr, SIGMOID: tl.constexpr,
    BY_LOGITS: tl.constexpr, logits_dtype: tl.constexpr, scores_dtype: tl.constexpr,
):  # fmt: skip
    """The scores [1, EP] of the experts from a row's logits, -inf outside `known`, and what the choice is made by."""
    score = tl.load(logits + at, mask=known, other=-float("inf"), cache_modifier=".cg")
    if TEMPERED:
        heat = tl.load(temperatures + row, mask=row >= 0, other=1.0).to(logits_dtype).to(tl.float32)
        score = tl.div_rn(score, tl.broadcast_to(heat[:, None], [1, EP])).to(logits_dtype).to(tl.float32)
    choice = score
    if SIGMOID:
        score = (1.0 / (1.0 + tl.exp(-score))).to(scores_dtype).to(tl.float32)
        if not BY_LOGITS:
            choice = score
    return score, choice


@triton.jit(do_not_specialize=["layer"])
def route(
    x, norm, gate_norm, gate, gate_bias, selection_bias, expert_factors, normed, planes, logits, arrived, choices,
    ranges, rows, masks, temperatures, bias_range, adapters, delta, gains, changed,
    log_ids, log_weights, log_demand, log_mass, layer, step_at,
    page_table, slot_owner, last_use, use_count, kept, host_offset, pool_offset, stats,
    header, target, source, count, pairs, pair_target, pair_source, weights, scratch, span, eps, resident_bias,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    BP: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr, HP: tl.constexpr, PAIRS: tl.constexpr,
    STRIDE: tl.constexpr, BE: tl.constexpr, POLICY: tl.constexpr, PAGED: tl.constexpr, MASKED: tl.constexpr,
    BIASED: tl.constexpr, PLANES: tl.constexpr, PLANE_CODES: tl.constexpr, NORM: tl.constexpr,
    GATE_NORM: tl.constexpr, SIGMOID: tl.constexpr, BY_LOGITS: tl.constexpr,
    RENORMALISE: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr, SCALE: tl.constexpr,
    GROUPS: tl.constexpr, GP: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr,
    GATE_BIAS: tl.constexpr, EXPERT_FACTORS: tl.constexpr, SELECTION_BIAS: tl.constexpr,
    TOLERANCE: tl.constexpr, EXACT_LOGITS: tl.constexpr, EXACT_SCORES: tl.constexpr,
    EXACT_WEIGHTS: tl.constexpr, NARROW: tl.constexpr, ADAPTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Routes x [B, H]; writes its norm, that of experts, to normed [B, H], the same in `planes` [B, PLANES, H / PLANES]
    (see `packed`), weights [B, K], the work list (see `list_work`) and the step's log [L, B, K].

    masks [rows, L, E] int8 (0: hidden, 1: available, ABSENT: chosen and logged as if it were there, then left out of
    work list and experts) and temperatures [rows] fp32, which divide the logits, are a row's own (MASKED); bias_range
    [L] fp32 is the running range of what the choice is made by, logits or scores (BIASED; mutated). gate_bias,
    selection_bias and expert_factors, which multiply the weights, are [E] fp32. GATE_NORM: if it is not 0, the gate
    reads this times x normalised by gate_norm, and not what experts read. choices [B, E] int8 and ranges [B] fp32 carry
    the rows' choices to the last program. NARROW: the choice is made by values that bf16 holds. Grid (E / BE, B); the
    last program lists the work.

    ADAPTED (with MASKED; see `trunk`): delta [adapters, E, H] is added to the gate for the choice, not for the demand,
    whose logits are those of `logits`; `changed` [B, E] has those of the choice. The weight of a chosen expert is
    multiplied by gains [1 + adapters, E] fp32.
    """
    if PDL:
        gdc_launch_dependents()
    part, batch = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = x.dtype.element_ty
    logits_dtype: tl.constexpr = tl.float32 if EXACT_LOGITS else x.dtype.element_ty
    scores_dtype: tl.constexpr = tl.float32 if EXACT_SCORES else x.dtype.element_ty
    weights_dtype: tl.constexpr = tl.float32 if EXACT_WEIGHTS else x.dtype.element_ty
    cols = tl.arange(0, HP)
    inside = cols < H
    mine = part * BE + tl.arange(0, BE)
    w = tl.load(gate + mine[:, None] * H + cols[None, :], mask=(mine < E)[:, None] & inside[None, :], other=0.0)
    if ADAPTED:
        adapter = tl.load(adapters + batch)
        norm += adapter * H
        gains += adapter * E
    if NORM:
        scale = tl.load(norm + cols, mask=inside, other=0.0)
    one = batch + tl.arange(0, 1)
    experts = tl.arange(0, EP)
    row = tl.load(rows + one)
    slot = tl.load(page_table + layer * E + experts, mask=experts < E, other=-1)
    pool = tl.load(pool_offset + layer)
    spill = tl.load(pool_offset + L)
    if PDL:
        gdc_wait()
    hidden = tl.load(x + batch * H + cols, mask=inside, other=0.0)
    stream = hidden
    if NORM:
        hidden = norm_row(stream.to(tl.float32), scale, norm, cols, eps, H, dtype, NORM)
    if part == 0:
        tl.store(normed + batch * H + cols, hidden, mask=inside)
    gated = hidden
    if GATE_NORM != 0.0:
        own = tl.load(gate_norm + cols, mask=inside, other=0.0)
        gated = scaled(normalise(stream.to(tl.float32), own, eps, H, dtype), dtype, GATE_NORM).to(dtype)
    gate_score = tl.sum(w.to(tl.float32) * gated.to(tl.float32)[None, :], axis=1)
    if GATE_BIAS:
        gate_score += tl.load(gate_bias + mine, mask=mine < E, other=0.0)
    gate_score = gate_score.to(logits_dtype).to(tl.float32)
    tl.store(logits + batch * E + mine, gate_score, mask=mine < E)
    if ADAPTED:
        if adapter > 0:
            d_at = delta + ((adapter - 1).to(tl.int64) * E + mine)[:, None] * H + cols[None, :]
            d = tl.load(d_at, mask=(mine < E)[:, None] & inside[None, :], other=0.0)
            change = tl.sum(d.to(tl.float32) * gated.to(tl.float32)[None, :], axis=1)
            gate_score = (gate_score + change.to(logits_dtype).to(tl.float32)).to(logits_dtype).to(tl.float32)
        tl.store(changed + batch * E + mine, gate_score, mask=mine < E)
    tl.debug_barrier()
    num_arrived = tl.atomic_add(arrived + 1 + batch, 1)
    if PLANES > 1 and part == 0:
        in_planes = hidden.to(tl.float32) * factor(cols % PLANES, PLANE_CODES)
        tl.store(planes + batch * H + cols % PLANES * (H // PLANES) + cols // PLANES, in_planes, mask=inside)
    if num_arrived == tl.num_programs(0) - 1:
        tl.store(arrived + 1 + batch, 0)
        step = tl.load(step_at)
        picks = tl.arange(0, KP)
        known = (row >= 0)[:, None] & (experts < E)[None, :]
        at = one[:, None] * E + experts[None, :]
        log_at = (layer * B + one[:, None]) * K + picks[None, :]
        log_mask = (picks < K)[None, :]
        allowed = known
        SAME: tl.constexpr = not SELECTION_BIAS and not BY_LOGITS
        score, choice = _scores(
            logits, at, known, temperatures, row, EP, MASKED, SIGMOID, BY_LOGITS, logits_dtype, scores_dtype
        )
        if SELECTION_BIAS:
            bias = tl.load(selection_bias + experts, mask=experts < E, other=0.0)[None, :]
            choice = (choice if SIGMOID else softmax(score, known)) + bias
        if MASKED:
            wanted = known
            if GROUPS > 1:
                wanted = within_groups(choice, known, K, E, 1, EP, GROUPS, GP, KEPT, BEST)
            held, rank, demand_ids, demand_values = top_k(choice, score, wanted, K, KP, 1, EP, SAME, NARROW)
            tl.store(log_demand + log_at, tl.where(demand_ids < 0, E, demand_ids), mask=log_mask)
            mass = weights_of(demand_values, score, known, SIGMOID, RENORMALISE, EPS, FLOOR, SCALE, weights_dtype)
            if TOLERANCE > 0.0:
                mass = mixed_weights(demand_values, score, known, held, rank, K, KP, TOLERANCE, weights_dtype)
            if EXPERT_FACTORS:
                mass *= tl.load(expert_factors + demand_ids, mask=demand_ids >= 0, other=0.0)
            tl.store(log_mass + log_at, mass, mask=log_mask)
            visible = tl.load(masks + (row[:, None] * L + layer) * E + experts[None, :], mask=known, other=0)
            allowed = known & (visible != 0)
            if ADAPTED:
                score, choice = _scores(
                    changed, at, known, temperatures, row, EP, True, SIGMOID, BY_LOGITS, logits_dtype, scores_dtype
                )
                if SELECTION_BIAS:
                    choice += bias
            if SELECTION_BIAS and not SIGMOID:
                choice = softmax(score, allowed) + bias
        if BIASED:
            spread = tl.max(tl.where(known, choice, -float("inf")), axis=1)
            spread -= tl.min(tl.where(known, choice, float("inf")), axis=1)
            tl.store(ranges + one, tl.where(row >= 0, spread, -1.0))
            before = tl.load(bias_range + layer)
            spread = tl.where(before > 0.0, 0.9 * before + 0.1 * spread, spread)
            choice = choice + tl.where(slot >= 0, resident_bias * spread[:, None], 0.0)
        eligible = allowed
        if GROUPS > 1:
            eligible = within_groups(choice, allowed, K, E, 1, EP, GROUPS, GP, KEPT, BEST)
        chosen, order, ids, values = top_k(
            choice, score, eligible, K, KP, 1, EP, SAME and not BIASED, NARROW and not BIASED
        )  # fmt: skip
        weight = weights_of(values, score, allowed, SIGMOID, RENORMALISE, EPS, FLOOR, SCALE, weights_dtype)
        if TOLERANCE > 0.0:
            weight = mixed_weights(values, score, allowed, chosen, order, K, KP, TOLERANCE, weights_dtype)
        if EXPERT_FACTORS:
            weight *= tl.load(expert_factors + ids, mask=ids >= 0, other=0.0)
        if ADAPTED:
            gain = tl.load(gains + ids, mask=ids >= 0, other=1.0)
            weight = (weight * gain).to(weights_dtype).to(tl.float32)
        tl.store(log_ids + log_at, tl.where(ids < 0, E, ids), mask=log_mask)
        tl.store(log_weights + log_at, weight, mask=log_mask)
        if MASKED:
            chosen = chosen & (visible != ABSENT)
            mark = tl.load(masks + (row[:, None] * L + layer) * E + ids, mask=(row >= 0)[:, None] & (ids >= 0), other=0)
            weight = tl.where(mark == ABSENT, 0.0, weight)
        tl.store(weights + one[:, None] * K + picks[None, :], weight, mask=log_mask)
        is_last = True
        if B > 1:
            taken = tl.where(chosen, order, -1).to(tl.int8)
            tl.store(choices + one[:, None] * E + experts[None, :], taken, mask=(experts < E)[None, :])
            tl.debug_barrier()
            is_last = tl.atomic_add(arrived, 1) == B - 1
        if is_last:
            batches = tl.arange(0, BP)
            orders = order
            picked = chosen
            if B > 1:
                tl.store(arrived, 0)
                orders = tl.load(
                    choices + batches[:, None] * E + experts[None, :],
                    mask=(batches < B)[:, None] & (experts < E)[None, :], other=-1, cache_modifier=".cg",
                ).to(tl.int32)  # fmt: skip
                picked = orders >= 0
                orders = tl.maximum(orders, 0)
            if BIASED:
                tl.debug_barrier()
                seen = tl.load(ranges + batches, mask=batches < B, other=-1.0, cache_modifier=".cg")
                num_rows = tl.sum((seen >= 0.0).to(tl.float32), axis=0)
                mean = tl.sum(tl.maximum(seen, 0.0), axis=0) / tl.maximum(num_rows, 1.0)
                before = tl.load(bias_range + layer)
                tl.store(bias_range + layer, tl.where(before > 0.0, 0.9 * before + 0.1 * mean, mean))
            list_work(
                picked, orders, slot, pool, spill, layer, step,
                page_table, slot_owner, last_use, use_count, kept, host_offset, stats,
                header, target, source, count, pairs, pair_target, pair_source, scratch, span,
                B, K, E, S, BP, EP, SP, PAIRS, STRIDE, POLICY, PAGED,
            )  # fmt: skip
