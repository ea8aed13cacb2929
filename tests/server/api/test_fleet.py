"""A cluster speaks for all of its replicas together, and decides changes for all of its stores."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.types import Message

from server.api.app import create_app
from server.api.front import Front, answer_of
from server.api.replicas import PassedRequest
from server.growth.fleet import FleetStore
from server.growth.status import GrowthBusyError, StoreDemand
from server.serving.metrics import Metrics
from server.serving.service import Service
from server.settings.schema import HttpSettings
from tests.server.api.running import wait_until
from tests.server.api.scripted import EXPERTS, LAYERS, ScriptedEngine, ScriptedGrowth, experts_snapshot, loaded

ADMIN = "staple-of-the-admin"
HTTP = HttpSettings(admin_key=ADMIN)


class _Growth(ScriptedGrowth):
    """Deep experts of one id in every layer; the store wants `wanted` most."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted = wanted

    def demand(self) -> StoreDemand:
        mass = np.ones((LAYERS, EXPERTS))
        mass[:, self.wanted] = 5.0
        return replace(super().demand(), demand_mass=mass, available=np.eye(1, EXPERTS, dtype=np.bool_).repeat(2, 0))


class _Replicas:
    """Two servers of scripted models: `a` and `b`, each with a store of its own."""

    def __init__(self) -> None:
        self.growths = {"a-0": _Growth(2), "b-0": _Growth(3)}
        self.services: dict[str, Service] = {}
        self.applications: dict[str, Any] = {}
        for at, (name, growth) in enumerate(self.growths.items()):
            snapshot = replace(experts_snapshot(), resident=np.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS) == at)
            model = loaded(
                ScriptedEngine(), lambda found=snapshot: found, growth=growth, decode_path=("host", "device")[at]
            )
            self.services[name] = Service(lambda progress, model=model: model)
            metrics = Metrics(self.services[name], "1")
            self.applications[name] = create_app(self.services[name], metrics, HTTP, version="1", log_prompts=False)
            self.services[name].start()

    def open(self, request: PassedRequest) -> AsyncGenerator[Message, None]:
        async def messages() -> AsyncGenerator[Message, None]:
            async for batch in answer_of(self.applications["a-0"], request):
                for message in batch:
                    yield message

        return messages()

    async def ask(self, replica: str, request: PassedRequest) -> tuple[int, bytes]:
        found = [message async for batch in answer_of(self.applications[replica], request) for message in batch]
        return found[0]["status"], b"".join(message.get("body", b"") for message in found)

    async def ask_all(self, request: PassedRequest) -> Mapping[str, tuple[int, bytes]]:
        return {name: await self.ask(name, request) for name in self.applications}

    async def stores(self) -> Mapping[str, FleetStore]:
        return {name[0]: FleetStore((name,), growth.demand()) for name, growth in self.growths.items()}


@pytest.fixture
def replicas() -> Iterator[_Replicas]:
    made = _Replicas()
    wait_until(lambda: all(service.loaded is not None for service in made.services.values()))
    yield made
    for service in made.services.values():
        service.close(0.0)


