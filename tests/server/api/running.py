"""A real server on a real socket, in a thread: what the tests of the HTTP service talk to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from server.api.app import create_app
from server.api.http.listener import Listener, bind_socket
from server.serving.metrics import Metrics
from server.serving.service import Loader, Service
from server.settings.schema import HttpSettings
from tests.server.api.scripted import ScriptedEngine, loaded


@dataclass
class Running:
    """A server that runs, its address, and what is behind it."""

    url: str
    port: int
    service: Service
    metrics: Metrics
    engine: ScriptedEngine
    listener: Listener
    thread: threading.Thread
    connections: contextlib.ExitStack

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    def raw(self, timeout: float = 5.0) -> socket.socket:
        """A plain connection, closed with the server at the latest: also where a test fails, which keeps its frames."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        return self.connections.enter_context(connection)

    def post_raw(self, path: str, body: bytes, *, read: int = 0) -> socket.socket:
        """Send a POST by hand and read `read` bytes of the answer; the socket stays open."""
        connection = self.raw()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        if read:
            connection.recv(read)
        return connection


@contextlib.contextmanager
def running(
    engine: ScriptedEngine | None = None,
    *,
    load: Loader | None = None,
    stall_seconds: float = 60.0,
    log_prompts: bool = False,
    port: int = 0,
    **http: Any,
) -> Iterator[Running]:
    """Serve a scripted engine (or what `load` makes) for the length of the block; port 0 is a free one."""
    engine = ScriptedEngine() if engine is None else engine
    service = Service(load or (lambda progress: loaded(engine)), stall_seconds=stall_seconds)
    settings = HttpSettings(**{"drain_seconds": 1.0, **http})
    metrics = Metrics(service, "1.2.3")
    listener = Listener(
        create_app(service, metrics, settings, version="1.2.3", log_prompts=log_prompts), service, settings
    )
    bound = bind_socket("127.0.0.1", port)
    port = bound.getsockname()[1]
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [bound]}, daemon=True)
    service.start()
    thread.start()
    connections = contextlib.ExitStack()
    try:
        wait_until(lambda: listener.started and (load is not None or service.loaded is not None))
        yield Running(f"http://127.0.0.1:{port}", port, service, metrics, engine, listener, thread, connections)
    finally:
        connections.close()
        engine.may_run.set()
        listener.stop()
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Any, seconds: float = 15.0) -> None:
    """Return once `condition()` holds; fail after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


def events_of(text: str) -> list[dict[str, Any]]:
    """The `data:` events of a stream, comments left out."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
