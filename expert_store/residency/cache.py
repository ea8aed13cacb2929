"""The expert cache: slots on the compute device, the page table over them, leases and evictions.

Every MoE layer has `num_slots` slots of one span each; `resize` opens and closes some. `acquire` makes experts of one
layer resident and leases their slots, `release` ends the lease; a leased slot is never evicted. One thread owns the
cache; `statistics` may be called from any. Invariant (checked by `check_integrity`): page table and slot owners are
inverse to each other, each layer's policy knows exactly the resident experts, and no expert is in a closed slot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from expert_store.errors import ExpertUnavailableError, SlotsError
from expert_store.residency.fetch import SpanFetcher
from expert_store.residency.host_tier import HostTier, TierStatistics
from expert_store.residency.policy import LRU, EvictionPolicy, KeepSome
from expert_store.residency.slots import SlotPool

if TYPE_CHECKING:
    from expert_store.store import Store


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counters since start, one value a layer ([L] int64 or float64), copied: the caller may keep them.

    Attributes:
        hits, misses: leases of resident experts, and of experts that had to be fetched.
        evictions: experts that were evicted from a slot.
        fetch_bytes, fetch_seconds: bytes copied into slots, and the owner thread's time for that.
        resident: experts in slots now.
        num_slots: slots of each layer that are open.
        slot_bytes: bytes of them all.
        host_hits, host_misses: fetches served by the host tier, and from disk through it (0 without one).
        tier: the host tier, and reads from the disk.
    """

    hits: npt.NDArray[np.int64]
    misses: npt.NDArray[np.int64]
    evictions: npt.NDArray[np.int64]
    fetch_bytes: npt.NDArray[np.int64]
    fetch_seconds: npt.NDArray[np.float64]
    resident: npt.NDArray[np.int64]
    num_slots: int
    slot_bytes: int
    host_hits: int
    host_misses: int
    tier: TierStatistics