def _ask(replicas: _Replicas, path: str, body: Any = None, key: str = ADMIN) -> tuple[int, Any]:
    content = b"" if body is None else json.dumps(body).encode()
    path, _, query = path.partition("?")
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    if content:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": headers}
    scope["query_string"] = query.encode()
    unread = [{"type": "http.request", "body": content, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.Event().wait() or {}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Front(replicas, HTTP)(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_experts_are_where_any_replica_has_them_and_counts_are_sums(replicas: _Replicas) -> None:
    _, found = _ask(replicas, "/experts")
    one = experts_snapshot()
    assert found["uses"] == (2 * one.uses).tolist()
    assert found["totals"]["resident"] == 2
    assert found["totals"]["fetch_bytes"] == 2 * int(one.fetch_bytes.sum())
    assert found["deficit"] == pytest.approx(one.deficit.tolist())
    assert found["totals"]["deficit"] == pytest.approx(one.overall_deficit)
    assert [each["resident"] for each in found["replicas"].values()] == [1, 1]
    assert len(found["shards"]) == 1, "both have the same"


def test_information_says_in_what_replicas_differ(replicas: _Replicas) -> None:
    _, found = _ask(replicas, "/info")
    assert found["model_id"] == "scripted"
    assert {name: one["decode_path"] for name, one in found["replicas"].items()} == {"a-0": "host", "b-0": "device"}
    assert "num_layers" not in found["replicas"]["a-0"]
    assert [profile["name"] for profile in _ask(replicas, "/experts/profiles")[1]["profiles"]] == ["code"]


def test_a_plan_is_for_all_stores_and_keeps_them_apart(replicas: _Replicas) -> None:
    _, found = _ask(replicas, "/experts/plan?count=4")
    assert [(one["store"], one["experts"][0]) for one in found["candidates"][:2]] == [("a", 2), ("b", 3)]
    assert found["num_candidates"] == 6
    assert [one["replicas"] for one in found["growth"]["stores"]] == [["a-0"], ["b-0"]]
    assert found["growth"]["held_bytes"] == 2 * 12288
    assert {one["store"] for one in _ask(replicas, "/experts/plan?count=9&store=b")[1]["candidates"]} == {"b"}
    assert _ask(replicas, "/experts/growth")[1] == found["growth"]


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/experts/plan?count=0", None, "`count` must be"),
        ("/experts/plan?store=c", None, "no store 'c'"),
        ("/experts/grow", {"count": 0}, "count"),
        ("/experts/grow", {"count": 1, "more": 1}, "more"),
        ("/experts/grow", {"experts": [[1, 1]]}, "?store=NAME"),
        ("/experts/grow?store=a", {"experts": [[1, 1]], "count": 2}, "not both"),
        ("/experts/shrink", {"indices": [1]}, "?store=NAME"),
        ("/experts/shrink?store=a", {}, "count"),
    ],
)
def test_what_one_server_refuses_a_cluster_refuses(replicas: _Replicas, path: str, body: Any, says: str) -> None:
    status, found = _ask(replicas, path, body)
    assert (status, says in found.get("error", "")) == (422, True), found
    assert not any(growth.asked for growth in replicas.growths.values())


def test_growth_gives_each_store_its_own_and_tells_what_it_began(replicas: _Replicas) -> None:
    status, found = _ask(replicas, "/experts/grow", {"count": 2})
    assert (status, set(found["changed"]), found["refused"]) == (202, {"a", "b"}, {})
    assert [growth.asked for growth in replicas.growths.values()] == [[("grow", [(2, 2)])], [("grow", [(3, 3)])]]
    status, found = _ask(replicas, "/experts/grow?store=b", {"experts": [[1, 1]]})
    assert (status, set(found["changed"])) == (202, {"b"})
    assert replicas.growths["b-0"].asked[-1] == ("grow", [(1, 1)])


def test_a_store_that_refuses_is_named_beside_those_that_grow(replicas: _Replicas) -> None:
    replicas.growths["b-0"].failure = GrowthBusyError("the store is already growing: wait until that is done")
    status, found = _ask(replicas, "/experts/grow", {"count": 2})
    assert (status, set(found["changed"]), set(found["refused"])) == (202, {"a"}, {"b"})
    assert found["refused"]["b"]["error_type"] == "busy"
    replicas.growths["a-0"].failure = replicas.growths["b-0"].failure
    assert _ask(replicas, "/experts/grow", {"count": 2})[0] == 409


def test_the_least_wanted_of_all_stores_is_given_up(replicas: _Replicas) -> None:
    status, found = _ask(replicas, "/experts/shrink", {"count": 1})
    assert (status, len(found["changed"])) == (200, 1)
    (store,) = found["changed"]
    assert replicas.growths[f"{store}-0"].asked == [("shrink", [1], None)]


def test_the_ordinary_key_changes_no_store(replicas: _Replicas) -> None:
    for path, body in (("/experts/grow", {"count": 2}), ("/experts/shrink", {"count": 1})):
        assert _ask(replicas, path, body, key="another-key-of-someone")[0] in (401, 403)
    assert not any(growth.asked for growth in replicas.growths.values())
