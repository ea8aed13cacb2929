"""The rows of KV memory: which blocks each holds, how many tokens, and the prompts that several of them share.

A row holds one sequence. It grows by blocks (`reserve`), takes blocks of a beginning that was read before (`reuse`),
and gives its own to the prefix tree (`share`). When no block is free, those that only the tree holds are evicted.
Invariants: of row r exactly the first `lengths[r]` tokens are valid; a block that the tree holds is complete and never
written again, so a row only writes blocks that it alone holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.model.kv.blocks import BLOCK_TOKENS, BlockPool, NoBlocksError, num_blocks_of
from server.model.kv.prefixes import Node, PrefixTree


@dataclass(frozen=True)
class KvUsage:
    """The blocks of KV memory: `num_blocks` are open, `num_used` of them held by rows, `num_cached` by the prefix tree
    alone."""

    num_blocks: int
    num_used: int
    num_cached: int

    @property
    def num_free(self) -> int:
        """Open blocks that nobody holds."""
        return self.num_blocks - self.num_used - self.num_cached


NO_BLOCKS = KvUsage(0, 0, 0)
"""While no model is loaded."""


@dataclass
class _Row:
    """`node`: the last of the row's blocks that is in the tree; `salt` of its first tokens; `is_mixed`: later ones had
    another, so that it shares nothing any more."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    node: Node | None = None
    salt: bytes | None = None
    is_mixed: bool = False