class ExpertCache:
    """LRU cache of experts in device slots.

    Args:
        store: the store to serve.
        num_slots: slots of each layer, at least 1; at most as many as the model has experts in a layer are allocated.
        device: device of the slots.
        dtype: dtype of the weights in slots; spans of another dtype are converted while they are fetched.
        host_tier: host memory between disk and slots; None reads from disk into the slots' memory (CPU).
        policy: makes one eviction policy for each layer.
        mask: bool [L, E], the experts that `preload` may fetch; None is all of the store.
        kept: for each layer the experts to keep in slots, loaded first; they are evicted only if a step needs every
            slot of a layer.
        most_slots: slots of each layer that `resize` may open; None: `num_slots`.

    Attributes:
        num_slots: slots of each layer that are open; most_slots: all of them.

    Raises:
        SlotsError: `num_slots` < 1, fewer than are kept, or the device has too little memory for them.
    """

    def __init__(
        self,
        store: Store,
        *,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
        host_tier: HostTier | None = None,
        policy: Callable[[], EvictionPolicy] = LRU,
        mask: npt.NDArray[np.bool_] | None = None,
        kept: Sequence[Sequence[int]] | None = None,
        most_slots: int | None = None,
    ) -> None:
        if num_slots < 1:
            raise SlotsError(f"{num_slots} slots a layer; at least 1 is needed: pass --slots 1 or more")
        self._kept = [list(experts) for experts in kept or [[]] * len(store.manifest.layers)]
        most_kept = max(map(len, self._kept))
        if most_kept > num_slots:
            raise SlotsError(f"{most_kept} kept experts in {num_slots} slots a layer: keep fewer, or have more slots")
        self._store = store
        self.num_layers = len(store.manifest.layers)
        self.num_experts = store.manifest.model.num_experts
        self.num_slots = min(num_slots, self.num_experts)
        self.most_slots = max(self.num_slots, min(most_slots or 0, self.num_experts))
        self.device = device
        self.host_tier = host_tier
        self._mask = mask
        self.pools = [
            SlotPool(spec, num_slots=self.most_slots, device=device, dtype=dtype) for spec in store.manifest.layers
        ]
        self.page_table = np.full((self.num_layers, self.num_experts), -1, dtype=np.int32)
        self._owners = np.full((self.num_layers, self.most_slots), -1, dtype=np.int32)
        self._free = [list(range(self.num_slots - 1, -1, -1)) for _ in range(self.num_layers)]
        self._closed = [list(range(self.most_slots - 1, self.num_slots - 1, -1)) for _ in range(self.num_layers)]
        self._leases: list[dict[int, int]] = [{} for _ in range(self.num_layers)]
        self._policies = [KeepSome(policy(), experts) if experts else policy() for experts in self._kept]
        self._fetcher = SpanFetcher(store, self.pools, host_tier)
        self._hits = np.zeros(self.num_layers, dtype=np.int64)
        self._misses = np.zeros(self.num_layers, dtype=np.int64)
        self._evictions = np.zeros(self.num_layers, dtype=np.int64)
        self._fetch_bytes = np.zeros(self.num_layers, dtype=np.int64)
        self._fetch_seconds = np.zeros(self.num_layers, dtype=np.float64)

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Make experts of one layer resident and lease their slots until `release`.

        Args:
            experts: distinct ids, at most `num_slots` less the slots leased for other experts.

        Returns:
            The slot of each expert, in the order given. On an accelerator the copies are ordered before whatever the
            caller enqueues on the current stream next.

        Raises:
            SlotsError: more experts than slots.
            StoreError: an expert is not in the store or cannot be read; then no slot stays leased.
        """
        table = self.page_table[layer]
        leases = self._leases[layer]
        policy = self._policies[layer]
        missing: list[int] = []
        slots: list[int] = []
        for expert in experts:
            slot = int(table[expert])
            slots.append(slot)
            if slot < 0:
                missing.append(expert)
            else:
                policy.touch(expert)
            leases[expert] = leases.get(expert, 0) + 1
        self._hits[layer] += len(slots) - len(missing)
        if not missing:
            return slots
        self._misses[layer] += len(missing)
        try:
            if len(leases) > self.num_slots:
                raise SlotsError(f"layer {layer} needs {len(leases)} slots at once and has {self.num_slots}")
            self._fetch(layer, missing)
        except BaseException:
            self.release(layer, experts)
            raise
        return [int(slot) for slot in table[list(experts)]]

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """End the lease that `acquire` with the same arguments began; the experts stay resident until evicted."""
        leases = self._leases[layer]
        for expert in experts:
            if leases[expert] == 1:
                del leases[expert]
            else:
                leases[expert] -= 1

    @property
    def least_slots(self) -> int:
        """The fewest slots that `resize` may leave open now: one, those of the kept experts, and the leased ones."""
        return max(1, *map(len, self._kept), *map(len, self._leases))

    def resize(self, num_slots: int) -> None:
        """Open or close slots until every layer has `num_slots`. An expert in a slot that closes is evicted, the next
        victims first, and the slot's memory is given back to the system.

        Raises:
            SlotsError: fewer than are kept or leased, or more than `most_slots`; nothing was changed.
        """
        if not self.least_slots <= num_slots <= self.most_slots:
            raise SlotsError(f"{num_slots} slots a layer, wanted {self.least_slots} to {self.most_slots}")
        more = num_slots - self.num_slots
        for layer, pool in enumerate(self.pools):
            for _ in range(more):
                self._free[layer].append(self._closed[layer].pop())
            for _ in range(-more):
                slot = self._claim(layer)
                self._closed[layer].append(slot)
                pool.give_back(slot)
        self.num_slots = num_slots

    def misses_of_full_layers(self) -> int:
        """Misses since start in the layers that have no free slot now: what more slots might have saved."""
        return int(sum(count for count, free in zip(self._misses, self._free, strict=True) if not free))

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Make experts resident without a lease, in the order given, as many as there are slots that are not leased."""
        room = self.num_slots - len(self._leases[layer])
        chosen = list(experts[:room])
        self.acquire(layer, chosen)
        self.release(layer, chosen)

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill empty slots: the kept experts, then the store's in the order of its deep experts (best first).

        Args:
            progress: called with (bytes done, bytes in all) after each expert.
        """
        available = self._store.available if self._mask is None else self._store.available & self._mask
        order = [deep.experts for deep in self._store.manifest.deep_experts]
        wanted = []
        for layer in range(self.num_layers):
            wished = [*self._kept[layer], *(experts[layer] for experts in order)]
            ids = [expert for expert in wished if available[layer, expert]]
            absent = [expert for expert in dict.fromkeys(ids) if self.page_table[layer, expert] < 0]
            wanted += [(layer, expert) for expert in absent[: len(self._free[layer])]]
        total = sum(self.pools[layer].slot_bytes for layer, _ in wanted)
        done = 0
        for layer, expert in wanted:
            self._fetch(layer, [expert])
            done += self.pools[layer].slot_bytes
            if progress is not None:
                progress(done, total)

    def slots_bytes(self, num_slots: int) -> int:
        """Bytes of so many slots of each layer, in all layers."""
        return num_slots * sum(pool.slot_bytes for pool in self.pools)

    def resident(self, layer: int) -> list[int]:
        """Ids of the experts of a layer that are in slots now, next victim first."""
        return list(self._policies[layer].resident())

    def statistics(self) -> CacheStatistics:
        """A copy of the counters; may be called from any thread."""
        return CacheStatistics(
            hits=self._hits.copy(),
            misses=self._misses.copy(),
            evictions=self._evictions.copy(),
            fetch_bytes=self._fetch_bytes.copy(),
            fetch_seconds=self._fetch_seconds.copy(),
            resident=(self.page_table >= 0).sum(axis=1),
            num_slots=self.num_slots,
            slot_bytes=self.slots_bytes(self.num_slots),
            host_hits=self.host_tier.hits if self.host_tier else 0,
            host_misses=self.host_tier.misses if self.host_tier else 0,
            tier=self.host_tier.statistics() if self.host_tier else self._from_disk(),
        )

    def _from_disk(self) -> TierStatistics:
        """Without a host tier, every fetch is a read from the disk."""
        return TierStatistics(
            np.zeros((self.num_layers, self.num_experts), dtype=np.bool_),
            reads=int(self._misses.sum()),
            read_bytes=int(self._fetch_bytes.sum()),
            wait_seconds=float(self._fetch_seconds.sum()),
        )

    def close(self) -> None:
        """Stop the reader threads. The slots' memory is freed with the object."""
        self._fetcher.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless page table, owners, free slots, leases and policies agree."""
        for layer in range(self.num_layers):
            owners = self._owners[layer]
            resident = {int(expert): slot for slot, expert in enumerate(owners) if expert >= 0}
            table = {int(e): int(self.page_table[layer, e]) for e in np.flatnonzero(self.page_table[layer] >= 0)}
            assert table == resident, f"layer {layer}: page table {table} against owners {resident}"
            assert set(self._policies[layer].resident()) == set(resident), f"layer {layer}: the policy lost track"
            free = self._free[layer]
            assert len(set(free)) == len(free), f"layer {layer}: a free slot is listed twice: {free}"
            closed = self._closed[layer]
            assert len(set(closed)) == len(closed) == self.most_slots - self.num_slots, (
                f"layer {layer}: closed {closed}"
            )
            others = set(range(self.most_slots)) - set(closed) - set(resident.values())
            assert set(free) == others, f"layer {layer}: free slots {free}"
            assert all(count > 0 for count in self._leases[layer].values()), f"layer {layer}: a lease of 0"
            assert set(self._leases[layer]) <= set(resident), f"layer {layer}: a lease of an absent expert"
        if self.host_tier is not None:
            self.host_tier.check_integrity()

    def _fetch(self, layer: int, experts: Sequence[int]) -> None:
        available = self._store.available[layer]
        for expert in experts:
            if not (available[expert] or self._store.has_source):
                error = ExpertUnavailableError(
                    f"expert {expert} of layer {layer} is not in the store {self._store.path}; routing must be masked "
                    "to the experts that are available"
                )
                error.expert = (layer, expert)
                raise error
        started = time.perf_counter()
        claimed = [(expert, self._claim(layer)) for expert in experts]
        failure = self._fetcher.fill(layer, claimed)
        for expert, slot in claimed:
            if failure is None:
                self._owners[layer, slot] = expert
                self.page_table[layer, expert] = slot
                self._policies[layer].admit(expert)
            else:
                self._free[layer].append(slot)
        if failure is not None:
            raise failure
        self._fetch_bytes[layer] += len(claimed) * self._store.layer_spec(layer).span_bytes
        self._fetch_seconds[layer] += time.perf_counter() - started

    def _claim(self, layer: int) -> int:
        """Take a free slot, or evict the victim. The slot has no owner until `_fetch` sets one."""
        if self._free[layer]:
            return self._free[layer].pop()
        leases = self._leases[layer]
        victim = self._policies[layer].evict(leases.__contains__)
        slot = int(self.page_table[layer, victim])
        self.page_table[layer, victim] = -1
        self._owners[layer, slot] = -1
        self._evictions[layer] += 1
        return slot
