"""A server whose engine hangs in a step: a signal ends the process all the same, and a second one at once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

HANGS = """
import sys, time
from server.model.host.runner import Runner
def hang(*arguments, **options):
    print("hanging", file=sys.stderr, flush=True)
    time.sleep(3600)
Runner.decode = hang
from server.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
LIMIT_SECONDS = 60


class HangingServer:
    """A server with one request whose first decode step never returns."""

    def __init__(self, store: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log
        options = ("--port", str(port), "--drain-seconds", "1", "--device", "cpu", "--slots", "16")
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", HANGS, "serve", str(store), *options], stdout=file, stderr=file
            )
        self._until("ready", lambda: self._get(f"http://127.0.0.1:{port}/health/ready"))
        body = json.dumps({"inputs": "Once", "parameters": {"max_new_tokens": 5}}).encode()
        self.client = socket.create_connection(("127.0.0.1", port))
        head = (
            "POST /generate HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        )
        self.client.sendall(head.encode() + b"\r\n\r\n" + body)
        self._until("hanging", lambda: "hanging" in log.read_text())

    def _until(self, what: str, is_so: object) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while not is_so():  # type: ignore[operator]
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"not {what}: {self.log.read_text()}"
            time.sleep(0.05)

    @staticmethod
    def _get(url: str) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


@pytest.fixture
def hanging(tiny_store: Path, tmp_path: Path) -> Iterator[HangingServer]:
    server = HangingServer(tiny_store, tmp_path / "log")
    yield server
    server.client.close()
    server.process.kill()
    server.process.wait()


def test_a_signal_ends_a_server_whose_engine_hangs_and_the_log_says_where(hanging: HangingServer) -> None:
    hanging.process.send_signal(signal.SIGTERM)
    assert hanging.process.wait(30) == 1
    log = hanging.log.read_text()
    assert "did not end within" in log
    assert "in hang" in log


def test_a_second_signal_ends_it_at_once(hanging: HangingServer) -> None:
    hanging.process.send_signal(signal.SIGTERM)
    time.sleep(2.0)  # past the drain, while the engine's end is waited for
    assert hanging.process.poll() is None
    hanging.process.send_signal(signal.SIGTERM)
    assert hanging.process.wait(3) == 128 + signal.SIGTERM
