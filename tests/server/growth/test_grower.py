import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.engine.engine import Engine
from server.engine.request import EngineStoppedError, Event, FinishedEvent, GenerationRequest, SamplingParams
from server.growth.grower import Grower
from server.growth.ranking import expected_norms, rank_missing
from server.growth.status import GrowthError
from server.growth.store import adopt, grow_store
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RunnerOptions
from tests.extractor.selection_statistics import make_statistics


def test_candidates_are_the_most_wanted_missing_experts_of_every_layer() -> None:
    available = np.array([[True, False, False, False], [False, True, False, False]])
    demand = np.array([[9.0, 1.0, 3.0, 2.0], [5.0, 9.0, 0.0, 1.0]])
    candidates = rank_missing(available, demand, 100)
    assert [candidate.experts for candidate in candidates] == [(2, 0), (3, 3), (1, 2)]
    assert candidates[0].score == pytest.approx((3 + 5) / 100)
    assert candidates[0].missing_share == pytest.approx(8 / 30)
    assert "26.67% of the router mass" in candidates[0].reason
    assert rank_missing(np.ones((2, 4), dtype=np.bool_), demand, 100) == []


def test_statistics_say_whose_output_is_large() -> None:
    statistics = make_statistics()
    statistics.totals["picks"][:] = 10.0
    statistics.totals["output_norm"][:] = 10.0
    statistics.totals["output_norm"][:, 0, 3] = 90.0
    statistics.totals["picks"][:, 1, 2] = 0.0
    available = np.zeros((3, 8), dtype=np.bool_)
    norms = expected_norms(statistics, available)
    assert norms[0, 3] == pytest.approx(9.0)
    assert norms[1, 2] == pytest.approx(1.0)  # never picked: its layer's median
    assert rank_missing(available, np.ones((3, 8)), 1, statistics)[0].experts[0] == 3
    statistics.totals["output_norm"][:] = 0.0
    assert (expected_norms(statistics, available) == 1.0).all(), "picks alone say nothing of outputs"


@pytest.fixture
def small_store(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A store with 12 of the bundled checkpoint's 64 deep experts."""
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(experts="0-11")).run()
    return tmp_path / "store"


def generate(engine: Engine, name: str, prompt: list[int], num_tokens: int = 12) -> queue.SimpleQueue[Event]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    engine.submit(GenerationRequest(name, tuple(prompt), sampling), events.put)
    return events


def finished(events: queue.SimpleQueue[Event]) -> FinishedEvent:
    while True:
        event = events.get(timeout=60)
        if isinstance(event, FinishedEvent):
            return event
        assert not hasattr(event, "error"), event


def start(store: Store) -> Engine:
    model = load_model(store, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=16))
    engine = Engine(lambda progress: HostRunner(model, max_rows=4, max_tokens=128))
    engine.start()
    while engine.status().state == "loading":
        threading.Event().wait(0.01)
    return engine


def test_a_running_server_grows_and_its_deficit_falls(small_store: Path, tiny_checkpoint: Path) -> None:
    store = Store.open(small_store)
    engine = start(store)
    try:
        prompt = engine.runner.model.tokenizer("Once upon a time there was")["input_ids"]
        before = finished(generate(engine, "before", prompt))
        routing = engine.runner.model.routing
        grower = Grower(
            store,
            str(tiny_checkpoint),
            lambda: engine.ledger.demand_mass.copy(),
            lambda action: engine.between_steps(action).result(60),
            lambda: adopt(engine.runner, None),
        )
        running = generate(engine, "during", prompt, num_tokens=60)
        chosen = grower.grow(20)
        with pytest.raises(GrowthError, match="already growing"):
            grower.grow(1)
        grower.wait(60)
        assert grower.error is None
        assert finished(running).num_generated_tokens == 60
        assert store.available.sum(axis=1).tolist() == [32] * 8
        assert all(store.available[layer, expert] for layer, expert in enumerate(chosen[0].experts))
        assert np.array_equal(routing.mask.allowed, store.available)
        after = finished(generate(engine, "after", prompt))
        assert after.deficit.overall < before.deficit.overall / 2
        assert engine.status().state == "ready"
    finally:
        engine.stop(0.0)


def test_a_grown_server_answers_as_one_that_started_so(small_store: Path, tiny_checkpoint: Path) -> None:
    store = Store.open(small_store)
    engine = start(store)
    try:
        prompt = engine.runner.model.tokenizer("The capital of France is")["input_ids"]
        grow_store(small_store, str(tiny_checkpoint), [(expert,) * 8 for expert in range(40, 60)])
        engine.between_steps(lambda: adopt(engine.runner, None) and None).result(60)
        grown = finished(generate(engine, "grown", prompt)).generated_text
    finally:
        engine.stop(0.0)
    fresh = start(Store.open(small_store))
    try:
        assert finished(generate(fresh, "fresh", prompt)).generated_text == grown
    finally:
        fresh.stop(0.0)


