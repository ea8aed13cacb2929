"""The size of KV memory on the host-driven path: what is asked for, or a share of the memory that is free.

Invariant: it holds one request of `least_tokens` at least, or loading fails with the figures that would do.
"""

from __future__ import annotations

import torch

from expert_store.residency.pinned import free_host_bytes
from server.model.host.assembly import HostModel
from server.model.host.sequence_runner import has_plain_memory
from server.model.host.snapshots import SnapshotRows
from server.model.kv.rows import KvRows
from server.model.kv_memory import blocks_within, kv_token_bytes
from server.model.runner import RunnerOptions


def kv_rows(model: HostModel, options: RunnerOptions) -> KvRows:
    """The rows and blocks of KV memory for a loaded model.

    Raises:
        SlotsError: one request of `least_tokens` does not fit.
    """
    token_bytes = kv_token_bytes(model.model.config.get_text_config(), options.dtype.itemsize)
    num_blocks = blocks_within(
        token_bytes,
        options.max_rows,
        options.max_tokens,
        options.max_tokens if options.least_tokens is None else options.least_tokens,
        options.kv_memory_bytes,
        _free_bytes(model.device),
    )
    kind = KvRows if has_plain_memory(model.model) else SnapshotRows
    return kind(max_rows=options.max_rows, num_blocks=num_blocks, shares=options.prefix_cache)


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
