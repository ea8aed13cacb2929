"""Reading experts' spans from the store into host memory: all of them at the start, and more in the background after
growth.

A span in an arena has the compute dtype, so a fetch copies bytes. Invariants: an arena that was handed to `DevicePages`
never moves, and a span in it that an expert has is not written again; no expert gets a span whose bytes did not prove
right.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import StoreError
from expert_store.paging.pages import DevicePages
from expert_store.pinned import NotPinnableError, new_arena, page_lock
from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store
from server.model.device.capture import NotCapturableError

log = logging.getLogger(__name__)

READ_THREADS = 8
Expert = tuple[int, int]
"""(MoE layer, expert)."""
Failures = dict[Expert, StoreError]


class SpanReader:
    """Reads spans of a store into memory of the compute dtype, several at a time.

    Raises NotCapturableError for experts of mixed dtypes.
    """

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        layers = store.manifest.layers
        stored = {TORCH_DTYPES[tensor.dtype] for spec in layers for tensor in spec.tensors}
        if len(stored) != 1:
            raise NotCapturableError(f"experts of mixed dtypes: {sorted(str(one) for one in stored)}")
        self._store, self.dtype, self._stored = store, dtype, stored.pop()
        self.elements = sum(torch.Size(tensor.shape).numel() for tensor in layers[0].tensors)
        self.span_bytes = self.elements * dtype.itemsize

    def read(
        self,
        experts: Sequence[Expert],
        into: Sequence[Tensor] | Tensor,
        progress: Callable[[float], None] | None = None,
    ) -> Failures:
        """Fills into [n, elements] (or n tensors [elements]) with the spans of `experts`, in their order.

        Returns what could not be read, and why; the memory of those is undefined.
        """
        failures: Failures = {}
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="span-read") as readers:
            for done, (expert, error) in enumerate(
                zip(experts, readers.map(self._read_one, experts, into), strict=True)
            ):
                if error is not None:
                    failures[expert] = error
                if progress is not None and done % 64 == 0:
                    progress(done / len(experts))
        return failures

    def _read_one(self, expert: Expert, out: Tensor) -> StoreError | None:
        try:
            if self._stored == self.dtype:
                self._store.read_expert(*expert, out.view(torch.uint8))
            else:
                raw = torch.empty(self.elements * self._stored.itemsize, dtype=torch.uint8)
                self._store.read_expert(*expert, raw)
                with torch.inference_mode():  # of this thread; `out` may have been made in another's
                    out.copy_(raw.view(self._stored))
        except StoreError as error:
            return error
        return None


class SpanGrowth:
    """Brings spans of experts that came into use after the start: read and page-locked in the background, handed over
    between two steps.

    Args:
        unread: experts that could not be read at the start; they are read when a token needs them.
        budget_bytes: of all page-locked spans; None has no bound.

    Attributes:
        pending: bool [L, E], on their way or without a place in host memory: requests go without them, unless they
            fetch.
        num_changes: how often `pending` or what arrived has changed.
    """

    def __init__(
        self, reader: SpanReader, pages: DevicePages, budget_bytes: int | None, unread: Iterable[Expert] = ()
    ) -> None:
        self._reader, self._pages, self._budget = reader, pages, budget_bytes
        self._asked = pages.servable.numpy().copy()
        for expert in unread:
            self._asked[expert] = True
        self.pending: npt.NDArray[np.bool_] = np.zeros_like(self._asked)
        self.num_changes = 0
        self._lock = threading.Lock()
        self._arrived: list[tuple[Tensor, list[Expert], Failures]] = []
        self._threads: list[threading.Thread] = []

    def want(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Starts to bring those of allowed [L, E] that were not brought yet. Returns at once; what goes wrong is
        logged."""
        absent = allowed & ~self._asked
        if not self._pages.shape.paged:
            absent &= ~self._pages.servable.numpy()  # fetched for a request, and in its slot for good
        experts = [(int(layer), int(expert)) for layer, expert in np.argwhere(absent)]
        if not experts:
            return
        self.pending |= absent
        self.num_changes += 1
        needed = (self._pages.num_host_spans + len(experts)) * self._reader.span_bytes
        if self._budget is not None and self._pages.shape.paged and needed > self._budget:
            log.warning(
                "%d experts came to the store and stay masked: with them page-locked host memory would take %d bytes, "
                "and host_memory is %d; restart with more",
                len(experts), needed, self._budget,
            )  # fmt: skip
            return
        self._asked |= absent
        thread = threading.Thread(target=self._bring, args=(experts,), name="span-growth", daemon=True)
        self._threads.append(thread)
        thread.start()

    def take(self) -> list[tuple[Tensor, list[Expert | None]]]:
        """What has arrived since the last call: spans [n, span_elements] and whose each is, None where its expert could
        not be read; those are no longer pending either. Call it between two steps."""
        if not self._arrived:
            return []
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for _, experts, _ in arrived:
            self.pending[tuple(np.array(experts).T)] = False
            self.num_changes += 1
        return [(arena, [None if one in failed else one for one in experts]) for arena, experts, failed in arrived]

    def wait(self) -> None:
        """Waits until nothing is on its way."""
        while self._threads:
            self._threads.pop().join()

    def _bring(self, experts: list[Expert]) -> None:
        try:
            pinned = self._pages.slots.is_cuda
            arena = new_arena(len(experts), self._reader.elements, self._reader.dtype, pinned)
            failures = self._reader.read(experts, arena)
            if pinned:
                page_lock(arena)
        except (NotPinnableError, MemoryError, OSError):
            log.exception("%d experts that came to the store stay masked", len(experts))
            self._asked[tuple(np.array(experts).T)] = False
            return
        log_failures(failures)
        with self._lock:
            self._arrived.append((arena, experts, failures))


def log_failures(failures: Failures) -> None:
    """One line for each expert that could not be read ahead of its use."""
    for (layer, expert), error in failures.items():
        log.error("expert %d of layer %d is read again when a token needs it: %s", expert, layer, error)
