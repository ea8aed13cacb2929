"""The `deepfew` command and its server in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


def deepfew(*arguments: str, module: str = "server.cli", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command, or another module, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, **environ},
    )


class Server:
    """`deepfew serve` in a process of its own; its log is a file.

    `before` is a command that runs it, `program` the arguments of Python that replace the server's own entry point.
    """

    def __init__(
        self,
        store: Path,
        log: Path,
        *arguments: str,
        before: tuple[str, ...] = (),
        program: tuple[str, ...] = ("-m", "server.cli.main"),
    ) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = ("serve", str(store), "--port", str(self.port), *arguments)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*before, sys.executable, *program, *options], stderr=file, stdout=subprocess.DEVNULL
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_for(self, path: str, seconds: float = 120.0) -> Any:
        """The JSON of `path` once it answers 200."""
        return self._wait(lambda: self._get(path), f"{path} did not answer", seconds)

    def wait_for_log(self, words: str) -> None:
        """Return once the log has the words."""
        self._wait(lambda: words in self.log.read_text() or None, f"{words!r} was not logged")

    def wait_until_closed(self) -> None:
        """Return once the server takes no connections any more; its process still runs."""
        self._wait(self._is_closed, "the port is still open")

    def post(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request by hand; the connection stays open and nothing of it is read."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        self.process.kill()
        self.process.wait()

    def _get(self, path: str) -> Any:
        try:
            response = httpx.get(self.url + path, timeout=5)
        except httpx.HTTPError:
            return None
        return response.json() if response.status_code == 200 else None

    def _is_closed(self) -> bool | None:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return None

    def _wait(self, result: Callable[[], Any], problem: str, seconds: float = 120.0) -> Any:
        """What `result` returns once that is not None."""
        until = time.monotonic() + seconds
        while (found := result()) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, f"{problem}: {self.log.read_text()}"
            time.sleep(0.05)
        return found

    def records(self) -> list[dict[str, Any]]:
        """The log, a JSON object a line."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]
