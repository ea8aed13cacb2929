"""Slots, rows and disk as one: random uses against invariants, and the experts that stay. No kernel runs here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from expert_store.errors import ShardCorruptError, StoreError
from expert_store.paging.pages import KEPT, DevicePages, PagesShape
from expert_store.residency.pinned import NotPinnableError
from server.model.device.memory import tier as device_tier
from server.model.device.memory.filling import fill_slots, first_scores, in_turn
from server.model.device.memory.tier import NoRoomError, SpanTier

LAYERS, EXPERTS, TOP_K, SLOTS, SPAN = 3, 10, 2, 4, 16
ORDER = [list(range(EXPERTS))] * LAYERS
ALL = np.ones((LAYERS, EXPERTS), dtype=np.bool_)


def content(expert: tuple[int, int]) -> float:
    return float(expert[0] * EXPERTS + expert[1])


class FakeReader:
    """Fills spans with the expert's number. In the background it sets `waits`, and waits while `gate` is closed."""

    elements, dtype, span_bytes = SPAN, torch.float32, SPAN * 4

    def __init__(self) -> None:
        self.damaged: set[tuple[int, int]] = set()
        self.waits, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self._threads = ThreadPoolExecutor(2)

    def submit(
        self, expert: tuple[int, int], out: Tensor, wait: Callable[[], object] | None = None
    ) -> Future[StoreError | None]:
        def read() -> StoreError | None:
            if wait is not None:
                wait()
            return self._read_one(expert, out)

        return self._threads.submit(read)

    def read(self, experts: Any, into: Any, readers: Any = None) -> dict[Any, StoreError]:
        if readers is not None:
            self.waits.set()
            self.gate.wait()
        errors = {one: self._read_one(one, out) for one, out in zip(experts, into, strict=False)}
        return {one: error for one, error in errors.items() if error is not None}

    def close(self) -> None:
        self._threads.shutdown()

    def _read_one(self, expert: tuple[int, int], out: Tensor) -> StoreError | None:
        out.fill_(content(expert))
        return ShardCorruptError(f"{expert} is damaged") if expert in self.damaged else None


class Device:
    """Pages and tier, and the device's part of a step: hits, and evictions of the least recently used."""

    def __init__(
        self, num_rows: int | None, num_fixed: int = 0, keeps: bool = True, fills: bool = True, damaged: Any = ()
    ) -> None:
        self.reader: Any = FakeReader()
        self.reader.damaged = set(damaged)
        shape = PagesShape(LAYERS, EXPERTS, TOP_K, SLOTS, SPAN, 1, torch.float32)
        self.pages = DevicePages(shape, None, num_kept=SLOTS - TOP_K if keeps else num_fixed)
        fixed = np.zeros_like(ALL)
        fixed[:, :num_fixed] = True
        budget = None if num_rows is None else num_rows * self.reader.span_bytes
        self.tier = SpanTier(self.reader, self.pages, budget, fixed=fixed, prior=first_scores(ORDER, EXPERTS))
        self.tier.adopt(ALL)
        fill_slots(self.reader, self.pages, self.tier, ORDER, lambda phase, share: None)
        self.tier.fill(in_turn(ORDER) if fills else ())
        self.step, self.num_fixed = 0, num_fixed

    def use(self, picks: np.ndarray) -> None:
        """One token: picks [L, K]."""
        used = np.zeros_like(ALL)
        used[np.arange(LAYERS)[:, None], picks] = True
        self.tier.look()
        missing = [tuple(one) for one in np.argwhere(used & ~self.tier.servable).tolist()]
        if missing:
            assert not self.tier.read(missing, (), used)
        assert self.tier.servable[used].all()
        self.tier.use(used)
        self.step += 1
        pages = self.pages
        for layer, experts in enumerate(picks.tolist()):
            for expert in experts:
                if int(pages.page_table[layer, expert]) < 0:
                    loose = [slot for slot in range(SLOTS) if not pages.kept[layer, slot]]
                    slot = min(loose, key=lambda slot: int(pages.last_use[layer, slot]))
                    gone = int(pages.slot_owner[layer, slot])
                    if gone >= 0:
                        pages.page_table[layer, gone] = -1
                    pages.page_table[layer, expert], pages.slot_owner[layer, slot] = slot, expert
                    pages.slots[layer * SLOTS + slot].copy_(pages.host_span(layer, expert))
                pages.last_use[layer, int(pages.page_table[layer, expert])] = self.step

    def check(self) -> None:
        """Every servable expert has its bytes, the fixed ones are servable, rows belong to one expert or none, and few
        slots are kept."""
        self.pages.check_integrity(contents=True)
        assert self.tier.servable[:, : self.num_fixed].all()
        rows = self.pages.host_index[self.pages.host_index >= 0].tolist()
        assert sorted([*rows, *self.tier._free]) == list(range(self.pages.num_host_spans))
        assert (self.tier.servable == self.pages.servable.numpy()).all()
        assert not (self.pages.alone & (self.pages.host_index >= 0)).any(), "an expert alone in a slot has a row"
        for layer, expert in np.argwhere(self.tier.servable).tolist():
            if self.pages.alone[layer, expert]:
                slot = int(self.pages.page_table[layer, expert])
                assert self.pages.kept[layer, slot]
                span = self.pages.slots[layer * SLOTS + slot]
            else:
                span = self.pages.host_span(layer, expert)
            assert (span == content((layer, expert))).all()
        assert int((self.pages.kept == KEPT).sum(dim=1).max()) <= self.pages.num_kept


