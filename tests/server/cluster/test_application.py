"""Two real replicas behind `deepfew cluster`: every dialect, clients that leave, a replica that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.exhaustive
pytest.importorskip("ray")
LONG = {"prompt": "One day", "max_tokens": 900, "ignore_eos": True, "stream": True, "model": "tiny-moe"}


class _Cluster:
    def __init__(self, store: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "cluster.toml"
        config.write_text(
            f'store = "{store}"\n[http]\nport = {port}\n[usage]\nusage_directory = "{folder}/usage"\n'
            '[model]\ndevice = "cpu"\nslots = 24\n[cluster]\nreplicas = 2\nstatistics_seconds = 0.5\n'
        )
        self.usage = folder / "usage"
        self.log = folder / "log"
        command = [sys.executable, "-m", "server.cli", "cluster", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.wait(lambda: self._is_ready() and len(self.replicas()) == 2)

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + 180
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()

    def replicas(self) -> list[int]:
        """Their process ids."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::ServeReplica:deepfew:all"]:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def running(self) -> float:
        text = self.client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("deepfew_requests_running{")]
        return sum(float(line.split()[-1]) for line in lines)


@pytest.fixture(scope="module")
def cluster(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Cluster]:
    started = _Cluster(tiny_store, tmp_path_factory.mktemp("cluster"))
    yield started
    started.client.close()
    started.process.terminate()
    assert started.process.wait(timeout=90) == 0
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
def test_every_dialect_streams_and_answers_whole(cluster: _Cluster, path: str, body: dict[str, Any]) -> None:
    with cluster.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert len(_events(response)) > 2
    assert cluster.client.post(path, json={**body, "stream": False}).status_code == 200
    refused = cluster.client.post(path, json={**body, "no_such_field": 1})
    assert refused.status_code in (400, 422)
    assert "no_such_field" in refused.text


def test_a_client_that_leaves_ends_its_request(cluster: _Cluster) -> None:
    with cluster.client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()  # the connection is closed with it
        next(lines)
        cluster.wait(lambda: cluster.running() == 1)
    cluster.wait(lambda: cluster.running() == 0)


def test_a_killed_replica_ends_its_streams_with_an_error_and_the_others_go_on(cluster: _Cluster) -> None:
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
