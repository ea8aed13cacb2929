"""Reads experts' spans from the store: all of them at the start, and more in the background after growth.

If slots hold fewer than all experts, every span is in page-locked memory and slots are filled from there; if every
expert has a slot, spans go to their slots and stay there. A span has the compute dtype, so a fetch copies bytes.
Invariants: an arena of `DevicePages` never moves, and a span of it that belongs to an expert is not written again; an
expert that cannot be read is in neither memory, and is reported.
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
from expert_store.paging.pages import DevicePages, PagesShape, Policy
from expert_store.pinned import NotPinnableError, new_arena, page_lock
from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.capture import need
from server.model.load_progress import Phase, Progress

log = logging.getLogger(__name__)

READ_THREADS = 8
BOUNCE_SPANS = 16
"""Spans read at a time if every expert has a slot and needs no host memory."""
Expert = tuple[int, int]
"""(MoE layer, expert)."""
Failures = dict[Expert, StoreError]


class SpanReader:
    """Reads spans of a store into memory of the compute dtype, or of words of four bytes if experts are packed, several
    at a time.

    Attributes:
        dtype, elements: of a span in memory.

    Raises:
        NotCapturableError: experts of mixed dtypes.
    """

    def __init__(self, store: Store, dtype: torch.dtype) -> None:
        layers, tensors = store.manifest.layers, store.manifest.layers[0].tensors
        self._store = store
        if any(layer.is_encoded for layer in layers):
            self.dtype, self._stored, self.elements = torch.int32, torch.int32, layers[0].span_bytes // 4
        else:
            stored = {TORCH_DTYPES[tensor.dtype] for spec in layers for tensor in spec.tensors}
            need(len(stored) == 1, f"experts of mixed dtypes: {sorted(str(one) for one in stored)}")
            self.dtype, self._stored = dtype, stored.pop()
            self.elements = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        self.span_bytes = self.elements * self.dtype.itemsize

    def read(
        self,
        experts: Sequence[Expert],
        into: Sequence[Tensor] | Tensor,
        progress: Callable[[float], None] | None = None,
    ) -> Failures:
        """Fills into [n, elements] (or n tensors [elements]) with the spans of `experts`, in their order.

        Returns the experts that could not be read, with their errors; their memory is undefined.
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
                with torch.inference_mode():  # a setting of this thread; `out` may come from another one
                    out.copy_(raw.view(self._stored))
        except StoreError as error:
            return error
        return None


def filled_pages(
    store: Store,
    reader: SpanReader,
    mask: ExpertMask,
    shape: PagesShape,
    *,
    device: torch.device,
    policy: Policy,
    kept: Sequence[Sequence[int]] | None,
    progress: Progress,
) -> tuple[DevicePages, Failures]:
    """Pages over the experts that a mask allows, and the experts that could not be read.

    Args:
        kept: for each layer the experts that are never evicted, the same number in each.

    Raises:
        NotPinnableError: the host page-locks less memory than they take.
        StoreError: no expert of a layer can be read.
    """
    if not shape.paged:
        pages = DevicePages(shape, None, device=device, policy=policy)
        unread = _read_into_slots(reader, pages, _first_experts(store, mask.allowed, shape.num_slots, kept), progress)
        _check_unread(unread, mask)
        return pages, unread
    experts = [(int(layer), int(expert)) for layer, expert in np.argwhere(mask.allowed)]
    spans, index, unread = _read_spans(reader, experts, mask, device.type == "cuda", progress)
    _check_unread(unread, mask)
    num_kept = len(kept[0]) if kept else 0
    pages = DevicePages(shape, spans, index, device=device, policy=policy, num_kept=num_kept)
    progress(Phase.SLOTS, 0.0)
    pages.seed(_first_experts(store, mask.allowed & (index >= 0).numpy(), shape.num_slots, kept))
    return pages, unread


def _check_unread(unread: Failures, mask: ExpertMask) -> None:
    """Raises StoreError if no expert of a layer could be read; others are read again when a token needs them."""
    left = np.array(mask.allowed)
    for expert in unread:
        left[expert] = False
    empty = np.flatnonzero(~left.any(axis=1))
    if empty.size:
        raise next(error for (layer, _), error in unread.items() if layer == empty[0])