def random_picks(generator: np.random.Generator, skew: float) -> np.ndarray:
    """Experts 3, 4, … are wanted most."""
    weights = (1.0 + (np.arange(EXPERTS) - 3) % EXPERTS) ** -skew
    return np.stack([generator.choice(EXPERTS, TOP_K, False, weights / weights.sum()) for _ in range(LAYERS)])


@pytest.mark.parametrize(("num_rows", "num_fixed", "keeps"), [
    (6, 0, True), (6, 1, True), (9, 0, True), (15, 2, True), (24, 0, True), (29, 0, False),
    (8, 1, False), (30, 0, False),
])  # fmt: skip
def test_random_uses_keep_every_invariant(num_rows, num_fixed, keeps):
    device, generator = Device(num_rows, num_fixed, keeps), np.random.default_rng(num_rows)
    for _ in range(40):
        device.use(random_picks(generator, 1.0))
        if generator.random() < 0.2:
            reads = device.tier.ahead(ALL)
            for at, expert in enumerate(reads.experts if reads is not None else ()):
                assert (reads.wait(at) == content(expert)).all()
                reads.copied(None)
                if generator.random() < 0.02:
                    break
            if reads is not None:
                reads.finish()
        device.check()
        assert device.pages.num_host_spans <= num_rows
    device.tier.close()


@pytest.mark.parametrize(("num_rows", "num_fixed", "keeps"), [
    (6, 0, True), (6, 1, True), (9, 0, True), (24, 1, True), (15, 1, False), (30, 0, False),
])  # fmt: skip
def test_random_uses_keep_every_invariant_while_slots_open_and_close(num_rows, num_fixed, keeps):
    device, generator = Device(num_rows, num_fixed, keeps), np.random.default_rng(num_rows)
    for _ in range(60):
        device.use(random_picks(generator, 1.0))
        if generator.random() < 0.4:
            num_open = int(generator.integers(TOP_K + 1, SLOTS + 1))
            device.tier.resize(num_open, num_open - TOP_K if keeps else num_fixed)
            assert device.pages.num_open == num_open
        device.check()
    device.tier.close()


def test_the_least_used_of_the_experts_that_are_nowhere_else_leave_memory_with_their_slots():
    device = Device(9, fills=False)
    for _ in range(8):
        device.use(np.full((LAYERS, TOP_K), [0, 3]))
    alone = device.pages.alone.numpy().copy()
    assert alone[:, [0, 1]].all(), "the first experts have the kept slots"
    device.tier.resize(TOP_K + 1, 1)
    assert (device.pages.alone.sum(dim=1) == 1).all()
    assert device.tier.servable[:, 0].all()
    assert not device.tier.servable[:, 1].any()
    device.check()
    device.use(np.full((LAYERS, TOP_K), [0, 1]))
    device.check()
    device.tier.close()


def test_slots_and_rows_together_hold_as_many_experts_as_they_have_room_for():
    device, generator = Device(9), np.random.default_rng(0)
    for _ in range(20):
        device.use(random_picks(generator, 1.0))
    assert device.tier.servable.sum() == LAYERS * (SLOTS - TOP_K) + 9
    device.tier.close()


def test_the_most_used_experts_stay_and_the_least_used_one_leaves():
    device, generator = Device(9), np.random.default_rng(1)
    device.tier.wait()
    for _ in range(60):
        device.use(random_picks(generator, 3.0))
    assert device.tier.servable[:, [3, 4]].all()
    reads = device.tier.num_reads
    for _ in range(10):
        device.use(np.full((LAYERS, TOP_K), [3, 4]))
    assert device.tier.num_reads == reads
    device.use(np.full((LAYERS, TOP_K), [0, 1]))
    assert device.tier.servable[:, [0, 1, 3, 4]].all(), "experts that were used once do not replace the most used"
    device.tier.close()


def test_where_everything_has_room_nothing_ever_leaves():
    device = Device(None, keeps=False)
    device.tier.wait()
    device.tier.look()
    assert device.tier.servable.all()
    assert not device.tier.evicts
    assert device.tier.capacity == device.tier.most_needed == 0, "there is no expert that could take a row"
    device.check()
    device.tier.close()


