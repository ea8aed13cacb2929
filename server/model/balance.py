"""Moves memory between slots and KV memory while serving: one has what the other does not need.

KV memory takes slots' memory when a request would have to wait for blocks: at once, and only as much as it lacks. Slots
take it back, and more, when experts are missed while blocks lie idle for some time; so the two do not pull at the same
memory. All of it happens on the engine's thread between two forwards, when no slot is leased. Invariants: what is open
never takes more bytes than at the start; neither falls below its least; no answer changes, because results depend
neither on the number of slots nor on the places of blocks. Both decode paths use it.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from expert_store.residency.returnable import can_return
from server.model.kv.rows import KvRows
from server.model.kv_memory import MemoryBalance, MemoryShares

log = logging.getLogger(__name__)

LOOK_STEPS = 64
"""Steps between two looks at whether slots may have more."""
KEPT_LOOKS = 8
"""Looks for which KV memory keeps what it needed once: 512 steps, half a minute or so of a busy CPU."""


def refusal(wish: MemoryBalance, device: torch.device) -> str:
    """The reason why memory does not move on the host-driven path, or on a CPU; empty if it does."""
    if wish == "fixed":
        return "memory_balance is fixed"
    if device.type != "cpu":
        return f"the allocator of {device.type} memory takes back whole tensors only; see docs/adr/0009"
    if not can_return():
        return "this system takes no single pages of memory back"
    return ""


class Slots(Protocol):
    """The slots of each layer, of which some are open."""

    @property
    def num_slots(self) -> int:
        """Those that are open."""

    @property
    def most_slots(self) -> int:
        """The most that `resize` may open."""

    @property
    def least_slots(self) -> int:
        """The fewest that `resize` may leave open now."""

    def slots_bytes(self, num_slots: int) -> int:
        """Bytes of so many slots of each layer, in all layers; not fewer for more slots."""

    def resize(self, num_slots: int) -> None:
        """Open or close slots until each layer has `num_slots`, with their memory."""

    def misses_of_full_layers(self) -> int:
        """Misses since start in the layers that have no free slot now: what more slots might have saved."""


class SlotsAndBlocks:
    """The division of one memory between slots and the blocks of rows, as both are now.

    Args:
        slots: at most `most_slots` of them may be opened.
        blocks: as many as `most_blocks` of their pool.
        blocks_bytes: of so many blocks, in all layers; not fewer for more blocks.
        budget: bytes of both together; None: those at the start.
        least_slots: slots of each layer that stay, if there are so many now.
        least_blocks: blocks that stay, if there are so many now.
        reason: why nothing moves; empty: it does.
        look_steps, kept_looks: see `LOOK_STEPS` and `KEPT_LOOKS`.
    """

    def __init__(
        self,
        slots: Slots,
        blocks: KvRows,
        *,
        blocks_bytes: Callable[[int], int],
        budget: int | None = None,
        least_slots: int = 1,
        least_blocks: int = 1,
        reason: str = "",
        look_steps: int = LOOK_STEPS,
        kept_looks: int = KEPT_LOOKS,
    ) -> None:
        self._slots, self._kv, self._reason, self._look_steps = slots, blocks, reason, look_steps
        self._slots_bytes, self._blocks_bytes = slots.slots_bytes, blocks_bytes
        self._least_slots = min(slots.num_slots, max(least_slots, slots.least_slots))
        self._least_blocks = min(blocks.pool.num_blocks, least_blocks)
        self._budget = budget or slots.slots_bytes(slots.num_slots) + blocks_bytes(blocks.pool.num_blocks)
        self._steps = 0
        self._misses = slots.misses_of_full_layers()
        self._peaks = deque([0], maxlen=kept_looks)  # blocks that rows held at most since each look
        self._clocks = deque([blocks.clock], maxlen=kept_looks)
        self.moves_to_slots = self.moves_to_kv = 0
        if not reason:
            blocks.on_lack = self._lend_to_kv

    def shares(self) -> MemoryShares:
        """The bytes of both, and the moves so far; any thread may ask."""
        return MemoryShares(
            is_moving=not self._reason,
            reason=self._reason,
            slot_bytes=self._slots_bytes(self._slots.num_slots),
            kv_bytes=self._blocks_bytes(self._kv.pool.num_blocks),
            least_slot_bytes=self._slots_bytes(self._slots.num_slots if self._reason else self._least_slots),
            least_kv_bytes=self._blocks_bytes(self._kv.pool.num_blocks if self._reason else self._least_blocks),
            moves_to_slots=self.moves_to_slots,
            moves_to_kv=self.moves_to_kv,
        )

    def after_step(self) -> None:
        """Give slots what KV memory has not needed for a while, if experts were missed for want of slots."""
        if self._reason:
            return
        self._steps += 1
        self._peaks[-1] = max(self._peaks[-1], self._kv.num_held)
        if self._steps % self._look_steps:
            return
        misses, self._misses = self._misses, self._slots.misses_of_full_layers()
        if self._misses > misses:
            self._lend_to_slots()
        self._peaks.append(0)
        self._clocks.append(self._kv.clock)

    def _lend_to_slots(self) -> None:
        needed = max(*self._peaks, self._kv.num_needed(self._clocks[0])) + self._kv.max_rows
        now = self._slots.num_slots
        wanted = min(now + max(1, now // 8), self._slots_beside(max(needed, self._least_blocks)))
        if wanted > now:
            self._kv.resize(min(self._kv.pool.num_blocks, self._blocks_beside(wanted)))
            self._slots.resize(wanted)
            self.moves_to_slots += 1
            log.debug("memory moved to slots: %d a layer, %d blocks", wanted, self._kv.pool.num_blocks)

    def _lend_to_kv(self, count: int) -> None:
        """Open `count` more blocks at the cost of as few slots as that takes; nothing if these are not enough."""
        blocks = self._kv.pool.num_blocks + count
        if blocks > self._kv.pool.most_blocks:
            return
        slots = min(self._slots.num_slots, self._slots_beside(blocks))
        if slots < max(self._least_slots, self._slots.least_slots):
            return
        self._slots.resize(slots)
        self._kv.resize(self._blocks_beside(slots))
        self.moves_to_kv += 1
        log.debug("memory moved to keys and values: %d slots a layer, %d blocks", slots, self._kv.pool.num_blocks)

    def _slots_beside(self, num_blocks: int) -> int:
        return most_within(self._slots.most_slots, self._slots_bytes, self._budget - self._blocks_bytes(num_blocks))

    def _blocks_beside(self, num_slots: int) -> int:
        return most_within(self._kv.pool.most_blocks, self._blocks_bytes, self._budget - self._slots_bytes(num_slots))

    def check_integrity(self) -> None:
        """Raise AssertionError if more bytes are open than at the start, or one has less than its least."""
        slots, blocks = self._slots.num_slots, self._kv.pool.num_blocks
        taken = self._slots_bytes(slots) + self._blocks_bytes(blocks)
        assert taken <= self._budget, f"{slots} slots a layer and {blocks} blocks take {taken} of {self._budget} bytes"
        assert slots >= self._least_slots, f"{slots} slots a layer, at least {self._least_slots} must stay"
        assert blocks >= self._least_blocks, f"{blocks} blocks, at least {self._least_blocks} must stay"


def most_within(most: int, cost: Callable[[int], int], limit: int) -> int:
    """The largest number up to `most` whose cost is within `limit`; -1 if that of 0 is not."""
    return bisect_right(range(most + 1), limit, key=cost) - 1
