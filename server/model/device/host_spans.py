"""Experts' spans in page-locked host memory: allocation, reading them from the store, and more of them while serving.

A span in an arena has the compute dtype, so a fetch copies bytes. Invariant: an arena that was handed to
`DevicePages` never moves and is never written again.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import StoreError
from expert_store.paging.pages import DevicePages
from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store
from server.model.device.pack import NotCapturableError

log = logging.getLogger(__name__)

READ_THREADS = 8
SMALL_ARENA_BYTES = 1 << 30
Expert = tuple[int, int]
"""(MoE layer, expert)."""


class NotPinnableError(NotCapturableError):
    """The host gives less page-locked memory than the experts take."""


def new_arena(num_spans: int, elements: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """[num_spans, elements] of host memory, to be filled and then page-locked with `page_lock`. torch rounds its own
    pinned blocks up to powers of two, so only a small arena is one; a large one is mapped in huge pages."""
    num_bytes = num_spans * elements * dtype.itemsize
    if not pinned or num_bytes == 0:
        return torch.empty(num_spans, elements, dtype=dtype)
    if num_bytes <= SMALL_ARENA_BYTES:
        try:
            return torch.empty(num_spans, elements, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise NotPinnableError(f"{num_bytes} bytes of host memory could not be page-locked: {error}") from error
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_spans, elements)


def page_lock(arena: Tensor) -> None:
    """Page-locks an arena of `new_arena` for a GPU, until the tensor goes. Raises NotPinnableError."""
    if arena.is_pinned():
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = arena.data_ptr()
    status = int(runtime.cudaHostRegister(address, arena.nbytes, 0))
    if status != 0:
        raise NotPinnableError(f"{arena.nbytes} bytes of host memory could not be page-locked (CUDA error {status})")
    weakref.finalize(arena.untyped_storage(), runtime.cudaHostUnregister, address)


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
        self, experts: Sequence[Expert], into: Tensor, progress: Callable[[float], None] = lambda share: None
    ) -> None:
        """Fills into [n, elements] with the spans of `experts`, in their order. Raises StoreError."""
        done = 0
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="span-read") as readers:
            for _ in readers.map(self._read_one, experts, into):
                done += 1
                if done % 64 == 0:
                    progress(done / len(experts))

    def _read_one(self, expert: Expert, out: Tensor) -> None:
        if self._stored == self.dtype:
            self._store.read_expert(*expert, out.view(torch.uint8))
            return
        raw = torch.empty(self.elements * self._stored.itemsize, dtype=torch.uint8)
        self._store.read_expert(*expert, raw)
        out.copy_(raw.view(self._stored))


class SpanGrowth:
    """Brings spans of experts that came into use after the start: read and page-locked in the background, handed to the
    pages between two steps.

    Args:
        budget_bytes: of all page-locked spans; None has no bound.
    """

    def __init__(self, reader: SpanReader, pages: DevicePages, budget_bytes: int | None) -> None:
        self._reader, self._pages, self._budget = reader, pages, budget_bytes
        self._asked = pages.servable.numpy().copy()
        self._lock = threading.Lock()
        self._arrived: list[tuple[Tensor, list[Expert]]] = []
        self._threads: list[threading.Thread] = []

    def want(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Starts to bring those of allowed [L, E] that have no span yet. Returns at once; failures are logged, and the
        experts concerned stay out of reach."""
        absent = allowed & ~self._asked
        experts = [(int(layer), int(expert)) for layer, expert in np.argwhere(absent)]
        if not experts:
            return
        held = int((self._pages.host_index >= 0).sum()) if self._pages.shape.paged else 0
        needed = (held + len(experts)) * self._reader.span_bytes
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

    def take(self) -> bool:
        """Hands what has arrived to the pages; call it between two steps. Returns whether there was anything."""
        if not self._arrived:
            return False
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for arena, experts in arrived:
            self._pages.add_spans(arena, experts)
        return True

    def wait(self) -> None:
        """Waits until nothing is on its way."""
        while self._threads:
            self._threads.pop().join()

    def _bring(self, experts: list[Expert]) -> None:
        try:
            pinned = self._pages.slots.is_cuda
            arena = new_arena(len(experts), self._reader.elements, self._reader.dtype, pinned)
            self._reader.read(experts, arena)
            if pinned:
                page_lock(arena)
        except (StoreError, NotCapturableError, MemoryError, OSError):
            log.exception("%d experts that came to the store stay masked", len(experts))
            self._asked[tuple(np.array(experts).T)] = False
            return
        with self._lock:
            self._arrived.append((arena, experts))
