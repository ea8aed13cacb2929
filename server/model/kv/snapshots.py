"""Rows whose sequences keep more than keys and values: a prompt that was read goes on from a copy of its state.

A state is of one place in a prompt, unlike keys and values. So copies are kept at a few places: the last one where a
chunk of a longer prompt would begin too, the *borders* at every eighth of the prompt or farther apart, and the place
where a prompt leaves those that were read before. Without borders, two prompts with a common beginning would have
nothing in common. Invariant: the copies but the newest cost at most what the rows' kind allows, and borders that nobody
went on from half of that; those not used for longest leave first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.prefixes import Node
from server.model.kv.rows import KvRows

MOST_BORDERS = 8
"""Borders of one prompt, its end counted; all together they hold 4.5 times its tokens."""


class SnapshotRows(KvRows, ABC):
    """`KvRows` over states that a runner keeps for each row."""

    def __init__(self, *, max_rows: int, num_blocks: int, shares: bool = True, most_blocks: int | None = None) -> None:
        super().__init__(max_rows=max_rows, num_blocks=num_blocks, shares=shares, most_blocks=most_blocks)
        self._kept: WeakKeyDictionary[Node, Any] = WeakKeyDictionary()  # those used last at the end
        self._borders: WeakSet[Node] = WeakSet()  # of them those that were never used
        self._ends: dict[int, int] = {}
        self._places: dict[int, set[int]] = {}  # of each row, the lengths at which a copy is kept
        self._known = 0

    @abstractmethod
    def copy_state(self, handle: int) -> Any:
        """A copy of the row's state, which its later tokens do not change."""

    @abstractmethod
    def put_state(self, handle: int, state: Any) -> None:
        """Make the row's state, at its length of now, a copy of one that `copy_state` gave."""

    @abstractmethod
    def cost(self, num_tokens: int) -> int:
        """The cost of a copy of the state after so many tokens."""

    @property
    @abstractmethod
    def most_cost(self) -> int:
        """The most that all copies may cost."""

    def allocate(self) -> int:
        """See `KvRows.allocate`."""
        row = super().allocate()
        self._ends[row], self._places[row] = 0, set()
        return row

    def free(self, handle: int) -> None:
        """See `KvRows.free`."""
        super().free(handle)
        del self._ends[handle], self._places[handle]

    def reuse(self, handle: int, tokens: Sequence[int], salt: bytes, multiple: int = BLOCK_TOKENS) -> list[Any]:
        """See `KvRows.reuse`; the row's state becomes a copy of the one that was kept."""
        self._ends[handle] = end = (len(tokens) - 1) // multiple * multiple
        self._known = 0
        notes = super().reuse(handle, tokens, salt, multiple)
        apart = max(1, -(-end // (MOST_BORDERS * multiple))) * multiple
        self._places[handle] |= {end, self._known, *range(apart, end, apart)}
        if notes:
            node = self.last_node(handle)
            assert node is not None
            self._borders.discard(node)
            self._kept[node] = state = self._kept.pop(node)
            self.put_state(handle, state)
        return notes

    def share(self, handle: int, tokens: Sequence[int], salt: bytes, notes: Sequence[Any]) -> None:
        """See `KvRows.share`; keeps a copy of the row's state if it is at one of the places for that."""
        super().share(handle, tokens, salt, notes)
        node, length = self.last_node(handle), self.length(handle)
        if node is None or not len(tokens) == length == _tokens(node) or length not in self._places[handle]:
            return
        if length == self._ends[handle]:
            self._borders.discard(node)
        if node in self._kept:
            return
        self._kept[node] = self.copy_state(handle)
        if length != self._ends[handle]:
            self._borders.add(node)
        self._trim_all()

    def resize(self, num_blocks: int) -> None:
        """See `KvRows.resize`; drops the copies for which there is no room then."""
        super().resize(num_blocks)
        self._trim_all()

    def _trim_all(self) -> None:
        self._trim([node for node in self._kept if node in self._borders], self.most_cost // 2)
        self._trim(list(self._kept), self.most_cost)

    def _trim(self, nodes: list[Node], most: int) -> None:
        """Drop the copies of the first nodes, but not of the last one, until the others cost at most so much."""
        cost = sum(self.cost(_tokens(node)) for node in nodes)
        for node in nodes[:-1]:
            if cost <= most:
                return
            cost -= self.cost(_tokens(node))
            del self._kept[node]
            self._borders.discard(node)

    def _usable(self, found: list[Node]) -> list[Node]:
        self._known = _tokens(found[-1]) if found else 0
        with_state = [at for at, node in enumerate(found) if node in self._kept]
        return found[: with_state[-1] + 1] if with_state else []


def _tokens(node: Node) -> int:
    return node.depth * BLOCK_TOKENS
