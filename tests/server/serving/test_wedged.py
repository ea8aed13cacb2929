"""A server whose engine hangs in a step: a signal ends the process all the same, and a second one at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.cli.processes import Server

HANGS = """
import sys, threading
from server.engine import engine
from server.model.host.runner import HostRunner
def hang(*arguments, **options):
    print("hanging", file=sys.stderr, flush=True)
    threading.Event().wait()
HostRunner.decode = hang
engine.STOP_MARGIN_SECONDS = {margin_seconds}
from server.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextlib.contextmanager
def hanging(store: Path, log: Path, *, drain_seconds: float, margin_seconds: float) -> Iterator[Server]:
    """A server with one request whose first decode step never returns.

    The engine's end is waited for `margin_seconds` after the drain.
    """
    options = ("--drain-seconds", str(drain_seconds), "--device", "cpu", "--slots", "16")
    server = Server(store, log, *options, program=("-c", HANGS.format(margin_seconds=margin_seconds)))
    try:
        server.wait_for("/health/ready")
        with server.post("/generate", {"inputs": "Once", "parameters": {"max_new_tokens": 5}}):
            server.wait_for_log("hanging")
            yield server
    finally:
        server.kill()


def test_a_signal_ends_a_server_whose_engine_hangs_and_the_log_says_where(tiny_store: Path, tmp_path: Path) -> None:
    with hanging(tiny_store, tmp_path / "log", drain_seconds=0.5, margin_seconds=0.5) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
        log = server.log.read_text()
    assert "did not end within" in log
    assert "in hang" in log


@pytest.mark.exhaustive
@pytest.mark.parametrize("when", ["while the request is waited for", "while the engine's end is waited for"])
def test_a_second_signal_ends_it_at_once(tiny_store: Path, tmp_path: Path, when: str) -> None:
    is_drained = "engine" in when
    with hanging(
        tiny_store, tmp_path / "log", drain_seconds=0.5 if is_drained else 3600, margin_seconds=3600
    ) as server:
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        if is_drained:
            server.wait_until_closed()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 128 + signal.SIGTERM