def _first_experts(
    store: Store, allowed: npt.NDArray[np.bool_], num_slots: int, kept: Sequence[Sequence[int]] | None
) -> Tensor:
    """[L, num_slots] experts of allowed [L, E] that are in slots at the start, -1 for none: the kept ones, then the
    store's deep experts in order."""
    order = torch.full((len(store.manifest.layers), num_slots), -1)
    for layer in range(len(order)):
        deep = (deep.experts[layer] for deep in store.manifest.deep_experts)
        candidates = [*(kept[layer] if kept else ()), *deep]
        chosen = [expert for expert in dict.fromkeys(candidates) if allowed[layer, expert]][:num_slots]
        order[layer, : len(chosen)] = torch.tensor(chosen)
    return order


def _read_spans(
    reader: SpanReader, experts: Sequence[Expert], mask: ExpertMask, pinned: bool, progress: Progress
) -> tuple[Tensor, Tensor, Failures]:
    """The experts' spans in one page-locked arena [N, span], the row of each [L, E], and the unreadable experts."""
    index = torch.full(mask.allowed.shape, -1, dtype=torch.int64)
    for row, (layer, expert) in enumerate(experts):
        index[layer, expert] = row
    progress(Phase.READING, 0.0)
    spans = new_arena(len(experts), reader.elements, reader.dtype, pinned)
    unread = reader.read(experts, spans, lambda share: progress(Phase.READING, share))
    for layer, expert in unread:
        index[layer, expert] = -1
    if pinned:
        progress(Phase.PINNING, 0.0)
        page_lock(spans)
    return spans, index, unread


def _read_into_slots(reader: SpanReader, pages: DevicePages, order: Tensor, progress: Progress) -> Failures:
    """Reads every expert of `order` [L, S] into its slot, through a small bounce buffer; leaves out and returns those
    that cannot be read."""
    unread: Failures = {}
    places = [
        (layer * pages.shape.num_slots + slot, (layer, expert))
        for layer, row in enumerate(order.tolist())
        for slot, expert in enumerate(row)
        if expert >= 0
    ]
    bounce = torch.empty(BOUNCE_SPANS, reader.elements, dtype=reader.dtype, pin_memory=pages.slots.is_cuda)
    for first in range(0, len(places), BOUNCE_SPANS):
        part = places[first : first + BOUNCE_SPANS]
        unread |= reader.read([expert for _, expert in part], bounce[: len(part)])
        for (slot, where), span in zip(part, bounce, strict=False):
            if where in unread:
                order[where[0], slot % pages.shape.num_slots] = -1
            else:
                pages.slots[slot].copy_(span)
        progress(Phase.SLOTS, first / len(places))
    pages.adopt(order)
    return unread


class SpanGrowth:
    """Reads and page-locks spans of experts that the store gained after the start, in the background; `arrived` returns
    them between two steps.

    Args:
        unread: experts that could not be read at the start; they are read when a token needs them.
        budget_bytes: bound on all page-locked spans; None has no bound.

    Attributes:
        pending: bool [L, E], experts being read or without room in host memory; only requests that fetch may use them.
        num_changes: number of changes of `pending` and of arrivals of spans.
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

    def start(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Starts to read the experts of allowed [L, E] that were not read yet. Returns at once; failures are logged."""
        absent = allowed & ~self._asked
        if not self._pages.shape.paged:
            absent &= ~self._pages.servable.numpy()  # read for a request, and already in its slot
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
        thread = threading.Thread(target=self._read, args=(experts,), name="span-growth", daemon=True)
        self._threads.append(thread)
        thread.start()

    def take(self) -> list[tuple[Tensor, list[Expert | None]]]:
        """Spans [n, span_elements] that were read since the last call and the expert of each, None if it could not be
        read; they are no longer pending. Call it between two steps."""
        if not self._arrived:
            return []
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for _, experts, _ in arrived:
            self.pending[tuple(np.array(experts).T)] = False
            self.num_changes += 1
        return [(arena, [None if one in failed else one for one in experts]) for arena, experts, failed in arrived]

    def wait(self) -> None:
        """Waits until all reading has ended."""
        while self._threads:
            self._threads.pop().join()

    def _read(self, experts: list[Expert]) -> None:
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
    """Log one line for each expert that could not be read ahead of its use."""
    for (layer, expert), error in failures.items():
        log.error("expert %d of layer %d is read again when a token needs it: %s", expert, layer, error)
