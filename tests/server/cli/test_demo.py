"""`make demo` from outside: a store, a server, a streamed answer; again, quickly, from whatever the last run left."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expert_store.store import Store
from server.cli import demo
from tests.server.cli.processes import deepfew


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return deepfew(*arguments, module="server.cli.demo", DEEPFEW_PORT="not a number")


def test_demo_makes_a_store_and_streams_an_answer(tmp_path: Path) -> None:
    store = tmp_path / "tiny-moe"
    first = run_demo("--store", str(store), "--once", "--port", "0")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "The capital of France is Paris" in first.stdout
    for path in ("/generate ", "/generate_stream ", "/experts", "/metrics"):
        assert path in first.stdout.replace("\n", " \n")
    Store.open(store).close()


@pytest.mark.exhaustive
def test_demo_of_a_store_that_is_there_serves_until_ctrl_c(tiny_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(tiny_store, tmp_path / "store")
    second = subprocess.Popen(
        [sys.executable, "-m", "server.cli.demo", "--store", str(store), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert second.stdout is not None
    shown = ""
    until = time.monotonic() + 120
    while "Ctrl-C" not in shown:
        assert time.monotonic() < until, shown
        shown += second.stdout.readline()
    assert "nothing to do" in shown
    second.send_signal(signal.SIGINT)
    rest, _ = second.communicate(timeout=60)
    assert second.returncode == 0, rest
    assert "Traceback" not in shown + rest


def test_busy_port_is_named_and_the_next_one_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as holder:
        holder.bind((demo.HOST, 0))
        holder.listen()
        port = holder.getsockname()[1]
        monkeypatch.setattr(demo, "FIRST_PORT", port)
        assert port < demo.free_port() <= port + demo.NUM_PORTS
        assert f"port {port} is in use" in capsys.readouterr().out
        assert demo.main(["--port", str(port), "--store", "/dev/null/nowhere"]) == 2


@pytest.mark.parametrize("left", ["nothing but files", "another version", "another checkpoint"])
def test_demos_own_store_is_remade_when_it_cannot_be_continued(
    left: str, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "own"
    (store / "experts").mkdir(parents=True)
    (store / "experts" / "deep-00000.safetensors").write_bytes(b"half")
    manifest = (tiny_store / "manifest.json").read_text()
    if left == "another version":
        (store / "manifest.json").write_text('{"format": "deepfew-store", "version": 999}')
    elif left == "another checkpoint":
        fingerprint = Store.open(tiny_store).manifest.source.fingerprint
        (store / "manifest.json").write_text(manifest.replace(fingerprint, "0" * len(fingerprint)))
    monkeypatch.setattr(demo, "STORE", store)
    assert demo.make_store(store) == 0
    assert "making it anew" in capsys.readouterr().out
    Store.open(store).close()
    assert demo.make_store(store) == 0
    assert "making it anew" not in capsys.readouterr().out
