"""The expert cache of the device-driven path, as engine and metrics read it: statistics of the device's page table.

Invariant: this module never changes pages; only kernels do. Each call copies a little data from the device and so waits
for the running step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expert_store.paging.pages import DevicePages
from expert_store.residency.cache import CacheStatistics
from expert_store.store import Store
from server.model.device.memory.tier import SpanTier


class PagedCache:
    """`server.model.runner.Residency` over `DevicePages`."""

    def __init__(self, store: Store, pages: DevicePages, tier: SpanTier) -> None:
        self.pages, self._tier = pages, tier
        self._span_bytes = np.array([spec.span_bytes for spec in store.manifest.layers], dtype=np.int64)
        self.num_layers, self.num_experts = pages.shape.num_layers, pages.shape.num_experts

    @property
    def page_table(self) -> npt.NDArray[np.int32]:
        """Slot of each expert, -1 where it has none: [L, E], copied."""
        table: npt.NDArray[np.int32] = self.pages.page_table.cpu().numpy()
        return table

    def statistics(self) -> CacheStatistics:
        """Counters since start. Evictions are misses while every slot was taken. Fetches have no seconds of their own,
        since they overlap with compute. Host misses are experts that were read because a token needed them."""
        hits, misses, spilled = self.pages.stats[:, :3].cpu().numpy().T.copy()
        resident = (self.page_table >= 0).sum(axis=1)
        return CacheStatistics(
            hits=hits,
            misses=misses,
            evictions=np.maximum(misses - spilled, 0),
            fetch_bytes=misses * self._span_bytes,
            fetch_seconds=np.zeros(self.num_layers),
            resident=resident,
            num_slots=self.pages.num_open,
            slot_bytes=self.pages.open_bytes,
            host_hits=int(misses.sum()),
            host_misses=self._tier.num_reads,
            tier=self._tier.statistics(),
        )

    def check_integrity(self) -> None:
        """Raises SlotsError if the page table and the slots' owners disagree."""
        self.pages.check_integrity()

    def close(self) -> None:
        """Does nothing: there is no thread to stop, and the memory is freed with the object."""
