"""Reads spans of experts that a token needs: from the source for requests that fetch, or from the store after a failed
first read.

The spans take free rows of the host tier, and new rows up to a fixed bound; then the least recently used row is
evicted. If every expert has a slot, the spans go to their slots and stay there. Invariant: a row is written only while
it belongs to no expert and the device does not read it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from expert_store.errors import SlotsError
from expert_store.paging.pages import DevicePages
from expert_store.pinned import NotPinnableError, locked_arena
from server.model.device.memory.reading import Expert, Failures, SpanReader

log = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 20
"""Host memory in bytes that is page-locked at a time, when its rows are needed."""
READ_AT_ONCE = 64


class NoRoomError(SlotsError):
    """One step needs more experts at once than memory has room for."""


class NeededSpans:
    """Reads experts into host memory or slots between two runs of a step, or during a prompt's chunk.

    Args:
        reader: reads the store, and its source if it has one.
        max_spans: most rows to page-lock in addition to the host tier's rows.

    Attributes:
        num_reads: spans read.
        num_changes: number of changes of the experts in reach.
        capacity: number of experts that fit at once; any thread may read it.
    """

    def __init__(self, reader: SpanReader, pages: DevicePages, max_spans: int) -> None:
        self._reader, self._pages, self._to_lock = reader, pages, max_spans
        self._free = pages.unused_rows()
        self._row = np.full((pages.shape.num_layers, pages.shape.num_experts), -1, dtype=np.int64)
        self._used_at = np.zeros(self._row.shape, dtype=np.int64)
        self._now = 0
        self.num_reads = 0
        self.num_changes = 0
        self.capacity = 0
        self._count()

    def use(self, experts: npt.NDArray[np.bool_]) -> None:
        """Mark these experts [L, E] as used by a step."""
        self._now += 1
        self._used_at[experts] = self._now

    def add_rows(self) -> None:
        """Adds the host tier's new rows without an expert to the free rows."""
        self._free = self._pages.unused_rows()
        self._count()

    def give_back(self, experts: Collection[Expert]) -> None:
        """Frees the rows of these experts, which have got other rows in the host tier."""
        held = [expert for expert in experts if self._row[expert] >= 0]
        if held:
            self._pages.reassign(held, {})
            self._free += [int(self._row[expert]) for expert in held]
            self._row[tuple(np.array(held).T)] = -1
            self.num_changes += 1

    def read(self, needed: Sequence[Expert], likely: Sequence[Expert], keep: npt.NDArray[np.bool_]) -> Failures:
        """Reads experts that are not in reach: all of `needed`, and of `likely` as many as fit. The device must have
        completed its step.

        Args:
            keep: [L, E], experts that must not be evicted.

        Returns:
            The experts that could not be read, with their errors.

        Raises:
            NoRoomError: there is no room for `needed`.
        """
        experts = [*needed, *likely]
        if not self._pages.shape.paged:
            return self._read_into_slots(experts)
        room = self._make_room(len(experts), keep)
        if len(needed) > room:
            raise NoRoomError(
                f"a step needs {len(needed)} experts beside those that the store has, and host memory has room for "
                f"{room}: raise host_memory"
            )
        dropped: list[Expert] = []
        rows = self._claim(min(len(experts), room), keep, dropped)
        experts = experts[: len(rows)]
        if self._pages.slots.is_cuda:
            torch.cuda.synchronize()  # a prompt's chunk may still copy from the dropped rows
        failures = self._reader.read(experts, [self._pages.host_row(row) for row in rows])
        placed = {one: row for one, row in zip(experts, rows, strict=True) if one not in failures}
        self._free += [row for one, row in zip(experts, rows, strict=True) if one in failures]
        self._pages.reassign(dropped, placed)
        for expert, row in placed.items():
            self._row[expert], self._used_at[expert] = row, self._now
        self.num_reads += len(placed)
        self.num_changes += 1
        return failures

    def in_turns(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Reads experts of one layer, as many at a time as there is room for, and yields them; after the generator
        resumes, the next ones may take their rows. Raises StoreError."""
        nothing = np.zeros(self._row.shape, dtype=np.bool_)
        left = list(experts)
        while left:
            part = left[: max(1, self._make_room(len(left), nothing))]
            failures = self.read([(layer, expert) for expert in part], (), nothing)
            if failures:
                raise next(iter(failures.values()))
            yield part
            left = left[len(part) :]

    def _make_room(self, count: int, keep: npt.NDArray[np.bool_]) -> int:
        """Page-locks rows for up to `count` experts within the bound; returns the number that can be read now."""
        if not self._pages.shape.paged:
            return self._row.size
        while len(self._free) < count and self._to_lock:
            self._lock_block()
        return len(self._free) + int(((self._row >= 0) & ~keep).sum())

    def _claim(self, count: int, keep: npt.NDArray[np.bool_], dropped: list[Expert]) -> list[int]:
        """`count` rows, free ones first, then those of the least recently used experts, which go into `dropped`."""
        rows = [self._free.pop() for _ in range(min(count, len(self._free)))]
        held = np.argwhere((self._row >= 0) & ~keep)
        order = np.argsort(self._used_at[tuple(held.T)], kind="stable")[: count - len(rows)]
        for layer, expert in held[order]:
            dropped.append((int(layer), int(expert)))
            rows.append(int(self._row[layer, expert]))
            self._row[layer, expert] = -1
        return rows

    def _lock_block(self) -> None:
        size = min(self._to_lock, max(1, BLOCK_BYTES // self._reader.span_bytes))
        try:
            arena = locked_arena(size, self._reader.elements, self._reader.dtype, self._pages.slots.is_cuda)
        except NotPinnableError as error:
            self._to_lock = 0
            self._count()
            log.warning("experts that requests fetch have room for %d at once: %s", self.capacity, error)
            return
        self._to_lock -= size
        first = self._pages.num_host_spans
        self._pages.add_spans(arena, [None] * size)
        self._free += range(first, first + size)

    def _count(self) -> None:
        """Check, between two changes, that every row is either free or held."""
        held = int((self._row >= 0).sum())
        self.capacity = len(self._free) + held + self._to_lock if self._pages.shape.paged else self._row.size

    def _read_into_slots(self, experts: Sequence[Expert]) -> Failures:
        failures: Failures = {}
        for first in range(0, len(experts), READ_AT_ONCE):
            part = experts[first : first + READ_AT_ONCE]
            spans = torch.empty(len(part), self._reader.elements, dtype=self._reader.dtype)
            failed = self._reader.read(part, spans)
            self._pages.add_spans(spans, [None if one in failed else one for one in part])
            failures |= failed
            self.num_reads += len(part) - len(failed)
        self.num_changes += 1
        return failures
