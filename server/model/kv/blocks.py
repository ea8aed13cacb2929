"""The blocks of KV memory: which are free, and how many holders each of the others has.

A block has room for the keys and values of `BLOCK_TOKENS` tokens in every layer. Rows and the prefix tree hold blocks;
a block with several holders is only read. Nobody takes a closed block, because its memory is lent to others.
Invariant: a block is free exactly while it is open and has no holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from server.errors import ServerError

BLOCK_TOKENS = 32
"""Tokens of a block: the grain in which common beginnings are shared and memory is taken."""


class NoBlocksError(ServerError):
    """The KV memory has no block left for a step; nothing was changed.

    Attributes:
        positions: rows, among those given, that got no block.
    """

    def __init__(self, message: str, positions: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.positions = positions


def num_blocks_of(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


_CLOSED = -1
"""In the place of a number of holders."""


class BlockPool:
    """Blocks 0 … `most_blocks` - 1 and their holders.

    Args:
        num_blocks: those that are open at first, the lowest ones.
        most_blocks: all of them; None: `num_blocks`.

    Attributes:
        num_blocks: those that are open; num_used: those with a holder.
        most_blocks: as given.
    """

    def __init__(self, num_blocks: int, most_blocks: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.most_blocks = max(num_blocks, most_blocks or 0)
        self.num_used = 0
        self._holders = np.zeros(self.most_blocks, dtype=np.int32)
        self._holders[num_blocks:] = _CLOSED

    @property
    def num_free(self) -> int:
        """Open blocks without a holder."""
        return self.num_blocks - self.num_used

    @property
    def num_holders(self) -> npt.NDArray[np.int32]:
        """Rows that hold each block, and the tree if it does: [most_blocks]; below 0 of closed ones. Not to be
        written."""
        return self._holders

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` free blocks, one holder each; needs as many. They follow on block `after` and on one another
        where such blocks are free, because a row of consecutive blocks is read without a copy."""
        assert count <= self.num_free, f"{count} blocks are wanted, {self.num_free} are free"
        taken: list[int] = []
        for left in range(count, 0, -1):
            follows = None if after is None else after + 1
            if follows is None or follows == self.most_blocks or self._holders[follows]:
                follows = self._start(left)
            self._holders[follows] = 1
            taken.append(follows)
            after = follows
        self.num_used += count
        return taken

    def _start(self, count: int) -> int:
        """A free block with the most free ones behind it: the middle of the longest run, so that the row before can
        grow on, or its beginning if the middle leaves fewer than `count`."""
        edges = np.flatnonzero(np.diff(np.concatenate(([1], self._holders != 0, [1]))))
        starts, ends = edges[::2], edges[1::2]
        longest = int((ends - starts).argmax())
        start, end = int(starts[longest]), int(ends[longest])
        middle = (start + end) // 2
        return middle if start > 0 and end - middle >= count else start

    def resize(self, num_blocks: int) -> list[int]:
        """Open the lowest closed blocks, or close the highest free ones, until `num_blocks` are open; needs as many.
        Returns those that it closed."""
        assert self.num_used <= num_blocks <= self.most_blocks, f"{num_blocks} blocks, {self.num_used} are in use"
        closed: list[int] = []
        if num_blocks > self.num_blocks:
            self._holders[np.flatnonzero(self._holders == _CLOSED)[: num_blocks - self.num_blocks]] = 0
        elif num_blocks < self.num_blocks:
            closed = np.flatnonzero(self._holders == 0)[num_blocks - self.num_blocks :].tolist()
            self._holders[closed] = _CLOSED
        self.num_blocks = num_blocks
        return closed

    def move(self, places: Mapping[int, int]) -> None:
        """Give the holders of some blocks to open ones without a holder: block → the one in its place."""
        old, new = list(places), list(places.values())
        assert not self._holders[new].any(), f"blocks {new} are not all free"
        self._holders[new] = self._holders[old]
        self._holders[old] = 0

    def hold(self, block: int) -> None:
        """Add a holder to a block that has one."""
        assert self._holders[block] > 0, f"block {block} has no holder"
        self._holders[block] += 1

    def drop(self, block: int) -> bool:
        """Remove a holder; return whether the block is free now."""
        assert self._holders[block] > 0, f"block {block} has no holder"
        self._holders[block] -= 1
        is_free = not self._holders[block]
        self.num_used -= is_free
        return bool(is_free)

    def check_integrity(self, held: Counter[int]) -> None:
        """Raise AssertionError unless every block has as many holders as `held` counts."""
        wrong = {block: int(n) for block, n in enumerate(self._holders) if max(n, 0) != held[block]}
        assert not wrong, f"holders of blocks {wrong}, wanted { ({block: held[block] for block in wrong}) }"
        assert self.num_used == int((self._holders > 0).sum()), f"{self.num_used} blocks are said to be in use"
        num_open = int((self._holders != _CLOSED).sum())
        assert num_open == self.num_blocks, f"{num_open} blocks are open, {self.num_blocks} are said to be"
