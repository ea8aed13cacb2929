"""The size of KV memory on the host-driven path: what is asked for, or a share of the memory that is free.

Invariant: it holds one request of `least_tokens` at least, or loading fails with the figures that would do.
"""

from __future__ import annotations

import torch

from expert_store.errors import SlotsError
from expert_store.pinned import free_host_bytes
from server.model.host.assembly import HostModel
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv.rows import KvRows
from server.model.kv_memory import kv_token_bytes
from server.model.runner import RunnerOptions

KV_SHARE = 1 / 4
"""Share of the memory that is free after loading, for keys and values."""


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
    return KvRows(max_rows=options.max_rows, num_blocks=num_blocks, shares=options.prefix_cache)


def blocks_within(
    token_bytes: int, max_rows: int, max_tokens: int, least_tokens: int, kv_bytes: int | None, free: int | None
) -> int:
    """Blocks of KV memory: those that fit into `kv_bytes`, or without a wish into a share of the `free` bytes.

    Args:
        token_bytes: of one token's keys and values.
        free: bytes that are free after loading; None if the system does not tell.

    Raises:
        SlotsError: one request of `least_tokens` does not fit.
    """
    block_bytes = BLOCK_TOKENS * token_bytes
    most, least = max_rows * num_blocks_of(max_tokens), num_blocks_of(least_tokens)
    if kv_bytes is not None:
        num_blocks = min(most, kv_bytes // block_bytes)
        room, said = kv_bytes, f"kv_memory of {kv_bytes} bytes holds"
    else:
        room = block_bytes * most if free is None else free
        share = most if free is None else int(KV_SHARE * free) // block_bytes
        num_blocks = min(most, max(least, share))
        said = f"{room} bytes are free for KV memory, which hold"
    if min(num_blocks, room // block_bytes) < least:
        fits = room // block_bytes * BLOCK_TOKENS
        raise SlotsError(
            f"{said} {fits} tokens, and one request may have {least * BLOCK_TOKENS}, which take {least * block_bytes} "
            f"bytes: {'set max_context_tokens to at most ' + str(fits) if fits else 'lower slots_memory'}, or give "
            "KV memory more room"
        )
    return num_blocks


def _free_bytes(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
