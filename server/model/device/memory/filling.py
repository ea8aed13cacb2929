"""What lies in host memory and in slots when a device-driven model begins: its experts, read once.

Where something has to be fetched later, every span is page-locked and slots are filled from there; where every expert
has a slot, they go there for good. Invariant: an expert that cannot be read is in neither, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.paging.pages import DevicePages, PagesShape, Policy
from expert_store.pinned import new_arena, page_lock
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.memory.host_spans import Expert, Failures, SpanReader

Progress = Callable[[str, float], None]
BOUNCE_SPANS = 16
"""Spans read at a time where experts go to their slots for good and need no place in host memory."""


def filled_pages(
    store: Store,
    reader: SpanReader,
    mask: ExpertMask,
    shape: PagesShape,
    *,
    device: torch.device,
    policy: Policy,
    pinned: Sequence[Sequence[int]] | None,
    progress: Progress,
) -> tuple[DevicePages, Failures]:
    """Pages over the experts that a mask allows, and what of them could not be read.

    Args:
        pinned: for each layer the experts that keep their slots, equally many.

    Raises:
        NotPinnableError: the host page-locks less memory than they take.
        StoreError: no expert of a layer can be read.
    """
    if not shape.paged:
        pages = DevicePages(shape, None, device=device, policy=policy)
        unread = _read_into_slots(reader, pages, _first_experts(store, mask.allowed, shape.num_slots, pinned), progress)
        _check_unread(unread, mask)
        return pages, unread
    wanted = [(int(layer), int(expert)) for layer, expert in np.argwhere(mask.allowed)]
    spans, index, unread = _read_spans(reader, wanted, mask, device.type == "cuda", progress)
    _check_unread(unread, mask)
    num_pinned = len(pinned[0]) if pinned else 0
    pages = DevicePages(shape, spans, index, device=device, policy=policy, num_pinned=num_pinned)
    progress("filling slots", 0.0)
    pages.seed(_first_experts(store, mask.allowed & (index >= 0).numpy(), shape.num_slots, pinned))
    return pages, unread


def _check_unread(unread: Failures, mask: ExpertMask) -> None:
    """What cannot be read is left to who needs it, unless nothing of a layer can be read."""
    left = np.array(mask.allowed)
    for expert in unread:
        left[expert] = False
    empty = np.flatnonzero(~left.any(axis=1))
    if empty.size:
        raise next(error for (layer, _), error in unread.items() if layer == empty[0])


def _first_experts(
    store: Store, allowed: npt.NDArray[np.bool_], num_slots: int, pinned: Sequence[Sequence[int]] | None
) -> Tensor:
    """[L, num_slots] experts of allowed [L, E] that fill the slots first, -1 where a layer has no more: the pinned
    ones, then the store's deep experts in order."""
    order = torch.full((len(store.manifest.layers), num_slots), -1)
    for layer in range(len(order)):
        deep = (deep.experts[layer] for deep in store.manifest.deep_experts)
        wished = [*(pinned[layer] if pinned else ()), *deep]
        chosen = [expert for expert in dict.fromkeys(wished) if allowed[layer, expert]][:num_slots]
        order[layer, : len(chosen)] = torch.tensor(chosen)
    return order


def _read_spans(
    reader: SpanReader, wanted: Sequence[Expert], mask: ExpertMask, pinned: bool, progress: Progress
) -> tuple[Tensor, Tensor, Failures]:
    """Every wanted expert's span in one page-locked arena [N, span], where each is, [L, E], and what could not be
    read."""
    index = torch.full(mask.allowed.shape, -1, dtype=torch.int64)
    for row, (layer, expert) in enumerate(wanted):
        index[layer, expert] = row
    progress("reading experts", 0.0)
    spans = new_arena(len(wanted), reader.elements, reader.dtype, pinned)
    unread = reader.read(wanted, spans, lambda share: progress("reading experts", share))
    for layer, expert in unread:
        index[layer, expert] = -1
    if pinned:
        progress("pinning host memory", 0.0)
        page_lock(spans)
    return spans, index, unread


def _read_into_slots(reader: SpanReader, pages: DevicePages, order: Tensor, progress: Progress) -> Failures:
    """Every expert of `order` [L, S] into its slot, through a small bounce buffer; those that cannot be read are left
    out and returned."""
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
        progress("filling slots", first / len(places))
    pages.adopt(order)
    return unread
