"""The stream of experts: what a viewer adds up is what the server has, and no viewer stays or costs for ever."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from server.api.admin import live
from server.model.load_progress import LoadProgress, Phase
from server.serving.live import Cells, Place, deep_experts
from server.serving.service import ExpertsSnapshot, LoadedModel, ShardInfo
from tests.server.api.running import Running, running, wait_until
from tests.server.api.scripted import EXPERTS, LAYERS, ScriptedEngine, experts_snapshot, loaded

COLUMNS = {"place": "u1", "demand": "<u4", "uses": "<u4", "demand_mass": "<f4", "served_mass": "<f4"}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream; the name of each is its type."""
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["type"] == name
            yield event


def array(event: dict[str, Any], name: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(event[name]), kind)


class Viewer:
    """What the page keeps: the cells that it was told."""

    def __init__(self) -> None:
        self.cells: dict[str, np.ndarray] = {}
        self.num_told = 0

    def take(self, event: dict[str, Any]) -> None:
        live.ExpertsEvent.model_validate({"ids": None, "deep_experts": None, **event})
        told = {name: array(event, name, kind) for name, kind in COLUMNS.items()}
        self.num_told += len(told["place"])
        if event.get("ids") is None:
            self.cells = {name: column.copy() for name, column in told.items()}
            return
        ids = array(event, "ids", "<u4")
        for name, column in told.items():
            self.cells[name][ids] = column


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "TICK_SECONDS", 0.01)


class Changing:
    """Snapshots that a test changes, large enough that a difference is shorter than the whole."""

    def __init__(self) -> None:
        self.shot = experts_snapshot()

    def __call__(self) -> ExpertsSnapshot:
        return self.shot

    def use(self, layer: int, expert: int) -> None:
        demand, resident = self.shot.demand.copy(), self.shot.resident.copy()
        demand[layer, expert] += 1
        resident[layer, expert] ^= True
        self.shot = replace(self.shot, demand=demand, resident=resident)


def watched(changing: Changing) -> Any:
    return running(load=lambda progress: loaded(ScriptedEngine(), changing))


def until(stream: Iterator[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(event for event in stream if event["type"] == kind)


def test_viewer_who_adds_up_the_differences_has_the_cells_of_the_server() -> None:
    changing, viewer = Changing(), Viewer()
    with watched(changing) as server, server.client() as client, client.stream("GET", "/experts/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = events(response)
        first = until(stream, "experts")
        assert (first["num_layers"], first["num_experts"], first["top_k"]) == (LAYERS, EXPERTS, 2)
        assert array(first, "deep_experts", "<u2").tolist() == [0, 1]
        viewer.take(first)
        for cell in ((0, 1), (1, 3)):
            changing.use(*cell)
            event = until(stream, "experts")
            assert array(event, "ids", "<u4").tolist() == [cell[0] * EXPERTS + cell[1]]
            viewer.take(event)
        assert viewer.num_told == LAYERS * EXPERTS + 2
        for name, column in viewer.cells.items():
            assert column.tolist() == getattr(Cells.of(changing.shot), name).tolist()


def test_nothing_is_told_of_experts_where_nothing_changed_and_all_where_the_store_did() -> None:
    changing = Changing()
    with watched(changing) as server, server.client() as client, client.stream("GET", "/experts/live") as response:
        stream = events(response)
        until(stream, "experts")
        assert [next(stream)["type"] for _ in range(5)] == ["now"] * 5
        shards = (*changing.shot.shards, ShardInfo("experts/deep-00001.safetensors", 4096, (2, 3)))
        changing.shot = replace(changing.shot, shards=shards)
        event = until(stream, "experts")
        assert event.get("ids") is None
        assert array(event, "deep_experts", "<u2").reshape(-1, LAYERS).tolist() == [[0, 1], [2, 3]]


def test_figures_of_the_moment_are_those_of_the_other_routes() -> None:
    with watched(Changing()) as server, server.client() as client:
        wait_until(lambda: server.service.loaded is not None)
        with client.stream("GET", "/experts/live") as response:
            now = until(events(response), "now")
        live.NowEvent.model_validate(now)
        assert now["health"] == client.get("/health/ready").json()
        assert now["totals"] == client.get("/experts").json()["totals"]
        assert now["tiers"] == client.get("/info").json()["tiers"]
        assert now["growth"] == client.get("/experts/growth").json()
        assert now["engine"]["kv_capacity_tokens"] == 100
        assert now["expected_nats"] > 0


def test_stream_tells_how_loading_goes_and_goes_on_when_the_model_is_there() -> None:
    go = threading.Event()

    def load(progress: LoadProgress) -> LoadedModel:
        progress(Phase.TRUNK, 0.5)
        go.wait(10)
        return loaded(ScriptedEngine())

    with running(load=load) as server, server.client() as client, client.stream("GET", "/experts/live") as response:
        stream = events(response)
        now = next(event for event in stream if event["health"]["phase"])
        assert (now["health"]["state"], now["health"]["phase"]) == ("loading", "loading the trunk")
        assert "engine" not in now
        go.set()
        until(stream, "experts")
        assert until(stream, "now")["health"]["state"] == "ready"


def closed(server: Running) -> bool:
    context = server.listener.config.app.state.context  # type: ignore[union-attr]
    return context.watchers.num_open == 0


def test_viewer_that_leaves_costs_nothing_more_and_one_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_WATCHERS", 2)
    with watched(Changing()) as server, server.client() as client:
        with client.stream("GET", "/experts/live") as one, client.stream("GET", "/experts/live") as two:
            assert (one.status_code, two.status_code) == (200, 200)
            refused = client.get("/experts/live")
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        wait_until(lambda: closed(server))
        with client.stream("GET", "/experts/live") as response:
            assert response.status_code == 200


def test_head_of_the_stream_ends_and_the_connection_serves_on() -> None:
    with watched(Changing()) as server, server.client() as client:
        assert client.head("/experts/live").headers["content-type"].startswith("text/event-stream")
        assert client.get("/health/live").status_code == 200


def test_stream_ends_when_the_server_drains() -> None:
    with watched(Changing()) as server, server.client() as client, client.stream("GET", "/experts/live") as response:
        stream = events(response)
        until(stream, "experts")
        server.service.begin_drain()
        assert list(stream)[-1]["health"]["state"] == "draining"


def test_stream_wants_the_key() -> None:
    key = "correct-horse-battery"
    with running(api_key=key) as server, server.client() as client:
        assert client.get("/experts/live").status_code == 401
        with client.stream("GET", "/experts/live", headers={"x-api-key": key}) as response:
            assert response.status_code == 200


def test_cells_have_every_bit_of_an_experts_place_and_counts_that_do_not_wrap() -> None:
    shot = experts_snapshot()
    corrupt = np.zeros_like(shot.corrupt)
    corrupt[1, 3] = True
    shot = replace(shot, corrupt=corrupt, demand=shot.demand + 2**40)
    cells = Cells.of(shot)
    assert cells.place[0] == Place.AVAILABLE | Place.RESIDENT
    assert cells.place[1] == Place.AVAILABLE | Place.RESIDENT | Place.IN_HOST
    assert cells.place[7] == Place.CORRUPT
    assert set(cells.demand.tolist()) == {2**32 - 1}
    assert deep_experts(shot.shards).shape == (1, LAYERS)