class KvRows:
    """At most `max_rows` rows over a pool of blocks.

    Args:
        num_blocks: of KV memory, at first; most_blocks: those that `resize` may open; None: as many.
        shares: whether blocks of prompts are kept and shared; without it every row has its own.

    Attributes:
        on_lack: called by `reserve` with the number of blocks that lack; it may `resize`.
        on_resize: called after each `resize` with the blocks that it closed.
        on_move: called with blocks and the free ones that take their places, block → place, for `resize` to close the
            last blocks; it copies what they hold. None: `resize` closes free blocks wherever they are.
    """

    def __init__(self, *, max_rows: int, num_blocks: int, shares: bool = True, most_blocks: int | None = None) -> None:
        self.max_rows = max_rows
        self.pool = BlockPool(num_blocks, most_blocks)
        self.on_lack: Callable[[int], None] = lambda count: None
        self.on_resize: Callable[[list[int]], None] = lambda closed: None
        self.on_move: Callable[[Mapping[int, int]], None] | None = None
        self._tree = PrefixTree(self.pool)
        self._shares = shares
        self._rows: dict[int, _Row] = {}
        self._free = list(range(max_rows - 1, -1, -1))

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def num_free_rows(self) -> int:
        """Rows that `allocate` can still give."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens held in rows, shared ones once for each row; any thread may ask."""
        return sum(row.length for row in list(self._rows.values()))

    def allocate(self) -> int:
        """Take an empty row; returns its handle, from 0 to `max_rows` - 1."""
        assert self._free, f"all {self.max_rows} rows are in use"
        handle = self._free.pop()
        self._rows[handle] = _Row()
        return handle

    def free(self, handle: int) -> None:
        """Free a row. Blocks that it shared stay in the tree."""
        for block in self._rows.pop(handle).blocks:
            self.pool.drop(block)
        self._free.append(handle)

    def length(self, handle: int) -> int:
        """Valid tokens of a row."""
        return self._rows[handle].length

    def blocks(self, handle: int) -> list[int]:
        """The row's blocks, in the order of its tokens; the last ones may still be empty. Not to be changed; changes
        with `reserve`, `reuse`, `share` and `free`."""
        return self._rows[handle].blocks

    def last_node(self, handle: int) -> Node | None:
        """The last of the row's blocks that is in the prefix tree."""
        return self._rows[handle].node

    # -- growing -------------------------------------------------------------------------------------------------------

    def reserve(self, needs: Sequence[tuple[int, int]]) -> None:
        """Give rows the blocks for as many tokens as a step will leave in them.

        Args:
            needs: (row, tokens in all) of each row of the step.

        Raises:
            NoBlocksError: the blocks do not suffice; no row was changed. Its `positions` are the rows for which none
                was left, counted from the first.
        """
        missing = [max(0, num_blocks_of(num_tokens) - len(self._rows[row].blocks)) for row, num_tokens in needs]
        wanted = sum(missing)
        left = self._num_obtainable
        if wanted > left:
            self.on_lack(wanted - left)
            left = self._num_obtainable
        if wanted > left:
            free = left
            lacking = []
            for at, count in enumerate(missing):
                left -= count
                if count and left < 0:
                    lacking.append(at)
            raise NoBlocksError(
                f"{wanted} more blocks of {BLOCK_TOKENS} tokens are needed; {free} of the KV memory's "
                f"{self.pool.num_blocks} are free",
                tuple(lacking),
            )
        self._tree.evict(wanted - self.pool.num_free)
        for (handle, _), count in zip(needs, missing, strict=True):
            if count:
                row = self._rows[handle]
                row.blocks += self.pool.take(count, row.blocks[-1] if row.blocks else None)

    @property
    def _num_obtainable(self) -> int:
        return self.pool.num_free + self._tree.num_idle

    @property
    def num_held(self) -> int:
        """Blocks that rows hold."""
        return self.pool.num_used - self._tree.num_idle

    @property
    def clock(self) -> int:
        """Counts uses of blocks of the prefix tree, for `num_needed`."""
        return self._tree.clock

    def num_needed(self, clock: int) -> int:
        """Blocks that rows hold, and those of the tree that were used since `clock`."""
        return self.pool.num_used - self._tree.num_idle_since(clock)

    def resize(self, num_blocks: int) -> None:
        """Open or close blocks until `num_blocks` are open: no fewer than rows hold. What only the tree holds is
        evicted where it must be."""
        self._tree.evict(self.pool.num_used - num_blocks)
        if self.on_move is not None:
            self._pack(num_blocks, self.on_move)
        self.on_resize(self.pool.resize(num_blocks))

    def _pack(self, num_blocks: int, on_move: Callable[[Mapping[int, int]], None]) -> None:
        """Move what blocks from `num_blocks` on hold to free ones before."""
        holders = self.pool.num_holders
        last = np.flatnonzero(holders[num_blocks:] > 0) + num_blocks
        free = np.flatnonzero(holders[:num_blocks] == 0)
        places = dict(zip(last.tolist(), free[: len(last)].tolist(), strict=True))
        if not places:
            return
        on_move(places)
        self.pool.move(places)
        self._tree.move(places)
        for row in self._rows.values():
            row.blocks = [places.get(block, block) for block in row.blocks]

    def set_length(self, handle: int, length: int) -> None:
        """Count the tokens that a step has written to a row's blocks, or take its last ones back."""
        row = self._rows[handle]
        assert length <= len(row.blocks) * BLOCK_TOKENS, f"row {handle} has no blocks for {length} tokens"
        row.length = length

    # -- sharing -------------------------------------------------------------------------------------------------------

    def reuse(self, handle: int, tokens: Sequence[int], salt: bytes, multiple: int = BLOCK_TOKENS) -> list[Any]:
        """Append to a row the tokens that the tree has of its prompt behind those that the row holds.

        Args:
            tokens: of the whole prompt, at the beginning of which the row is. The last one is never taken, because its
                logits are needed.
            salt: names all that its keys and values depend on but the tokens. A row keeps to its first one; with
                another, it neither takes nor gives.
            multiple: of `BLOCK_TOKENS`; the row's length becomes a multiple of it.

        Returns:
            The notes of the blocks that were appended.
        """
        row = self._rows[handle]
        if not self._agrees(row, salt) or row.length % BLOCK_TOKENS or row.length != _depth(row.node) * BLOCK_TOKENS:
            return []
        most = (len(tokens) - 1) // multiple * multiple
        found = self._tree.find(salt, row.node, tokens[row.length : most])
        end = (row.length + len(found) * BLOCK_TOKENS) // multiple * multiple
        found = self._usable(found[: max(0, end - row.length) // BLOCK_TOKENS])
        if not found:
            return []
        end = row.length + len(found) * BLOCK_TOKENS
        place = slice(row.length // BLOCK_TOKENS, end // BLOCK_TOKENS)  # blocks after it stay reserved
        for block in row.blocks[place]:
            self.pool.drop(block)
        row.blocks[place] = [node.block for node in found if node.block is not None]
        for node in found:
            assert node.block is not None
            self.pool.hold(node.block)
        row.node, row.length = found[-1], end
        self._tree.use(found[-1])
        return [node.note for node in found]

    def share(self, handle: int, tokens: Sequence[int], salt: bytes, notes: Sequence[Any]) -> None:
        """Give the tree the complete blocks of a row's first tokens, as far as it does not have them; where it has, the
        row changes over to the tree's.

        Args:
            tokens: the row's first tokens, which a prefill read; salt: as for `reuse`.
            notes: one for each complete block.
        """
        row = self._rows[handle]
        if not self._agrees(row, salt):
            return
        assert len(tokens) <= row.length, f"{len(tokens)} tokens of a row of {row.length}"
        for at in range(_depth(row.node), len(tokens) // BLOCK_TOKENS):
            block = row.blocks[at]
            part = tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
            row.node = self._tree.add(salt, row.node, part, block, notes[at])
            if row.node.block != block:
                assert row.node.block is not None
                self.pool.hold(row.node.block)
                self.pool.drop(block)
                row.blocks[at] = row.node.block
        if row.node is not None:
            self._tree.use(row.node)

    def _usable(self, found: list[Node]) -> list[Node]:
        """The nodes, of those that continue a row, with which its runner can go on."""
        return found

    def _agrees(self, row: _Row, salt: bytes) -> bool:
        """Whether the row shares at all; keeps its first salt, and that it had another."""
        if row.salt is None:
            row.salt = salt
            row.is_mixed = row.length > 0
        row.is_mixed |= salt != row.salt
        return self._shares and not row.is_mixed

    # -- figures -------------------------------------------------------------------------------------------------------

    def usage(self) -> KvUsage:
        """The figures of now; any thread may ask."""
        idle = self._tree.num_idle
        return KvUsage(self.pool.num_blocks, max(0, self.pool.num_used - idle), idle)  # they may change meanwhile

    def held_prefixes(self) -> frozenset[int]:
        """Digests of the beginnings of prompts that are held (`block_digests`); any thread may ask."""
        return self._tree.digests()

    def check_integrity(self) -> None:
        """Raise AssertionError if holders, lengths and the tree disagree."""
        held: Counter[int] = Counter()
        for handle, row in self._rows.items():
            assert num_blocks_of(row.length) <= len(row.blocks), f"row {handle}: {row.length} tokens, too few blocks"
            assert len(set(row.blocks)) == len(row.blocks), f"row {handle} has a block twice"
            held.update(row.blocks)
        held.update(node.block for node in self._tree.nodes() if node.block is not None)
        self.pool.check_integrity(held)
        self._tree.check_integrity()
        assert sorted([*self._free, *self._rows]) == list(range(self.max_rows)), "a row is lost, or there twice"


def _depth(node: Node | None) -> int:
    return 0 if node is None else node.depth
