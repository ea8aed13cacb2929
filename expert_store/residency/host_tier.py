"""The host tier: spans of (layer, expert) in host memory, under a byte budget, page-locked if a GPU reads them.

It is between the store on disk and slots on an accelerator; a CPU's slots are filled from disk directly, without a host
tier. One arena is allocated at the start and divided into entries of the largest span; the least recently used entry is
reused first. Invariant: a view returned by `read` is valid until the next call of `read`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from expert_store.errors import SlotsError
from expert_store.residency.pinned import locked_arena

if TYPE_CHECKING:
    from expert_store.store import Store

READ_THREADS = 4
PARALLEL_READ_BYTES = 1 << 20
"""Several threads read spans of at least this size from disk; for smaller ones, passing work to a thread costs more."""


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Host memory behind the slots, and the disk behind it; counters since the start.

    Attributes:
        in_host: bool [L, E], experts that host memory holds.
        host_bytes: host memory that is reserved for experts.
        reads, read_bytes: experts read from the disk, for a token or ahead of their use.
        wait_seconds: time for which steps and prompts waited for the disk.
    """

    in_host: npt.NDArray[np.bool_]
    host_bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    wait_seconds: float = 0.0


class HostTier:
    """Host memory that holds spans between the store and the slots.

    Args:
        store: the store to read spans from.
        budget_bytes: most bytes to hold; rounded down to whole entries, and to no more than the store has.
        pinned: allocate page-locked memory, so that copies to a GPU run at full rate and asynchronously.

    Raises:
        SlotsError: the budget holds fewer entries than one step of a layer may need (`least_entries`), or the host
            cannot page-lock the budget.
    """

    def __init__(self, store: Store, *, budget_bytes: int, pinned: bool, least_entries: int = 1) -> None:
        self._store = store
        self.entry_bytes = max(spec.span_bytes for spec in store.manifest.layers)
        wanted = int(store.available.sum())
        num_entries = min(budget_bytes // self.entry_bytes, wanted)
        if num_entries < min(least_entries, wanted):
            least_bytes = least_entries * self.entry_bytes
            raise SlotsError(
                f"the host tier's budget of {budget_bytes} bytes holds {num_entries} experts of {self.entry_bytes} "
                f"bytes; at least {least_entries} are needed: pass --host-memory {least_bytes} or more"
            )
        self.num_entries = num_entries
        self._arena = locked_arena(num_entries, self.entry_bytes, torch.uint8, pinned)
        self._free = list(range(num_entries - 1, -1, -1))
        self._entries: dict[tuple[int, int], int] = {}
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="host-tier")
        self.hits = 0
        self.misses = 0
        self._size = store.available.shape
        self._read_bytes, self._wait_seconds = 0, 0.0

    @property
    def capacity_bytes(self) -> int:
        """Bytes of host memory held, whether used or not."""
        return self.num_entries * self.entry_bytes

    def holds(self, layer: int, experts: Sequence[int]) -> bool:
        """Whether `read` would read nothing from disk (and so overwrite no entry)."""
        return all((layer, expert) in self._entries for expert in experts)

    def read(self, layer: int, experts: Sequence[int]) -> list[torch.Tensor]:
        """Return experts of one layer in host memory; reads the missing ones from the store.

        Returns:
            For each expert a uint8 view [span_bytes] of the arena, valid until the next call.

        Raises:
            StoreError: a span could not be read; no part of it stays in the tier.
        """
        wanted = {(layer, expert) for expert in experts}
        missing = [key for key in wanted if key not in self._entries]
        for key in wanted:
            if key in self._entries:
                self._entries[key] = self._entries.pop(key)
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        claimed = [(key, self._claim(wanted)) for key in missing]
        span_bytes = self._store.layer_spec(layer).span_bytes

        def read_one(claim: tuple[tuple[int, int], int]) -> Exception | None:
            (_, expert), entry = claim
            try:
                self._store.read_expert(layer, expert, self._arena[entry, :span_bytes])
            except Exception as error:  # raised after every entry has been freed or assigned
                return error
            return None

        began = time.perf_counter()
        in_parallel = len(claimed) > 1 and span_bytes >= PARALLEL_READ_BYTES
        errors = list(self._readers.map(read_one, claimed) if in_parallel else map(read_one, claimed))
        self._wait_seconds += time.perf_counter() - began
        self._read_bytes += len(claimed) * span_bytes
        failure: Exception | None = None
        for (key, entry), error in zip(claimed, errors, strict=True):
            if error is None:
                self._entries[key] = entry
            else:
                self._free.append(entry)
                failure = failure or error
        if failure is not None:
            raise failure
        return [self._arena[self._entries[layer, expert], :span_bytes] for expert in experts]

    def statistics(self) -> TierStatistics:
        """A copy of the counters; may be called from any thread."""
        in_host = np.zeros(self._size, dtype=np.bool_)
        for key in list(self._entries):
            in_host[key] = True
        return TierStatistics(in_host, self.capacity_bytes, self.misses, self._read_bytes, self._wait_seconds)

    def close(self) -> None:
        """Stop the reader threads; the memory lives as long as a view of it."""
        self._readers.shutdown(wait=True)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every entry is free or holds exactly one expert."""
        used = sorted([*self._entries.values(), *self._free])
        assert used == list(range(self.num_entries)), f"entries used twice or lost: {used}"

    def _claim(self, keep: set[tuple[int, int]]) -> int:
        if self._free:
            return self._free.pop()
        victim = next(key for key in self._entries if key not in keep)
        return self._entries.pop(victim)
