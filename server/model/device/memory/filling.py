"""Fills slots and rows at the start with what the first steps need; the rest follows in the background.

Invariant: an expert that cannot be read is in no memory, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.paging.pages import DevicePages
from server.model.device.memory.reading import Expert, Failures, SpanReader
from server.model.device.memory.tier import SpanTier
from server.model.load_progress import Phase, Progress

BOUNCE_SPANS = 16
"""Spans read at a time on the way into slots without a row."""


def in_turn(order: Sequence[Sequence[int]]) -> Iterator[Expert]:
    """The first expert of each layer, then the second of each, and so on."""
    for rank in range(max(map(len, order))):
        for layer, experts in enumerate(order):
            if rank < len(experts):
                yield layer, experts[rank]


def fill_slots(
    reader: SpanReader, pages: DevicePages, tier: SpanTier, order: Sequence[Sequence[int]], progress: Progress
) -> Failures:
    """Reads the experts that have slots at the start, and those of them that need it into rows too.

    Args:
        order: for each layer the experts that may be served, best first.

    Returns:
        The experts that could not be read.

    Raises:
        NotPinnableError: the host page-locks less memory than their rows need.
        StoreError: no expert of a layer can be read.
    """
    shape, num_slots = pages.shape, pages.num_open
    alone = num_slots if not shape.paged else 0 if tier.holds_all else pages.num_kept
    first = torch.full((shape.num_layers, num_slots), -1)
    for layer, experts in enumerate(order):
        chosen = torch.tensor(experts[:num_slots])
        first[layer, : len(chosen)] = chosen
    progress(Phase.READING, 0.0)
    failures = _read_into_slots(reader, pages, first[:, :alone], progress)
    with_rows = list(in_turn([experts[alone:num_slots] for experts in order]))
    failures |= tier.read_now(with_rows, lambda share: progress(Phase.READING, share))
    for layer in range(shape.num_layers):
        if all((layer, expert) in failures for expert in order[layer][:num_slots]):
            failures |= tier.read_now([(layer, expert) for expert in order[layer][num_slots:]])
            if all((layer, expert) in failures for expert in order[layer]):
                raise next(error for (where, _), error in failures.items() if where == layer)
    for layer, slot in (first >= 0).nonzero().tolist():
        expert = (layer, int(first[layer, slot]))
        if expert in failures or (slot >= alone and not tier.servable[expert]):  # unreadable, or no row left
            first[layer, slot] = -1
    progress(Phase.SLOTS, 0.0)
    pages.seed(first)
    return failures


def first_scores(order: Sequence[Sequence[int]], num_experts: int) -> npt.NDArray[np.float64]:
    """Scores [L, E] below one use, which rank the experts of each layer as `order` does."""
    scores = np.zeros((len(order), num_experts))
    for layer, experts in enumerate(order):
        scores[layer, list(experts)] = 1.0 - np.arange(len(experts)) / num_experts
    return scores


def _read_into_slots(reader: SpanReader, pages: DevicePages, wanted: Tensor, progress: Progress) -> Failures:
    """Reads the experts wanted [L, n] (-1: none) into slots 0 to n-1 of their layers, through a small bounce buffer."""
    failures: Failures = {}
    places = [
        (layer * pages.shape.num_slots + slot, (layer, expert))
        for layer, row in enumerate(wanted.tolist())
        for slot, expert in enumerate(row)
        if expert >= 0
    ]
    bounce = torch.empty(BOUNCE_SPANS, reader.elements, dtype=reader.dtype, pin_memory=pages.slots.is_cuda)
    for first in range(0, len(places), BOUNCE_SPANS):
        part = places[first : first + BOUNCE_SPANS]
        failures |= reader.read([expert for _, expert in part], bounce[: len(part)])
        for (slot, expert), span in zip(part, bounce, strict=False):
            if expert not in failures:
                pages.slots[slot].copy_(span)
        progress(Phase.READING, first / len(places))
    return failures