def test_steps_read_what_they_need_before_the_background_has_got_there():
    device = Device(20, fills=False)
    device.reader.gate.clear()
    device.tier.fill(in_turn(ORDER))
    device.use(np.full((LAYERS, TOP_K), [8, 9]))
    assert device.tier.num_reads == LAYERS * TOP_K
    device.reader.gate.set()
    device.tier.wait()
    device.tier.look()
    device.check()
    device.tier.close()


def test_a_step_waits_for_the_background_where_that_has_taken_the_last_rows(monkeypatch):
    device = Device(None, keeps=False, fills=False)
    device.reader.gate.clear()
    device.tier.fill(in_turn(ORDER))
    wait = device.tier._wait_for_block
    monkeypatch.setattr(device.tier, "_wait_for_block", lambda: device.reader.gate.set() or wait())
    device.use(np.full((LAYERS, TOP_K), [8, 9]))
    assert device.tier.servable.all()
    device.check()
    device.tier.close()


def test_memory_that_cannot_be_page_locked_bounds_the_tier_and_the_log_says_so(monkeypatch, caplog):
    device = Device(None, keeps=False, fills=False)
    made, new_arena = [], device_tier.new_arena

    def one_block(*args: Any) -> Tensor:
        if made:
            raise NotPinnableError("the system has no more")
        made.append(new_arena(*args))
        return made[0]

    monkeypatch.setattr(device_tier, "BLOCK_BYTES", 1)
    device.tier._block = 1
    monkeypatch.setattr(device_tier, "new_arena", one_block)
    with caplog.at_level(logging.WARNING):
        device.tier.fill(in_turn(ORDER))
        device.tier.wait()
        device.tier.look()
    assert "takes 12 experts and no more: the system has no more" in caplog.text
    assert device.tier.servable.sum() == LAYERS * SLOTS + 1
    device.use(np.full((LAYERS, TOP_K), [8, 9]))
    device.check()
    device.tier.close()


def test_a_step_that_cannot_page_lock_rows_of_its_own_takes_those_of_other_experts(monkeypatch):
    device = Device(None, keeps=False, fills=False)

    def refused(*args: Any) -> Tensor:
        raise NotPinnableError("the system has no more")

    monkeypatch.setattr(device_tier, "locked_arena", refused)
    device.use(np.full((LAYERS, TOP_K), [8, 9]))
    assert device.tier.evicts
    assert device.pages.num_host_spans == LAYERS * SLOTS
    device.check()
    device.tier.close()


def test_other_experts_are_read_in_place_of_those_under_way_and_within_the_bound(monkeypatch):
    device = Device(20, fills=False)
    monkeypatch.setattr(device.tier, "_block", 3)
    device.reader.gate.clear()
    device.tier.fill(in_turn(ORDER))
    device.reader.waits.wait()
    wait = device.tier.wait
    monkeypatch.setattr(device.tier, "wait", lambda: device.reader.gate.set() or wait())
    held = device.pages.num_host_spans
    device.tier.adopt(ALL)
    assert device.pages.num_host_spans == held + 3, "the block under way, and no other"
    device.tier.fill(in_turn(ORDER))
    device.tier.wait()
    device.tier.look()
    assert device.pages.num_host_spans == 20
    device.check()
    device.tier.close()


def test_a_step_that_needs_more_than_there_are_rows_is_told_so():
    device = Device(6)
    device.tier.wait()
    device.tier.look()
    with pytest.raises(NoRoomError, match=r"needs 18 experts.*room for 6: raise host_memory"):
        device.tier.read(
            [(layer, expert) for layer in range(LAYERS) for expert in range(3, 10)], (), np.zeros_like(ALL)
        )
    device.tier.close()


def test_experts_that_cannot_be_read_hold_no_row():
    device = Device(12, damaged=[(0, 0), (1, 5), (2, 8)])
    device.tier.wait()
    device.tier.look()
    assert not device.tier.servable[[0, 1, 2], [0, 5, 8]].any()
    failures = device.tier.read([(2, 8), (2, 9)], (), np.zeros_like(ALL))
    assert set(failures) == {(2, 8)}
    device.check()
    reads = device.tier.ahead(ALL)
    assert reads.experts[0] == (0, 0)
    assert isinstance(reads.wait(0), ShardCorruptError)
    reads.finish()
    device.check()
    device.tier.close()


def test_what_was_not_counted_while_everything_fitted_is_taken_from_the_devices_counts():
    device = Device(None, keeps=False)
    device.tier.wait()
    device.tier.look()
    device.pages.use_count[:, 7] = 50
    device.pages.step += 60
    device.tier._budget = 12 * device.reader.span_bytes
    device.tier.adopt(ALL)
    assert device.tier.evicts
    device.tier._evict(20, np.zeros_like(ALL))
    assert device.tier.servable[:, 7].all()
    device.check()
    device.tier.close()
