"""Rows of the host-driven path whose sequences own caches made by their model.

Invariant: the copies of caches but the newest hold at most half as many tokens as KV memory has room for, since most
families' caches grow with the tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.snapshots import SnapshotRows


class CacheRows(SnapshotRows):
    """`SnapshotRows` with `states`: of each row transformers' cache, None before its first token."""

    def __init__(self, *, max_rows: int, num_blocks: int, shares: bool = True, most_blocks: int | None = None) -> None:
        super().__init__(max_rows=max_rows, num_blocks=num_blocks, shares=shares, most_blocks=most_blocks)
        self.states: dict[int, Any] = {}

    def allocate(self) -> int:
        """See `KvRows.allocate`."""
        row = super().allocate()
        self.states[row] = None
        return row

    def free(self, handle: int) -> None:
        """See `KvRows.free`."""
        super().free(handle)
        del self.states[handle]

    def copy_state(self, handle: int) -> Any:
        """See `SnapshotRows.copy_state`."""
        return copy.deepcopy(self.states[handle])

    def put_state(self, handle: int, state: Any) -> None:
        """See `SnapshotRows.put_state`."""
        self.states[handle] = copy.deepcopy(state)

    def cost(self, num_tokens: int) -> int:
        """The tokens that a copy holds."""
        return num_tokens

    @property
    def most_cost(self) -> int:
        """See `SnapshotRows.most_cost`."""
        return self.pool.num_blocks * BLOCK_TOKENS // 2
