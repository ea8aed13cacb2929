"""Fetches the bytes of experts into claimed slots, from disk or through the host tier.

Invariant: when `fill` returns, no thread writes into a slot any more, and on an accelerator the copies are ordered
before the work that the caller enqueues next on the current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from expert_store.residency.host_tier import PARALLEL_READ_BYTES, READ_THREADS, HostTier
from expert_store.residency.slots import SlotPool

if TYPE_CHECKING:
    from expert_store.store import Store

Claim = tuple[int, int]
"""(expert, slot): the slot has no owner until the expert is in it."""


class SpanFetcher:
    """Fills slots; one thread calls it.

    Args:
        store: the store to read spans from.
        pools: the slots of each layer, all on one device.
        host_tier: host memory between disk and slots, closed with the fetcher; None reads into the slots' memory.
    """

    def __init__(self, store: Store, pools: Sequence[SlotPool], host_tier: HostTier | None) -> None:
        self._store, self._pools, self._host = store, pools, host_tier
        self._device = pools[0].device
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="expert-read")
        is_cuda = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if is_cuda else None  # type: ignore[no-untyped-call]

    def fill(self, layer: int, claims: Sequence[Claim]) -> Exception | None:
        """Fill the claimed slots of a layer. Returns the error if one occurred; then none of them holds its expert."""
        try:
            if self._host is None:
                self._fill_from_disk(layer, claims)
            else:
                self._fill_from_host(layer, claims, self._host)
        except Exception as error:  # the caller frees the slots, then raises it
            return error
        return None

    def close(self) -> None:
        """Stop the reader threads, and close the host tier."""
        self._readers.shutdown(wait=True)
        if self._host is not None:
            self._host.close()

    def _fill_from_disk(self, layer: int, claims: Sequence[Claim]) -> None:
        pool = self._pools[layer]

        def read(claim: Claim) -> Exception | None:
            expert, slot = claim
            try:
                pool.fill(slot, lambda out: self._store.read_expert(layer, expert, out))
            except Exception as error:  # raised after the last thread has stopped writing into slots
                return error
            return None

        in_parallel = len(claims) > 1 and pool.spec.span_bytes >= PARALLEL_READ_BYTES
        errors = list(self._readers.map(read, claims) if in_parallel else map(read, claims))
        failure = next((error for error in errors if error is not None), None)
        if failure is not None:
            raise failure

    def _fill_from_host(self, layer: int, claims: Sequence[Claim], host: HostTier) -> None:
        pool = self._pools[layer]
        chunk = max(1, host.num_entries)
        for start in range(0, len(claims), chunk):
            part = claims[start : start + chunk]
            experts = [expert for expert, _ in part]
            if self._copies is None:
                for (_, slot), span in zip(part, host.read(layer, experts), strict=True):
                    pool.copy_from(slot, span)
                continue
            if not host.holds(layer, experts):
                self._copies.synchronize()  # an entry must not be overwritten while it is copied to a slot
            spans = host.read(layer, experts)
            current = torch.cuda.current_stream(self._device)
            self._copies.wait_stream(current)
            with torch.cuda.stream(self._copies):
                for (_, slot), span in zip(part, spans, strict=True):
                    pool.copy_from(slot, span)
            current.wait_stream(self._copies)
