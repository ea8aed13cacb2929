"""One replica without Ray: it answers as a server does, and tells what its requests wanted."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.mask import ExpertMask
from server.api.replicas import PassedRequest
from server.cluster.likeness import likeness_of
from server.cluster.replica import Replica
from server.cluster.statistics import ReplicaStatistics
from server.settings.load import load_settings
from tests.server.adapters import with_adapters

COUNT = 'deepfew_masked_request_deficit_ratio_count{mask="pool"'
LONG = "One day a small boat sailed over the sea to find the old harbour again. " * 4


@pytest.fixture(scope="module")
def replica(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("replica")
    store = with_adapters(small_store, folder / "store", ExpertMask.same_in_every_layer([0, 2, 3], 2, 8))
    values = {"store": str(store), "device": "cpu", "slots": 4, "usage_directory": str(folder / "usage")}
    started = Replica(load_settings(values, environ={}).settings, "0")
    asyncio.run(started.load())
    yield started
    started.close()


def _passed(path: str, body: Mapping[str, Any] | None = None) -> PassedRequest:
    content = b"" if body is None else json.dumps(body).encode()
    headers = ((b"content-type", b"application/json"), (b"host", b"localhost"))
    return PassedRequest("GET" if body is None else "POST", path, b"", headers, content)


def _ask(replica: Replica, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """The answer, read as Ray does: each step of the generator in a context of its own."""

    async def run() -> tuple[int, bytes]:
        status, content = 500, b""
        answer = replica.serve(_passed(path, body), None if body is None else likeness_of(body))
        while True:
            step = asyncio.create_task(anext(answer, None), context=copy_context())  # type: ignore[arg-type]
            if (batch := await step) is None:
                return status, content
            for message in batch:
                status = message.get("status", status)
                content += message.get("body", b"")

    status, content = asyncio.run(run())
    return status, json.loads(content)


def test_a_named_adapter_without_a_mask_is_refused_as_on_one_server(replica: Replica) -> None:
    status, answer = _ask(replica, "/generate", {"inputs": "a", "parameters": {"adapter": "pools"}})
    assert (status, "this request has no mask" in answer["error"]) == (422, True)


def test_the_demand_of_a_request_is_counted_to_its_topic_and_its_masking_stays_its_own(replica: Replica) -> None:
    body = {"inputs": LONG, "parameters": {"max_new_tokens": 4, "pool": 3, "details": True}}
    status, answer = _ask(replica, "/generate", body)
    assert status == 200
    assert answer["details"]["deficit"]["overall"] > 0
    statistics = ReplicaStatistics.from_wire(replica.statistics())
    assert statistics is not None
    assert statistics.load == 0
    likeness = likeness_of(body)
    assert set(likeness.beginning) <= set(statistics.prefixes)
    (topic,) = [topic for topic in statistics.topics if topic.key in likeness.keys]
    assert topic.num_tokens > 50
    assert topic.demand.sum() == pytest.approx(1.0)
    _, text = asyncio.run(replica.answer(_passed("/metrics")))
    (count,) = [line for line in text.decode().splitlines() if line.startswith(COUNT)]
    assert float(count.split()[-1]) == 1.0


def test_what_is_held_is_what_is_in_slots(replica: Replica) -> None:
    statistics = ReplicaStatistics.from_wire(replica.statistics())
    _, experts = _ask(replica, "/experts")
    assert statistics is not None
    assert (statistics.held == np.array(experts["resident"]).ravel()).all()
