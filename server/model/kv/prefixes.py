"""The prefix tree: blocks of prompts that were read, found again by their tokens.

A node is one block of tokens behind its parent's; below one root all keys and values were made alike (mask, router
temperature, adapter: the *salt*). So a path from a root names the content of a block. Leaves leave in the order of
their last use, but never while a row holds their block. Invariants: the tree holds each of its blocks once; a row that
holds a node's block holds those of its parents, so the nodes without another holder can all be evicted.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from server.model.kv.blocks import BLOCK_TOKENS, BlockPool

Tokens = Sequence[int]


class Node:
    """A block of the tree.

    Attributes:
        block: of the pool; None at a root.
        note: given with the block, returned with it.
        depth: blocks from the root, this one included.
        digest: of all tokens from the root; 0 at a root. Equal below all salts.
    """

    __slots__ = ("__weakref__", "block", "children", "depth", "digest", "is_queued", "key", "note", "parent")

    def __init__(self, parent: Node | None, key: Any, block: int | None, note: Any) -> None:
        self.parent, self.key, self.block, self.note = parent, key, block, note
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple[int, ...], Node] = {}
        self.digest: int = 0 if parent is None else _digest(parent.digest, key)
        self.is_queued = False


class PrefixTree:
    """The tree over a pool's blocks, of which it is a holder.

    Attributes:
        clock: counts uses.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._roots: dict[bytes, Node] = {}
        self.clock = 0
        self._leaves: list[tuple[int, int, Node]] = []  # heap over (used at, order, node); may be out of date
        self._order = itertools.count()
        self._digests: dict[int, int] = {}  # how many nodes have each
        self._is_held = np.zeros(pool.most_blocks, dtype=np.bool_)
        self._used_at = np.zeros(pool.most_blocks, dtype=np.int64)  # the clock at the last use of each block

    @property
    def num_idle(self) -> int:
        """Blocks that the tree alone holds, all of which `evict` could free; any thread may ask."""
        return int(np.count_nonzero(self._is_held & (self._pool.num_holders == 1)))

    def num_idle_since(self, clock: int) -> int:
        """Those of them that were not used after the clock showed `clock`."""
        idle = self._is_held & (self._pool.num_holders == 1)
        return int(np.count_nonzero(idle & (self._used_at <= clock)))

    def digests(self) -> frozenset[int]:
        """The digests of all nodes; any thread may ask."""
        return frozenset(self._digests.copy())  # the copy is made in one step

    def find(self, salt: bytes, node: Node | None, tokens: Tokens) -> list[Node]:
        """The nodes behind `node` (None: from the beginning) for the complete blocks of `tokens`, until one lacks."""
        found: list[Node] = []
        node = node or self._roots.get(salt)
        if node is None:
            return found
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            child = node.children.get(tuple(tokens[start : start + BLOCK_TOKENS]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def add(self, salt: bytes, node: Node | None, tokens: Tokens, block: int, note: Any) -> Node:
        """The node that continues `node` (None: a beginning), of which a row holds the block, with one block of tokens.
        Without one, `block` becomes it, and the tree its holder."""
        node = node or self._roots.setdefault(salt, Node(None, salt, None, None))
        key = tuple(tokens)
        child = node.children.get(key)
        if child is None:
            child = node.children[key] = Node(node, key, block, note)
            self._pool.hold(block)
            self._is_held[block], self._used_at[block] = True, 0
            self._digests[child.digest] = self._digests.get(child.digest, 0) + 1
            self._push(child)
        return child

    def use(self, node: Node) -> None:
        """Count a use of a node and of its parents."""
        self.clock += 1
        while node.parent is not None:
            self._used_at[_block(node)] = self.clock
            node = node.parent

    def evict(self, count: int) -> int:
        """Drop up to `count` blocks that no row holds, those first that were not used for longest; return how many."""
        held, dropped = [], 0
        while dropped < count and self._leaves:
            used_at, _, node = heapq.heappop(self._leaves)
            node.is_queued = False
            if node.children:
                continue  # pushed again when the last child leaves
            if used_at != self._used_at[_block(node)]:
                self._push(node)
            elif self._pool.num_holders[_block(node)] > 1:
                held.append(node)
            else:
                self._remove(node)
                dropped += 1
        for node in held:
            self._push(node)
        return dropped

    def move(self, places: Mapping[int, int]) -> None:
        """Follow the moves of `BlockPool.move`."""
        for node in self.nodes():
            node.block = places.get(_block(node), node.block)
        old, new = list(places), list(places.values())
        for notes in (self._is_held, self._used_at):
            notes[new], notes[old] = notes[old], 0

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        self._pool.drop(_block(node))
        self._is_held[_block(node)] = False
        self._digests[node.digest] -= 1
        if not self._digests[node.digest]:
            del self._digests[node.digest]
        if not parent.children:
            if parent.parent is not None:
                self._push(parent)
            else:
                del self._roots[parent.key]

    def _push(self, node: Node) -> None:
        if node.is_queued:
            return
        node.is_queued = True
        heapq.heappush(self._leaves, (int(self._used_at[_block(node)]), next(self._order), node))

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots."""
        waiting = list(self._roots.values())
        while waiting:
            node = waiting.pop()
            waiting.extend(node.children.values())
            if node.parent is not None:
                yield node

    def check_integrity(self) -> None:
        """Raise AssertionError if a leaf would never be evicted, or a block is there twice or not counted."""
        nodes = list(self.nodes())
        assert sorted(map(_block, nodes)) == np.flatnonzero(self._is_held).tolist(), (
            "blocks of the tree are not its own"
        )
        queued = Counter(id(node) for _, _, node in self._leaves)
        lost = [node.block for node in nodes if not node.children and not queued[id(node)]]
        assert not lost, f"the leaves of blocks {lost} would never be evicted"
        assert Counter(node.digest for node in nodes) == Counter(self._digests), "digests do not name the nodes"
        assert all(count == 1 for count in queued.values()), "a leaf waits more than once for eviction"


def block_digests(tokens: Tokens) -> list[int]:
    """The digest of each node that the complete blocks of `tokens` would be, from a root on."""
    found, ids = [0], np.array(tokens, dtype=np.int64)
    for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        found.append(_digest(found[-1], ids[start : start + BLOCK_TOKENS]))
    return found[1:]


def _digest(parent: int, tokens: Tokens | npt.NDArray[np.int64]) -> int:
    return xxhash.xxh3_64_intdigest(np.asarray(tokens, dtype=np.int64).tobytes(), seed=parent)


def _block(node: Node) -> int:
    assert node.block is not None
    return node.block
