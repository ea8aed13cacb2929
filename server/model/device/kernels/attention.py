"""One token's grouped-query attention over its row's KV memory: head norms, rotary, cache write, split softmax.

A program handles one KV head of one sequence over one split of its cached tokens; the last program of a head to finish
(counted on the device) joins the splits in their order, so the result does not depend on who was last. The new token's
key and value come from registers: split 0 scores and stores them.
Source of the split: Flash-Decoding (Dao et al., 2023). Rotary in halves, as transformers' `rotate_half`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _head(ptr, norm, cos, sin, eps, heads, valid, D: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr):
    """Loads head rows [R, D], normalises and rotates them; returns the halves [R, D / 2] in the model's dtype."""
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    at = ptr + heads[:, None] * D + half[None, :]
    low = tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=valid[:, None], other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / D + eps)
        w_low = tl.load(norm + half).to(tl.float32)
        w_high = tl.load(norm + HALF + half).to(tl.float32)
        low = ((low * scale[:, None]).to(dtype).to(tl.float32) * w_low[None, :]).to(dtype).to(tl.float32)
        high = ((high * scale[:, None]).to(dtype).to(tl.float32) * w_high[None, :]).to(dtype).to(tl.float32)
    rotated_low = low * cos[None, :] - high * sin[None, :]
    rotated_high = high * cos[None, :] + low * sin[None, :]
    return rotated_low.to(dtype), rotated_high.to(dtype)


@triton.jit
def attend(
    qkv, q_norm, k_norm, cos_table, sin_table, rows, lengths, keys, values, out,
    part_max, part_sum, part_out, arrived, eps, scaling, max_tokens,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, GP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, NUM_HEADS * D] from qkv [B, (NUM_HEADS + 2 NUM_KV) * D]; writes position lengths[row] of keys and values
    [rows, NUM_KV, max_tokens, D]. A batch entry with row -1 is skipped. Grid (SPLITS, NUM_KV, B)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + batch)
    if row >= 0:
        dtype: tl.constexpr = qkv.dtype.element_ty
        GROUP: tl.constexpr = NUM_HEADS // NUM_KV
        HALF: tl.constexpr = D // 2
        half = tl.arange(0, HALF)
        group = tl.arange(0, GP)
        position = tl.load(lengths + row)
        per_split = tl.cdiv(tl.cdiv(position, SPLITS), BLOCK) * BLOCK
        num_splits = tl.maximum(tl.cdiv(position, tl.maximum(per_split, 1)), 1)
        if split < num_splits:
            cos = tl.load(cos_table + position * HALF + half)
            sin = tl.load(sin_table + position * HALF + half)
            mine = qkv + batch * (NUM_HEADS + 2 * NUM_KV) * D
            q_low, q_high = _head(mine, q_norm, cos, sin, eps, kv_head * GROUP + group, group < GROUP, D, NORM, dtype)
            cache = (row.to(tl.int64) * NUM_KV + kv_head) * max_tokens * D
            full = tl.arange(0, D)
            peak = tl.full([GP], -float("inf"), tl.float32)
            total = tl.zeros([GP], tl.float32)
            acc = tl.zeros([GP, D], tl.float32)
            if split == 0:
                one = tl.arange(0, 1)
                k_low, k_high = _head(
                    mine + NUM_HEADS * D, k_norm, cos, sin, eps, kv_head + one, one < 1, D, NORM, dtype
                )  # fmt: skip
                v_new = tl.load(mine + (NUM_HEADS + NUM_KV + kv_head) * D + full)
                here = cache + position.to(tl.int64) * D
                tl.store(keys + here + half[None, :], k_low)
                tl.store(keys + here + HALF + half[None, :], k_high)
                tl.store(values + here + full, v_new)
                peak = scaling * (
                    tl.sum(q_low.to(tl.float32) * k_low.to(tl.float32), axis=1)
                    + tl.sum(q_high.to(tl.float32) * k_high.to(tl.float32), axis=1)
                )
                total += 1.0
                acc += v_new.to(tl.float32)[None, :]
            begin = split * per_split
            end = tl.minimum(begin + per_split, position)
            for start in range(begin, end, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                inside = tokens < end
                k_at = keys + cache + tokens[None, :] * D + half[:, None]
                k_low = tl.load(k_at, mask=inside[None, :], other=0.0)
                k_high = tl.load(k_at + HALF, mask=inside[None, :], other=0.0)
                v = tl.load(values + cache + tokens[:, None] * D + full[None, :], mask=inside[:, None], other=0.0)
                score = tl.dot(q_low, k_low, input_precision="ieee")
                score = tl.dot(q_high, k_high, score, input_precision="ieee") * scaling
                score = tl.where(inside[None, :], score, -float("inf"))
                new_peak = tl.maximum(peak, tl.max(score, axis=1))
                decay = tl.exp(peak - new_peak)
                weight = tl.exp(score - new_peak[:, None])
                total = total * decay + tl.sum(weight, axis=1)
                acc = tl.dot(weight.to(dtype), v, acc * decay[:, None], input_precision="ieee")
                peak = new_peak
            heads = kv_head * GROUP + group
            mask = group < GROUP
            out_at = out + (batch * NUM_HEADS + heads[:, None]) * D + full[None, :]
            if num_splits == 1:
                tl.store(out_at, (acc / total[:, None]).to(dtype), mask=mask[:, None])
            else:
                part = (batch * NUM_HEADS + heads) * SPLITS
                tl.store(part_max + part + split, peak, mask=mask)
                tl.store(part_sum + part + split, total, mask=mask)
                tl.store(part_out + (part + split)[:, None] * D + full[None, :], acc, mask=mask[:, None])
                tl.debug_barrier()
                counter = arrived + batch * NUM_KV + kv_head
                if tl.atomic_add(counter, 1) == num_splits - 1:
                    tl.store(counter, 0)
                    splits = tl.arange(0, SPLITS)
                    done = splits < num_splits
                    for g in tl.static_range(GROUP):
                        one_part = (batch * NUM_HEADS + kv_head * GROUP + g) * SPLITS
                        peaks = tl.load(
                            part_max + one_part + splits, mask=done, other=-float("inf"), cache_modifier=".cg"
                        )
                        totals = tl.load(part_sum + one_part + splits, mask=done, other=0.0, cache_modifier=".cg")
                        parts = tl.load(
                            part_out + (one_part + splits)[:, None] * D + full[None, :],
                            mask=done[:, None], other=0.0, cache_modifier=".cg",
                        )  # fmt: skip
                        gain = tl.exp(peaks - tl.max(peaks, axis=0))
                        joined = tl.sum(parts * gain[:, None], axis=0) / tl.sum(totals * gain, axis=0)
                        tl.store(out + (batch * NUM_HEADS + kv_head * GROUP + g) * D + full, joined.to(dtype))
