"""The commands of docker/compose.cluster.yaml as plain processes: a head without cores, and two nodes that join it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.server.cluster.processes import Cluster

pytestmark = pytest.mark.exhaustive
pytest.importorskip("ray")
REPOSITORY = Path(__file__).resolve().parents[3]
SERVICES: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker" / "compose.cluster.yaml").read_text())["services"]
WAIT_SECONDS = 180


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, as Ray's sockets lie in it; whatever still runs there at the end is killed."""
    path = Path(tempfile.mkdtemp(prefix="few", dir="/tmp"))
    yield path
    for process in psutil.process_iter(["cmdline"]):
        if any(str(path) in word for word in process.info["cmdline"] or ()):
            process.kill()
    shutil.rmtree(path, ignore_errors=True)


def _environment(folder: Path, ports: list[int]) -> dict[str, str]:
    """That of the services, with what the image and the volumes give them in this folder."""
    for key in ("api", "admin"):
        (folder / key).mkdir()
        (folder / key / "key").write_text(f"the-{key}-key-of-a-test-with-two-nodes")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "deepfew").write_text(f'#!/bin/sh\nexec {sys.executable} -m server.cli "$@"\n')
    (programs / "deepfew").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = {name: value.replace("/keys", str(folder)) for name, value in SERVICES["head"]["environment"].items()}
    ours = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": str(folder), "DEEPFEW_PORT": str(ports[1])}
    return os.environ | found | ours | {"DEEPFEW_HOST": "127.0.0.1"}


def test_a_head_and_two_nodes_serve_with_keys_and_drain(tiny_store: Path, folder: Path) -> None:
    ports = _free_ports(2)
    environment = _environment(folder, ports)
    config = folder / "cluster.toml"
    text = (REPOSITORY / "docker" / "cluster.toml").read_text()
    config.write_text(text.replace('"/store"', f'"{tiny_store}"') + f'[usage]\nusage_directory = "{folder}/usage"\n')

    def here(words: list[str]) -> list[str]:
        replaced = {"6379": str(ports[0]), "head:": "127.0.0.1:", "/etc/deepfew/cluster.toml": str(config)}
        for old, new in replaced.items():
            words = [word.replace(old, new) for word in words]
        return words

    head_command = here(["/bin/sh", "-c", *SERVICES["head"]["command"]])
    node_command = here([SERVICES["replica"]["entrypoint"][-1], *SERVICES["replica"]["command"]])
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(head_command, env=environment, stdout=log, stderr=log)
        try:
            _wait(lambda: _answers(ports[0]), head, folder / "log")
            nodes = []
            for at in range(2):  # each with a folder of its own for Ray, as a container has
                own = environment | {"RAY_TMPDIR": str(folder / str(at))}
                nodes.append(subprocess.Popen(node_command, env=own, stdout=log, stderr=log))
            key = {"authorization": f"Bearer {(folder / 'api' / 'key').read_text()}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", timeout=60) as client:
                _wait(lambda: Cluster.is_ready(client, key), head, folder / "log")
                body = {"model": "tiny-moe", "prompt": "One day", "max_tokens": 4}
                assert client.post("/v1/completions", json=body).status_code == 401
                assert client.post("/v1/completions", json=body, headers=key).status_code == 200
                _wait(lambda: len(client.get("/info", headers=key).json()["replicas"]) == 2, head, folder / "log")
            head.terminate()
            assert head.wait(90) == 0, (folder / "log").read_text()
            for node in nodes:
                node.terminate()
            assert [node.wait(60) is not None for node in nodes] == [True, True]
        finally:
            head.kill()
            head.wait(30)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(is_so: Any, head: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)
