"""Rows whose sequences keep more than keys and values: a prompt that was read goes on from a copy of its state.

A state is of one place in a prompt, unlike keys and values, and grows with the tokens before it in most families. So of
each prompt one copy is kept: at the last place where a chunk of a longer prompt would begin too. Invariant: the copies
but the newest hold at most half as many tokens as KV memory has room for; those not used for longest leave first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.prefixes import Node
from server.model.kv.rows import KvRows


class SnapshotRows(KvRows):
    """`KvRows` that also keeps `states`: of each row transformers' cache, None before its first token."""

    def __init__(self, *, max_rows: int, num_blocks: int, shares: bool = True, most_blocks: int | None = None) -> None:
        super().__init__(max_rows=max_rows, num_blocks=num_blocks, shares=shares, most_blocks=most_blocks)
        self.states: dict[int, Any] = {}
        self._kept: WeakKeyDictionary[Node, Any] = WeakKeyDictionary()  # those used last at the end
        self._ends: dict[int, int] = {}

    def allocate(self) -> int:
        """See `KvRows.allocate`."""
        row = super().allocate()
        self.states[row], self._ends[row] = None, 0
        return row

    def free(self, handle: int) -> None:
        """See `KvRows.free`."""
        super().free(handle)
        del self.states[handle], self._ends[handle]

    def reuse(self, handle: int, tokens: Sequence[int], salt: bytes, multiple: int = BLOCK_TOKENS) -> list[Any]:
        """See `KvRows.reuse`; the row's state becomes a copy of the one that was kept."""
        self._ends[handle] = (len(tokens) - 1) // multiple * multiple
        notes = super().reuse(handle, tokens, salt, multiple)
        if notes:
            node = self.last_node(handle)
            assert node is not None
            self._kept[node] = state = self._kept.pop(node)
            self.states[handle] = copy.deepcopy(state)
        return notes

    def share(self, handle: int, tokens: Sequence[int], salt: bytes, notes: Sequence[Any]) -> None:
        """See `KvRows.share`; keeps a copy of the row's state if it is at the last place of its prompt."""
        super().share(handle, tokens, salt, notes)
        node, end = self.last_node(handle), self._ends[handle]
        if node is None or node in self._kept or not len(tokens) == self.length(handle) == end == _tokens(node):
            return
        self._kept[node] = copy.deepcopy(self.states[handle])
        most = self.pool.num_blocks * BLOCK_TOKENS // 2
        for old in list(self._kept)[:-1]:
            if sum(map(_tokens, self._kept)) <= most:
                break
            del self._kept[old]

    def _usable(self, found: list[Node]) -> list[Node]:
        with_state = [at for at, node in enumerate(found) if node in self._kept]
        return found[: with_state[-1] + 1] if with_state else []


def _tokens(node: Node) -> int:
    return node.depth * BLOCK_TOKENS
