"""The tiers of the device-driven path: slots, rows of page-locked host memory, and the store on disk.

A step uses what is *servable*: experts with a row, and experts that are alone in a slot. What else it chooses is read
from the disk into a row, and the step runs again. Where every expert of the store has room in rows, none of them ever
leaves. Else all rows are one pool, and the least used expert leaves it: an expert's score is the number of steps that
used it, halved every `HALF_LIFE_STEPS`. The most used ones are then alone in slots, so that slots and rows together
hold as many experts as they have room for. Rows are page-locked and filled in the background, block by block.
Invariants: a row is written only while it belongs to no expert and the device reads nothing from it; the engine's
thread alone changes rows, slots and scores.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import SlotsError
from expert_store.paging.pages import KEPT, DevicePages
from expert_store.residency.host_tier import TierStatistics
from expert_store.residency.pinned import NotPinnableError, locked_arena, new_arena, page_lock
from server.model.device.memory.ahead import AheadReads
from server.model.device.memory.reading import READ_THREADS, Expert, Failures, SpanReader, log_failures

log = logging.getLogger(__name__)

BLOCK_BYTES = 256 << 20
"""Host memory in bytes that is page-locked at a time."""
FETCHED_SHARE = 0.25
"""Room for experts that requests fetch beside the store's, as a share of these, if host memory has no bound."""
HALF_LIFE_STEPS = 64
MOST_AHEAD = 32
"""Rows through which a prompt's chunk reads experts ahead of the compute."""
MOST_EXCHANGES = 8
"""Experts that change places between slots and rows at once; each is a copy of one span from the device."""
Experts = npt.NDArray[np.bool_]
"""bool [L, E]."""


class NoRoomError(SlotsError):
    """One step needs more experts at once than memory has room for."""


def rows_within(budget_bytes: int | None, span_bytes: int, num_stored: int, step_spans: int) -> int:
    """Number of rows that host memory may have.

    Args:
        budget_bytes: of host memory; None has no bound.
        num_stored: experts of the store that are served.
        step_spans: most experts that one token needs.
    """
    if budget_bytes is not None:
        return budget_bytes // span_bytes
    return num_stored + max(step_spans, int(FETCHED_SHARE * num_stored))