def test_a_growth_that_fails_leaves_the_server_as_it_was(small_store: Path, tmp_path: Path) -> None:
    store = Store.open(small_store)
    demand = np.ones(store.available.shape)
    (tmp_path / "empty").mkdir()
    grower = Grower(store, str(tmp_path / "empty"), lambda: demand, lambda action: action(), lambda: store.reload())
    grower.grow(1)
    grower.wait(60)
    assert grower.error == "CheckpointError"
    assert (grower.status().state, grower.status().num_failures) == ("idle", 1)
    assert store.available.sum(axis=1).tolist() == [12] * 8


def test_a_full_disk_costs_the_growth_and_not_the_server(
    small_store: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extractor.writing.extract.free_bytes", lambda path: 0)
    store = Store.open(small_store)
    demand = np.ones(store.available.shape)
    grower = Grower(store, str(tiny_checkpoint), lambda: demand, lambda action: action(), store.reload)
    grower.grow(1)
    grower.wait(60)
    assert grower.status().error == "DiskFullError"
    monkeypatch.undo()
    grower.grow(1)
    grower.wait(60)
    assert (grower.status().error, grower.status().num_deep_experts) == (None, 13)


def test_what_is_wanted_least_is_given_up_first(small_store: Path, tiny_checkpoint: Path) -> None:
    store = Store.open(small_store)
    demand = np.zeros(store.available.shape)
    demand[:, :12] = np.arange(12)[::-1]
    grower = Grower(store, str(tiny_checkpoint), lambda: demand, lambda action: action(), store.reload)
    done = grower.shrink(count=3)
    assert [deep.index for deep in done.removed] == [9, 10, 11]
    assert done.freed_bytes == sum(deep.bytes for deep in done.removed)
    assert [one.experts for one in grower.candidates()[:1]] == [(9,) * 8]


def test_nothing_is_given_up_that_a_mask_of_the_server_cannot_do_without(
    small_store: Path, tiny_checkpoint: Path
) -> None:
    store = Store.open(small_store)
    demand = np.ones(store.available.shape)
    code = ExpertMask.same_in_every_layer([0, 40], 8, 64)
    served = ExpertMask.same_in_every_layer(range(9), 8, 64)
    grower = Grower(
        *(store, str(tiny_checkpoint), lambda: demand, lambda action: action(), store.reload),
        served=served,
        profiles={"code": code},
    )
    with pytest.raises(GrowthError, match="profile code would be left with no expert of layer 0"):
        grower.shrink([0])
    with pytest.raises(GrowthError, match="mask would be left with 7 experts"):
        grower.shrink([1, 2])
    assert len(store.manifest.deep_experts) == 12
    grower.shrink([1, 10, 11])
    assert len(store.manifest.deep_experts) == 9


def test_the_byte_budget_bounds_growth(small_store: Path, tiny_checkpoint: Path) -> None:
    store = Store.open(small_store)
    held = sum(deep.bytes for deep in store.manifest.deep_experts)
    one = sum(spec.span_bytes for spec in store.manifest.layers)
    demand = np.ones(store.available.shape)
    arguments = (store, str(tiny_checkpoint), lambda: demand, lambda action: action(), store.reload)
    assert len(Grower(*arguments).candidates()) == 52
    assert len(Grower(*arguments, budget_bytes=held + 3 * one + 1).candidates()) == 3
    full = Grower(*arguments, budget_bytes=held)
    with pytest.raises(GrowthError, match="budget holds no more"):
        full.grow(1)
    with pytest.raises(GrowthError, match="wanted at least 1"):
        full.grow(0)


def test_named_deep_experts_are_added_and_only_where_they_are_missing(small_store: Path, tiny_checkpoint: Path) -> None:
    store = Store.open(small_store)
    one = sum(spec.span_bytes for spec in store.manifest.layers)
    held = sum(deep.bytes for deep in store.manifest.deep_experts)
    demand = np.ones(store.available.shape)
    arguments = (store, str(tiny_checkpoint), lambda: demand, lambda action: action(), store.reload)
    grower = Grower(*arguments, budget_bytes=held + 5 * one // 2)
    for named, says in [
        ([(20,) * 8, (20,) * 8], "expert 20 of layer 0 is in the store, or was named twice"),
        ([(20,) * 7 + (3,)], "expert 3 of layer 7 is in the store"),
        ([(20,) * 7], "wanted one expert from 0 to 63 for each of 8 layers"),
        ([(64,) * 8], "wanted one expert from 0 to 63"),
        ([(at,) * 8 for at in (20, 30, 40)], "there is room for 2"),
    ]:
        with pytest.raises(GrowthError, match=says):
            grower.grow(1, named)
    assert [chosen.experts for chosen in grower.grow(1, [(20,) * 8])] == [(20,) * 8]
    grower.wait()
    assert grower.error is None
    found = grower.demand()
    assert (found.available == store.available).all()
    assert found.available[:, 20].all()
    assert found.deep_experts[12] == (20,) * 8
    assert (found.room, found.num_bytes) == (1, one)


def test_an_action_that_fails_does_not_stop_the_engine(small_store: Path) -> None:
    engine = start(Store.open(small_store))

    def fail() -> None:
        raise RuntimeError("no")

    try:
        with pytest.raises(RuntimeError, match="no"):
            engine.between_steps(fail).result(60)
        assert engine.status().state == "ready"
    finally:
        engine.stop(0.0)
    with pytest.raises(EngineStoppedError):
        engine.between_steps(fail)
