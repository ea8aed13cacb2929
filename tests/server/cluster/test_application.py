"""Two real replicas behind `deepfew cluster`: every dialect, clients that leave, a replica that is killed."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.cluster.processes import Cluster

pytestmark = pytest.mark.exhaustive
pytest.importorskip("ray")
LONG = {"prompt": "One day", "max_tokens": 900, "ignore_eos": True, "stream": True, "model": "tiny-moe"}


@pytest.fixture(scope="module")
def cluster(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    text = f'store = "{tiny_store}"\n[model]\ndevice = "cpu"\nslots = 24\n[cluster]\nstatistics_seconds = 0.5\n'
    started = Cluster(text, tmp_path_factory.mktemp("cluster"), 2)
    yield started
    started.stop()
    assert list(started.usage.glob("all-*/usage.json")), "the usage is saved at the end"


def _events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data:").strip() for line in response.iter_lines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "One day", "parameters": {"max_new_tokens": 6}, "stream": True}),
        ("/v1/completions", {"prompt": "One day", "max_tokens": 6, "stream": True, "model": "tiny-moe"}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "stream": True, "model": "tiny-moe"},
        ),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "stream": True, "model": "tiny-moe"},
        ),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 6, "stream": True, "model": "tiny-moe"}),
    ],
)
def test_every_dialect_streams_and_answers_whole(cluster: Cluster, path: str, body: dict[str, Any]) -> None:
    with cluster.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert len(_events(response)) > 2
    assert cluster.client.post(path, json={**body, "stream": False}).status_code == 200
    refused = cluster.client.post(path, json={**body, "no_such_field": 1})
    assert refused.status_code in (400, 422)
    assert "no_such_field" in refused.text


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    with cluster.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()  # the connection is closed with it
        next(lines)
        cluster.wait(lambda: cluster.running() == 1)
    cluster.wait(lambda: cluster.running() == 0)


def test_a_killed_replica_ends_its_streams_with_an_error_and_the_others_go_on(cluster: Cluster) -> None:
    endings: list[Any] = []

    def stream(number: int) -> None:
        body = {**LONG, "prompt": f"Story {number}", "max_tokens": 300}
        with httpx.Client(base_url=cluster.client.base_url, timeout=120) as client:
            with client.stream("POST", "/v1/completions", json=body) as response:
                endings.append(_events(response)[-1])

    clients = [threading.Thread(target=stream, args=(number,)) for number in range(6)]
    for client in clients:
        client.start()
    cluster.wait(lambda: cluster.running() == 6)
    os.kill(cluster.replicas()[0], signal.SIGKILL)
    assert cluster.client.post("/v1/completions", json={**LONG, "stream": False, "max_tokens": 4}).status_code == 200
    for client in clients:
        client.join()
    broken = [ending for ending in endings if "error" in ending]
    assert {ending["error"]["code"] for ending in broken} == {"generation_failed"}
    assert 0 < len(broken) < len(endings) == 6
    cluster.wait(lambda: len(cluster.replicas()) == 2)