class SpanTier:
    """Keeps experts in rows of host memory and alone in slots, and reads the others from the store, or its source.

    If every expert has a slot there are no rows: what is read goes to its slot and stays there.

    Args:
        budget_bytes: bound on all page-locked rows; None has none.
        fixed: [L, E], experts that are never removed from their slots.
        prior: [L, E], scores at the start; 1 is one use.

    Attributes:
        servable: [L, E], experts that a step can use.
        holds_all: whether every expert that is served has room in rows.
        evicts: whether an expert may leave memory, so that uses count.
        num_changes: number of changes of `servable`.
        num_reads: experts read because a token needed them.
        capacity: number of experts that have room beside those that never leave; any thread may read it.
        most_needed: most of these experts that one token needs.
    """

    def __init__(
        self,
        reader: SpanReader,
        pages: DevicePages,
        budget_bytes: int | None,
        *,
        fixed: Experts | None = None,
        prior: npt.NDArray[np.float64] | None = None,
    ) -> None:
        shape = pages.shape
        size = (shape.num_layers, shape.num_experts)
        self._reader, self._pages, self._budget = reader, pages, budget_bytes
        self._step_spans = shape.num_layers * min(shape.top_k, shape.num_experts)
        self._block = max(1, BLOCK_BYTES // reader.span_bytes)
        self._fixed: Experts = np.zeros(size, dtype=np.bool_) if fixed is None else fixed
        self._allowed, self._settled, self._unreadable = (np.zeros(size, dtype=np.bool_) for _ in range(3))
        self._score, self._now = np.zeros(size) if prior is None else prior.copy(), 1.0
        self._free: list[int] = []
        self._lock = threading.Condition()  # of the next four, which the background changes
        self._to_lock, self._is_full, self._fills = 0, False, False
        self._arrived: list[tuple[Tensor, list[Expert], Failures]] = []
        self._filling: threading.Thread | None = None
        self._stops = threading.Event()
        self._wait_seconds, self._num_filled = 0.0, 0
        self.num_reads = self.num_changes = self.capacity = self.most_needed = 0
        self.holds_all = False
        self._changed()

    # -- the set of experts --------------------------------------------------------------------------------------------

    def adopt(self, allowed: Experts) -> None:
        """Takes the experts that are served, [L, E], now allowed: those never leave memory if all of them have room.
        Ends what is read in the background, whose rows count to the bound; `fill` starts it again."""
        self._end_fill()
        shape, held = self._pages.shape, self._pages.num_host_spans
        most = rows_within(self._budget, self._reader.span_bytes, int(allowed.sum()), self._step_spans)
        most = min(most, allowed.size)
        was_settled, self._allowed = bool(self._settled.any()), allowed
        self.holds_all = not shape.paged or int(allowed.sum()) <= most
        self._settled = allowed & self.holds_all
        if was_settled and not self._settled.any():  # nobody counted while nothing could leave memory
            uses = self._pages.use_count.cpu().numpy() / max(1, int(self._pages.step))
            self._score = np.maximum(self._score, self._now * HALF_LIFE_STEPS * uses)
        with self._lock:
            self._to_lock = max(0, most - held) if shape.paged else 0
        self.capacity = max(most, held) - int(self._settled.sum()) if shape.paged else allowed.size
        self.most_needed = int(np.minimum((~self._settled).sum(axis=1), shape.top_k).sum())
        self._changed()

    def read_now(self, experts: Sequence[Expert], progress: Callable[[float], None] = lambda share: None) -> Failures:
        """Reads experts into new rows, or into their slots if each has one. Raises NotPinnableError."""
        left, failures = deque(experts), Failures()
        while left and (read := self._read_block(left, None)) is not None:
            failures |= self._take(*read)
            progress(1.0 - len(left) / len(experts))
        return failures

    def fill(self, experts: Iterable[Expert]) -> None:
        """Starts to read experts, best first, in the background, as far as host memory allows, in place of those that
        are read there now; `look` takes them."""
        self._end_fill()
        self._changed()
        left = deque(one for one in experts if not self.servable[one] and not self._unreadable[one])
        if left:
            self._fills = True
            self._filling = threading.Thread(target=self._fill, args=(left,), name="tier-fill", daemon=True)
            self._filling.start()

    def look(self) -> None:
        """Between two steps: takes what was read in the background."""
        if not self._arrived and not self._is_full:
            return
        self._take_arrived()
        with self._lock:
            is_full, self._is_full = self._is_full, False
        if is_full:
            self._end_fill()
            self._budget = self._pages.num_host_spans * self._reader.span_bytes
            self.adopt(self._allowed)

    def summary(self) -> str:
        """One line for the log: what host memory holds, and where the other experts are."""
        if not self._pages.shape.paged:
            return "every expert has a slot"
        with self._lock:
            rows = self._pages.num_host_spans + self._to_lock
        held = f"{rows * self._reader.span_bytes} bytes of page-locked host memory have room for {rows} experts"
        if self.holds_all:
            return f"{held}, all that are served among them; they are filled in the background"
        return (
            f"{held} beside those in slots, of {int(self._allowed.sum())} that are served; the others are read from "
            "the disk when a token needs them"
        )

    def wait(self) -> None:
        """Waits until nothing is read in the background."""
        if self._filling is not None:
            self._filling.join()
            self._filling = None

    def close(self) -> None:
        """Stops reading."""
        self._stops.set()
        self.wait()
        self._reader.close()

    def statistics(self) -> TierStatistics:
        """Counters since the start; any thread may ask."""
        reads = self._num_filled + (self.num_reads if self._pages.shape.paged else 0)
        return TierStatistics(
            in_host=(self._pages.host_index >= 0).numpy(),
            host_bytes=self._pages.num_host_spans * self._reader.span_bytes,
            reads=reads,
            read_bytes=reads * self._reader.span_bytes,
            wait_seconds=self._wait_seconds,
        )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def use(self, experts: Experts) -> None:
        """Count a step that used these experts [L, E]."""
        self._now *= 2.0 ** (1.0 / HALF_LIFE_STEPS)
        self._score[experts] += self._now
        if self._now > 1e100:
            self._score /= self._now
            self._now = 1.0

    def read(self, needed: Sequence[Expert], likely: Sequence[Expert], keep: Experts) -> Failures:
        """Reads those of the experts that are not servable: all of `needed`, and of `likely` as many as fit. The device
        must have completed its step.

        Args:
            keep: [L, E], experts that must stay servable.

        Returns:
            The experts that could not be read, with their errors.

        Raises:
            NoRoomError: there is no room for `needed`.
        """
        began = time.perf_counter()
        while True:
            needed = [one for one in needed if not self.servable[one]]
            experts = [*needed, *(one for one in likely if not self.servable[one])]
            room = self._room(len(experts), keep)
            if len(needed) <= room:
                break
            if not self._wait_for_block():
                raise NoRoomError(
                    f"a step needs {len(needed)} experts that are not in memory, and host memory has room for {room}: "
                    "raise host_memory"
                )
        experts = experts[:room]
        if not self._pages.shape.paged:
            failures = self.read_now(experts)
            self.num_reads += len(experts) - len(failures)
            self.waited(time.perf_counter() - began)
            return failures
        rows = self._claim(len(experts), keep)
        failures = self._reader.read(experts, [self._pages.host_row(row) for row in rows])
        self.waited(time.perf_counter() - began)
        self.place(zip(experts, rows, strict=True), failures)
        return failures

    def in_turns(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Reads experts of one layer, as many at a time as there is room for, and yields them; after the generator
        resumes, the next ones may take their rows. Raises StoreError."""
        nothing = np.zeros_like(self._settled)
        left = list(experts)
        while left:
            part = left[: max(1, self._room(len(left), nothing))]
            failures = self.read([(layer, expert) for expert in part], (), nothing)
            if failures:
                raise next(iter(failures.values()))
            yield part
            left = left[len(part) :]

    def ahead(self, allowed: Experts) -> AheadReads | None:
        """Starts to read those of a prompt's experts, allowed [L, E], that are in no memory, layer by layer, through a
        few rows, which other experts may lose. None if there are none, or no rows. Until its `finish` nothing else may
        be read."""
        pages, nothing = self._pages, np.zeros_like(self._settled)
        missing = int((allowed & ~self.servable).sum())
        if not pages.shape.paged or not missing:
            return None
        num_rows = min(missing, MOST_AHEAD, (self._room(min(missing, MOST_AHEAD), nothing) + 1) // 2)
        if not num_rows:
            return None
        rows = {row: pages.host_row(row) for row in self._claim(num_rows, nothing)}
        absent = allowed & ~self.servable & (pages.page_table.cpu().numpy() < 0)
        return AheadReads(
            self, self._reader, [(int(layer), int(expert)) for layer, expert in np.argwhere(absent)], rows
        )

    def resize(self, num_open: int, num_kept: int) -> None:
        """Open or close slots, see `DevicePages.resize`. Of the experts that are alone in slots, the least used leave
        memory where more are than may be kept."""
        alone = self._pages.alone.numpy() & ~self._fixed
        most = num_kept - (self._pages.alone.numpy() & self._fixed).sum(axis=1)
        leaving: list[Expert] = []
        for layer in np.flatnonzero(alone.sum(axis=1) > most).tolist():
            experts = np.flatnonzero(alone[layer])
            order = np.argsort(self._score[layer, experts], kind="stable")
            leaving += [(layer, expert) for expert in experts[order[: len(experts) - most[layer]]].tolist()]
        if leaving:
            self._pages.reassign(leaving, {})
        self._pages.resize(num_open, num_kept)
        self._changed()

    def waited(self, seconds: float) -> None:
        """Counts time for which a step or a prompt waited for the disk."""
        self._wait_seconds += seconds

    def place(self, read: Iterable[tuple[Expert, int]], failures: Failures, num_gone: int = 0) -> None:
        """Assigns rows to the experts that were read into them; rows of failed ones are free again. `num_gone` more
        were read and are not held any more."""
        placed = {}
        for expert, row in read:
            if expert in failures:
                self._free.append(row)
            else:
                placed[expert] = row
                self._score[expert] = max(self._score[expert], self._now)
        self._pages.reassign((), placed)
        self.num_reads += len(placed) + num_gone
        self._changed()

    def give_back(self, rows: Iterable[int]) -> None:
        """Rows that were claimed and not used are free again."""
        self._free += rows

    # -- inside --------------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """After a change of pages or limits: note what is servable and what fits."""
        self.servable: Experts = self._pages.servable.numpy().copy()
        self.evicts = bool(self._loose().any())
        self.num_changes += 1

    def _loose(self) -> Experts:
        """Experts whose row another expert may get."""
        return (self._pages.host_index >= 0).numpy() & ~self._settled

    def _room(self, count: int, keep: Experts) -> int:
        """Page-locks rows for up to `count` experts within the bound; returns the number that can be read now."""
        if not self._pages.shape.paged:
            return count
        while len(self._free) < count and (size := self._reserve(self._block)):
            try:
                reader, pinned = self._reader, self._pages.slots.is_cuda
                self._add_rows(locked_arena(size, reader.elements, reader.dtype, pinned), [])
            except NotPinnableError as error:
                self._stop_locking(error)
        return len(self._free) + int((self._loose() & ~keep).sum())

    def _claim(self, count: int, keep: Experts) -> list[int]:
        """`count` rows, free ones first, then those that other experts lose."""
        short = count - len(self._free)
        if short > 0:
            if self._pages.slots.is_cuda:
                torch.cuda.synchronize()  # a prompt's chunk may still copy from these rows
            self._evict(short, keep)
        return [self._free.pop() for _ in range(count)]

    def _evict(self, count: int, keep: Experts) -> None:
        """Frees `count` rows: the most used experts in evictable slots give theirs away while slots may be kept for
        them; then the least used experts leave memory. One that is alone in a slot leaves this to the most used
        expert of its layer's other slots, which gives its row away."""
        index, alone = self._pages.host_index.numpy(), self._pages.alone.numpy().copy()
        movable, room = self._movable_to_slots(alone)
        has_row = index >= 0
        leaving: list[Expert] = []
        settling: list[Expert] = []

        def settle(layer: int) -> bool:
            """Let the most used movable expert of a layer be alone in its slot."""
            most = int(np.where(movable[layer], self._score[layer], -1.0).argmax())
            if not movable[layer, most]:
                return False
            movable[layer, most] = has_row[layer, most] = False
            settling.append((layer, most))
            return True

        for layer in np.flatnonzero(room > 0).tolist():
            while room[layer] and len(settling) < count and settle(layer):
                room[layer] -= 1
        cold = np.argwhere((has_row | alone) & ~keep & ~self._settled & ~(alone & self._fixed))
        order = np.argsort(self._score[tuple(cold.T)], kind="stable")
        freed = len(settling)
        for layer, expert in cold[order].tolist():
            if freed == count:
                break
            if has_row[layer, expert]:
                movable[layer, expert] = has_row[layer, expert] = False
            elif not (alone[layer, expert] and settle(layer)):
                continue
            leaving.append((layer, expert))
            freed += 1
        self._free += [int(index[one]) for one in (*leaving, *settling) if index[one] >= 0]
        self._pages.reassign(leaving, {}, settling)
        self._changed()

    def _movable_to_slots(self, alone: Experts) -> tuple[Experts, npt.NDArray[np.int64]]:
        """Experts with a row that are in evictable slots, [L, E], and the number of them in each layer that may be
        alone there, [L]. Warm ones change places with cool ones that are alone, a few at a time."""
        pages = self._pages
        if pages.num_kept == 0:
            return np.zeros_like(alone), np.zeros(len(alone), dtype=np.int64)
        table, kept = pages.page_table.cpu().numpy(), pages.kept.cpu().numpy() == KEPT
        layers = np.arange(len(table))[:, None]
        movable = (table >= 0) & (pages.host_index.numpy() >= 0) & ~kept[layers, np.maximum(table, 0)]
        warm = np.where(movable, self._score, -1.0)
        cool = np.where(alone & ~self._fixed, self._score, np.inf)
        gain = warm.max(axis=1) - 2.0 * cool.min(axis=1)
        for layer in np.argsort(-gain, kind="stable")[:MOST_EXCHANGES].tolist():
            if gain[layer] > 0.0:
                one, other = int(warm[layer].argmax()), int(cool[layer].argmin())
                pages.exchange(layer, one, other)
                movable[layer, one], movable[layer, other] = False, True
                alone[layer, one], alone[layer, other] = True, False
        return movable, pages.num_kept - kept.sum(axis=1)

    def _take(self, spans: Tensor, experts: list[Expert], failures: Failures) -> Failures:
        """Adds a block that was read; experts that came to memory on another way meanwhile do not need theirs."""
        for expert in failures:
            self._unreadable[expert] = True
        self._add_rows(spans, [None if one in failures or self.servable[one] else one for one in experts])
        self._num_filled += len(experts) - len(failures)
        return failures

    def _add_rows(self, spans: Tensor, experts: list[Expert | None]) -> None:
        """Adds rows [n, span] with these experts; rows without one are free. Slots take them if each expert has one."""
        first = self._pages.num_host_spans
        experts = [*experts, *[None] * (len(spans) - len(experts))]
        self._pages.add_spans(spans, experts)
        if self._pages.shape.paged:
            self._free += [first + at for at, expert in enumerate(experts) if expert is None]
        self._changed()

    def _wait_for_block(self) -> bool:
        """Waits for what the background reads now, and takes it; returns whether there may be more room now."""
        with self._lock:
            self._lock.wait_for(lambda: self._arrived or not self._fills)
            has_changed = bool(self._arrived) or self._is_full  # where memory is full, experts may leave it
        self.look()
        return has_changed

    def _end_fill(self) -> None:
        """Ends what is read in the background after the block under way, and takes what was read."""
        self._stops.set()
        self.wait()
        self._stops.clear()
        self._take_arrived()

    def _take_arrived(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for block in arrived:
            log_failures(self._take(*block))

    def _reserve(self, count: int) -> int:
        """Takes up to a block of rows from those that may be page-locked."""
        if not self._pages.shape.paged:
            return min(count, self._block)
        with self._lock:
            size = min(count, self._block, self._to_lock)
            self._to_lock -= size
            return size

    def _stop_locking(self, error: NotPinnableError | MemoryError) -> None:
        log.warning("host memory takes %d experts and no more: %s", self._pages.num_host_spans, error)
        with self._lock:
            self._to_lock, self._is_full = 0, True

    def _read_block(
        self, left: deque[Expert], readers: ThreadPoolExecutor | None
    ) -> tuple[Tensor, list[Expert], Failures] | None:
        """Reads the first experts of `left`, which it removes, into a new block of rows; None if there is no room."""
        size = self._reserve(len(left))
        if not size:
            return None
        experts: list[Expert] = []
        while left and len(experts) < size:
            expert = left.popleft()
            if not self.servable[expert]:
                experts.append(expert)
        pinned = self._pages.slots.is_cuda and self._pages.shape.paged
        spans = new_arena(size, self._reader.elements, self._reader.dtype, pinned)
        failures = self._reader.read(experts, spans, readers=readers)
        if pinned:
            page_lock(spans)  # after it was written: many times as fast
        return spans, experts, failures

    def _fill(self, left: deque[Expert]) -> None:
        try:
            with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="tier-fill") as readers:
                while left and not self._stops.is_set():
                    arrived = self._read_block(left, readers)
                    if arrived is None:
                        return
                    with self._lock:
                        self._arrived.append(arrived)
                        self._lock.notify_all()
        except (NotPinnableError, MemoryError) as error:
            self._stop_locking(error)
        finally:
            with self._lock:
                self._fills = False
                self._lock.notify_all()
