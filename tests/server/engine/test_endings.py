"""Every request gets its final event, and what the engine holds is given back, whatever breaks beside it."""

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from router.ledger import UsageLedger
from server.engine.engine import Engine
from server.engine.request import Event, FailedEvent, FinishedEvent, GenerationRequest, SamplingParams, TokenEvent
from server.engine.sequence import Sequence
from server.engine.snapshots import UsageFile
from server.model.host.runner import HostRunner
from tests.server.engine.clients import WAIT_SECONDS, Client, held_until_stopped


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [TokenEvent, FinishedEvent, FailedEvent])
def test_a_client_that_raises_costs_its_own_request_alone(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    engine = make_engine()
    told: list[Event] = []

    def raises(event: Event) -> None:
        told.append(event)
        if isinstance(event, kind):
            raise RuntimeError("the client is gone")

    if kind is FailedEvent:
        monkeypatch.setattr(engine.runner, "decode", held_until_stopped(engine, engine.runner.decode))
    other = Client(engine, "Once upon a time", max_new_tokens=20, ignore_eos=True)
    ids = tuple(engine.runner.model.tokenizer("Der Hund").input_ids)
    engine.submit(GenerationRequest("raises", ids, SamplingParams(max_new_tokens=20, ignore_eos=True)), raises)
    if kind is FailedEvent:
        assert other.first.wait(WAIT_SECONDS)
        engine.stop(0)
        assert isinstance(other.error(), Exception)
    else:
        assert other.result().num_generated_tokens == 20
        assert Client(engine, "The capital of France is", max_new_tokens=3).result().generated_text == " Paris."
        assert engine.status().num_running == 0
    assert len([event for event in told if isinstance(event, kind)]) == 1, "it was called again after it had raised"
    assert engine.status().state in ("ready", "stopped")


def test_a_lost_device_ends_every_request_although_rows_cannot_be_freed(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make_engine(max_rows=2, usage_path=tmp_path / "usage.json")
    clients = [Client(engine, "Once", hold=at == 0, max_new_tokens=200, ignore_eos=True) for at in range(4)]
    assert clients[0].first.wait(WAIT_SECONDS)

    def lost(*args: object, **kwargs: object) -> None:
        raise RuntimeError("device lost")

    for name in ("decode", "prefill", "free", "close"):
        monkeypatch.setattr(engine.runner, name, lost)
    clients[0].go_on.set()
    for client in clients:
        assert "device lost" in str(client.error())
    wait_until(lambda: not engine.is_alive)
    assert engine.status().state == "failed"
    assert UsageLedger.load(tmp_path / "usage.json").num_tokens > 0


def test_what_was_to_run_between_steps_may_be_cancelled(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    running = Client(engine, "Once upon a time", max_new_tokens=20, ignore_eos=True)
    started, go_on, ran = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        go_on.wait(WAIT_SECONDS)

    holding = engine.between_steps(hold)
    assert started.wait(WAIT_SECONDS)
    cancelled = engine.between_steps(ran.set)
    assert cancelled.cancel()
    go_on.set()
    holding.result(WAIT_SECONDS)
    assert running.result().num_generated_tokens == 20
    assert not ran.is_set()
    assert engine.status().state == "ready"


def test_an_engine_that_fails_after_its_model_was_loaded_gives_the_model_back(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = threading.Event()

    class Loaded(HostRunner):
        def __init__(self, model: object) -> None:
            self.model = model  # type: ignore[assignment]

        def close(self) -> None:
            closed.set()

    class Model:
        store = None

    engine = Engine(lambda progress: Loaded(Model()))
    engine.start()
    wait_until(lambda: engine.status().state == "failed")
    assert "manifest" in engine.status().reason
    assert closed.wait(WAIT_SECONDS)


def test_no_request_waits_for_usage_to_be_written(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make_engine(usage_path=tmp_path / "usage.json", usage_interval_seconds=0.0)
    writing, disk_is_back = threading.Event(), threading.Event()
    write = UsageFile.write

    def hangs(file: UsageFile, path: Path, value: UsageLedger) -> None:
        writing.set()
        disk_is_back.wait(WAIT_SECONDS)
        write(file, path, value)

    monkeypatch.setattr(UsageFile, "write", hangs)
    client = Client(engine, "Once upon a time", max_new_tokens=20, ignore_eos=True)
    assert writing.wait(WAIT_SECONDS)
    try:
        assert client.result().num_generated_tokens == 20
    finally:
        disk_is_back.set()
    engine.stop(5)
    routed = client.result().num_prompt_tokens + 19
    assert UsageLedger.load(tmp_path / "usage.json").num_tokens == routed


def test_nothing_of_a_request_is_held_after_it_ended(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make_engine(statistics_path=tmp_path / "statistics.safetensors")
    held: list[weakref.ref[Sequence]] = []
    admit = Sequence.admit

    def noting(sequence: Sequence, *args: object) -> None:
        held.append(weakref.ref(sequence))
        admit(sequence, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "admit", noting)
        Client(engine, "Once upon a time", max_new_tokens=10, ignore_eos=True).result()
    engine.between_steps(lambda: None).result(WAIT_SECONDS)
    gc.collect()
    assert [reference() for reference in held] == [None]
