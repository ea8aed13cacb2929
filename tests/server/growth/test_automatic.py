"""A store that grows by itself: towards what is wanted lately, for what is worth it, within its budget, patiently."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expert_store.manifest import read_manifest, write_manifest
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.source import attach_source
from extractor.planning.selection import SelectionRequest
from extractor.writing.extract import JOURNAL_NAME
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.growth.automatic import AutoGrower
from server.growth.demand import RecentDemand
from server.growth.grower import Grower
from server.growth.status import GrowthSourceError, NothingToGrowError
from server.growth.store import grow_store, unfinished_growth

L, E = 8, 64


@pytest.fixture
def store(tiny_checkpoint: Path, tmp_path: Path) -> Store:
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(experts="0-11")).run()
    return Store.open(tmp_path / "store")


class Usage:
    """Demand as a server would have counted it, and what of it counts now."""

    def __init__(self) -> None:
        self.mass = np.zeros((L, E))
        self.recent = RecentDemand(lambda: self.mass.copy(), interval_seconds=0.01)

    def want(self, expert: int, mass: float) -> None:
        self.mass[:, expert] += mass


def grower(store: Store, checkpoint: Path, usage: Usage, budget_bytes: int | None = None) -> Grower:
    return Grower(
        store, str(checkpoint), usage.recent.snapshot, lambda action: action(), store.reload, budget_bytes=budget_bytes
    )


def auto(made: Grower, min_share: float = 0.05, step: int = 1) -> AutoGrower:
    return AutoGrower(made, interval_seconds=0.01, min_share=min_share, step=step)


def test_what_was_wanted_lately_comes_first(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    made = grower(store, tiny_checkpoint, usage)
    looking = auto(made)
    usage.want(20, 100.0)
    assert looking.look() == 1
    made.wait(60)
    assert store.available[:, 20].all()
    usage.want(40, 50.0)
    for _ in range(3):
        usage.recent.end_interval()
        usage.want(0, 1.0)
    usage.want(30, 30.0)  # of all that was ever wanted a smaller part, of what was wanted lately the larger
    assert looking.look() == 1
    made.wait(60)
    assert store.available[:, 30].all()
    assert made.status().num_deep_experts == 14


def test_growing_when_asked_and_by_itself_go_by_one_ranking(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    made = grower(store, tiny_checkpoint, usage)
    usage.want(40, 50.0)
    for _ in range(3):
        usage.recent.end_interval()
        usage.want(0, 1.0)
    usage.want(30, 30.0)
    assert [one.experts[0] for one in made.candidates()[:2]] == [30, 40]
    asked = made.grow(1)
    made.wait(60)
    assert [one.experts for one in asked] == [(30,) * L]
    assert auto(made).look() == 1
    made.wait(60)
    assert store.available[:, 40].all()


def test_demand_counts_half_with_every_interval_in_which_something_was_wanted() -> None:
    usage = Usage()
    usage.want(1, 8.0)
    recent = RecentDemand(lambda: usage.mass.copy(), interval_seconds=1.0)
    assert recent.snapshot()[0, 1] == 4.0, "what earlier runs wanted counts as the interval before the start"
    usage.want(2, 4.0)
    assert recent.snapshot()[0, 1:3].tolist() == [4.0, 4.0]
    recent.end_interval()
    assert recent.snapshot()[0, 1:3].tolist() == [2.0, 2.0]
    for _ in range(2000):
        recent.end_interval()
    assert recent.snapshot()[0, 1:3].tolist() == [2.0, 2.0], "an idle server forgets nothing"
    usage.want(3, 1.0)
    recent.end_interval()
    assert recent.snapshot()[0, 1:4].tolist() == [1.0, 1.0, 0.5]


def test_intervals_pass_by_themselves_until_told() -> None:
    usage = Usage()
    recent, stopping = RecentDemand(lambda: usage.mass.copy(), interval_seconds=0.005), threading.Event()
    recent.start(stopping)
    usage.want(1, 8.0)
    for _ in range(2000):
        if recent.snapshot()[0, 1] == 4.0:
            break
        threading.Event().wait(0.005)
    assert recent.snapshot()[0, 1] == 4.0
    stopping.set()
    threading.Event().wait(0.05)
    usage.want(1, 1.0)
    threading.Event().wait(0.05)
    assert recent.snapshot()[0, 1] == 5.0


def test_what_is_hardly_missed_is_not_added(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    made = grower(store, tiny_checkpoint, usage)
    looking = auto(made, min_share=0.05)
    assert looking.look() == 0, "nothing was wanted yet"
    usage.want(0, 99.0)
    usage.want(20, 1.0)
    assert looking.look() == 0
    usage.want(20, 50.0)
    assert looking.look() == 1
    made.wait(60)


def test_growth_stops_at_its_budget(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    manifest = store.manifest
    one = manifest.deep_experts[0].bytes
    made = grower(store, tiny_checkpoint, usage, budget_bytes=14 * one)
    looking = auto(made, step=8)
    for expert in range(20, 24):
        usage.want(expert, 10.0)
    assert looking.look() == 2
    made.wait(60)
    assert made.status().held_bytes <= 14 * one
    usage.want(22, 10.0)
    assert looking.look() == 0


def test_a_full_budget_is_no_end_where_something_is_wanted_much_more(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    held = sum(deep.bytes for deep in store.manifest.deep_experts)
    made = grower(store, tiny_checkpoint, usage, budget_bytes=held)
    replacing = AutoGrower(made, interval_seconds=1.0, min_share=0.05, step=1, replace=True)
    usage.want(20, 100.0)
    for expert in range(12):
        usage.want(expert, 60.0 + expert)
    assert replacing.look() == 0, "wanted more than what is held, and not twice as much"
    usage.want(20, 400.0)
    for expert in range(12):
        usage.want(expert, 60.0 + expert)
    assert replacing.look() == 1
    made.wait(60)
    assert store.available[:, 20].all()
    assert not store.available[:, 0].any(), "the least wanted one went"
    assert (made.status().num_deep_experts, made.status().held_bytes) == (12, held)
    assert auto(made).look() == 0, "not replaced unless asked for"


def test_what_a_profile_needs_stays_and_the_next_one_goes(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    held = sum(deep.bytes for deep in store.manifest.deep_experts)
    made = Grower(
        *(store, str(tiny_checkpoint), usage.recent.snapshot, lambda action: action(), store.reload),
        budget_bytes=held,
        profiles={"code": ExpertMask.same_in_every_layer([0], L, E)},
    )
    replacing = AutoGrower(made, interval_seconds=1.0, min_share=0.05, step=1, replace=True)
    usage.want(20, 100.0)
    for expert in range(12):
        usage.want(expert, float(expert))
    assert replacing.look() == 1
    made.wait(60)
    assert store.available[:, [0, 20]].all()
    assert not store.available[:, 1].any()


def test_it_goes_on_by_itself_and_ends_when_told(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    made = grower(store, tiny_checkpoint, usage)
    auto(made).start()
    usage.want(20, 10.0)
    until = threading.Event()
    for _ in range(600):
        if made.status().num_growths:
            break
        until.wait(0.05)
    assert store.available[:, 20].all()
    made.stop()
    made.wait(60)
    usage.want(40, 1000.0)
    until.wait(0.2)
    assert not store.available[:, 40].any()


def test_after_failures_it_looks_less_often(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, waits = Usage(), list[float]()
    (tmp_path / "empty").mkdir()
    made = grower(store, tmp_path / "empty", usage)

    def wait(seconds: float) -> bool:
        usage.want(20, 10.0)
        waits.append(seconds)
        return len(waits) > 5

    monkeypatch.setattr(made.stopping, "wait", wait)
    auto(made)._run()
    assert waits == pytest.approx([0.01 * 2**at for at in range(6)])
    assert made.status().num_failures == 5
    assert store.available.sum(axis=1).tolist() == [12] * L


def test_growth_that_was_broken_off_is_finished_by_the_next_one(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    usage.want(20, 10.0)

    def stop_soon(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_store(store.path, str(tiny_checkpoint), [(40,) * L, (41,) * L], stop_soon)
    assert (store.path / JOURNAL_NAME).exists()
    assert unfinished_growth(store.path) == [(40,) * L, (41,) * L]
    made = grower(store, tiny_checkpoint, usage)
    assert [one.experts for one in made.grow(1)] == [(40,) * L, (41,) * L]
    made.wait(60)
    assert made.error is None
    assert unfinished_growth(store.path) == []
    assert [one.experts for one in made.grow(1)] == [(20,) * L]
    made.wait(60)
    assert len(read_manifest(store.path).deep_experts) == 15


def test_checkpoint_that_is_not_where_it_was_is_said_before_anything_begins(store: Store, tmp_path: Path) -> None:
    usage = Usage()
    made = grower(store, tmp_path / "gone", usage)
    with pytest.raises(GrowthSourceError, match=r"growth\.grow_from"):
        made.grow(1)
    assert made.status().state == "idle"


def test_moved_checkpoint_is_grown_and_fetched_from_where_it_lies_now(store: Store, tiny_checkpoint: Path) -> None:
    manifest = read_manifest(store.path)
    write_manifest(store.path, replace(manifest, source=replace(manifest.source, location="/gone")))
    moved = Store.open(store.path)
    assert "no directory" in attach_source(moved)
    assert attach_source(moved, str(tiny_checkpoint)) == ""
    usage = Usage()
    usage.want(20, 10.0)
    made = grower(moved, tiny_checkpoint, usage)
    made.grow(1)
    made.wait(60)
    assert moved.available[:, 20].all()
    assert read_manifest(store.path).source.location == "/gone"


def test_stop_breaks_a_growth_off(store: Store, tiny_checkpoint: Path) -> None:
    usage = Usage()
    usage.want(20, 10.0)
    made = grower(store, tiny_checkpoint, usage)
    made.stop()
    made.grow(4)
    made.wait(60)
    assert (made.status().num_growths, made.status().num_failures) == (0, 0)
    assert len(unfinished_growth(store.path)) == 4


def test_store_with_every_expert_does_not_grow(tiny_store: Path, tiny_checkpoint: Path) -> None:
    usage = Usage()
    made = grower(Store.open(tiny_store), tiny_checkpoint, usage)
    assert auto(made).look() == 0
    with pytest.raises(NothingToGrowError):
        made.grow(1)
