"""Servers that benchmarks start, wait for and end: ours over a store of the bundled checkpoint, and transformers' own.

Invariant: a server ends with the block that started it, whatever happened in the block.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.harness.reporting import BUNDLED

START_SECONDS = 300
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a badger who",
    "Tom has 12 apples and gives away 5 of them. How many",
    "The chemical symbol of gold is",
    "Once there was a boy called Hugo. He lived in the meadow with his uncle, and he had a boat. One day",
    "In the city of",
)


@dataclass(frozen=True)
class Served:
    """One server to compare: its name in the table, its command without the port, and its name for the model."""

    name: str
    command: tuple[str, ...]
    model: str


def ours(store: Path, slots: int, rows: int) -> Served:
    """`deepfew serve` in float32 with so many slots in every layer throughout, and at most `rows` requests at once."""
    serve = (sys.executable, "-m", "server.cli", "serve", str(store), "--dtype", "float32", "--log-level", "warning")
    flags = ("--slots", str(slots), "--memory-balance", "fixed", "--max-batch-size", str(rows))
    return Served(f"deepfew, {slots} of 64 slots", (*serve, *flags), BUNDLED.name)


def theirs(*, continuous_batching: bool) -> Served:
    """`transformers serve` in float32 on the CPU."""
    program = Path(sys.executable).parent / "transformers"
    flags = ("--dtype", "float32", "--device", "cpu", *(["--continuous-batching"] if continuous_batching else []))
    name = "transformers serve" + (", continuous batching" if continuous_batching else "")
    return Served(name, (str(program), "serve", str(BUNDLED), *flags), str(BUNDLED))


def require_transformers_serve() -> None:
    """End with a message when `transformers serve` cannot run here."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SystemExit("transformers serve lacks what it needs: pip install 'transformers[serving]', then run again")


def free_port() -> int:
    """A port of the loopback address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: tuple[str, ...]) -> Iterator[str]:
    """The address of a server that answers; it is ended with the block."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + START_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{command} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        found = httpx.get(url + "/health/ready", timeout=5)
        if found.status_code == 404:  # not ours
            found = httpx.get(url + "/health", timeout=5)
    except httpx.HTTPError:
        return False
    return found.status_code == 200
