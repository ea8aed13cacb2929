"""The size of KV memory on the host-driven path: what is asked for, or a share of the memory that is free.

Invariant: it holds one request of `least_tokens` at least, or loading fails with the figures that would do.
"""

from __future__ import annotations

import torch

from expert_store.residency.pinned import free_host_bytes
from server.model.balance import SlotsAndBlocks, refusal
from server.model.host.assembly import HostModel
from server.model.host.runner import block_bytes_of
from server.model.host.sequence_runner import has_plain_memory
from server.model.host.snapshots import CacheRows
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv.rows import KvRows
from server.model.kv_memory import blocks_within
from server.model.runner import RunnerOptions


def kv_rows(model: HostModel, options: RunnerOptions) -> tuple[KvRows, SlotsAndBlocks]:
    """The rows and blocks of KV memory for a loaded model, and the division of memory between them and its slots.

    Raises:
        SlotsError: one request of `least_tokens` does not fit.
    """
    block_bytes, cache = block_bytes_of(model), model.cache
    least_tokens = options.max_tokens if options.least_tokens is None else options.least_tokens
    num_blocks = blocks_within(
        block_bytes // BLOCK_TOKENS,
        options.max_rows,
        options.max_tokens,
        least_tokens,
        options.kv_memory_bytes,
        free_bytes(model.device),
    )
    most_blocks, reason = num_blocks, refusal(options.memory_balance, model.device)
    least_slots = max(options.kept_experts, options.max_rows * model.store.manifest.model.top_k)
    if not reason:
        lent_bytes = cache.slots_bytes(max(0, cache.num_slots - least_slots))
        of_rows = options.max_rows * num_blocks_of(min(options.max_tokens, num_blocks * BLOCK_TOKENS))
        most_blocks = max(num_blocks, min(of_rows, num_blocks + lent_bytes // block_bytes))
    kind = KvRows if has_plain_memory(model.model) else CacheRows
    kv = kind(max_rows=options.max_rows, num_blocks=num_blocks, shares=options.prefix_cache, most_blocks=most_blocks)
    balance = SlotsAndBlocks(
        cache,
        kv,
        blocks_bytes=lambda num_blocks: num_blocks * block_bytes,
        least_slots=least_slots,
        least_blocks=num_blocks_of(least_tokens),
        reason=reason,
    )
    return kv, balance


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that are free on the device: on a CPU those of the host, None where they are not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
