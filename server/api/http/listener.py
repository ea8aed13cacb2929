"""The listening process: its socket, the limits of a connection, and the end of the process.

Invariant: after the first SIGTERM (or Ctrl-C) the server is not ready, but finishes its requests. It exits with status
0 when they have ended or `drain_seconds` have passed. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from server.api.http.errors import ErrorResponse
from server.errors import ServerError
from server.serving.service import Service
from server.settings.schema import HttpSettings

log = logging.getLogger(__name__)

BACKLOG = 512
HEADER_READ_BYTES = 4096
LAST_WORDS_SECONDS = 2
ENGINE_END_SECONDS = 10.0


class PortTakenError(ServerError):
    """Another process listens on the address."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        PortTakenError: the port is in use.
        OSError: the address cannot be had for another reason.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == 98 or "in use" in str(error).lower():
            raise PortTakenError(f"{host} port {port} is in use") from error
        raise
    listener.setblocking(False)
    return listener


class Connection(H11Protocol):
    """A connection whose headers must arrive in time, and which the application can close.

    uvicorn's timers begin after the first response. Without this class a client that never finishes its first request
    line would keep its connection for ever.
    """

    receive_seconds = 20.0
    max_connections = 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "abort": self._abort}
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            body = _refusal("too many connections; try again", "overloaded")
            transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
            )
            transport.close()
            return
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        # h11 bounds headers that are not whole yet, and takes those of any length that come whole in one read.
        while data and not self.transport.is_closing():
            size = len(data)
            if not self._is_answering():
                self._start_timer()
                size = HEADER_READ_BYTES
            super().data_received(data[:size])
            data = data[size:]
            if self._is_answering():
                self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Send the error as our JSON, not as uvicorn's plain text: h11 refused the request line, headers or chunks."""
        body = _refusal("the request is not valid HTTP/1.1, or its headers are too long", "validation")
        has_begun = self._is_answering() and self.cycle.response_started
        if not has_begun and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
            )
        self.transport.close()

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn sets it with the first request
        return cycle is not None and not cycle.response_complete

    def _start_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self.receive_seconds, self._abort)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _abort(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


def _refusal(message: str, error_type: str) -> bytes:
    return ErrorResponse(error=message, error_type=error_type).model_dump_json().encode()


class Listener(uvicorn.Server):
    """Runs an application until a signal, a failed load, or `stop`.

    Args:
        app: the application.
        service: drained at the end.
        http: limits.
    """

    def __init__(self, app: ASGIApp, service: Service, http: HttpSettings) -> None:
        protocol = type(
            "LimitedConnection",
            (Connection,),
            {"receive_seconds": http.receive_seconds, "max_connections": http.max_connections},
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=http.idle_seconds,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
                h11_max_incomplete_event_size=http.max_header_bytes,
            )
        )
        self._service = service
        self._drain_seconds = http.drain_seconds
        self._drain_until: float | None = None

    def stop(self) -> None:
        """Begin to drain, as a first signal does. Any thread."""
        if self._drain_until is None:
            self._service.begin_drain()
            self._drain_until = time.monotonic() + self._drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain_until is not None:
            sys.stderr.flush()
            os._exit(128 + sig)
        self.stop()
        log.info("draining", extra={"seconds": self._drain_seconds, "hint": "a second signal ends at once"})

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but a handled signal is not raised again, so that the exit status is 0."""
        try:
            previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    async def on_tick(self, counter: int) -> bool:
        if self._drain_until is not None and (not self.server_state.tasks or time.monotonic() >= self._drain_until):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = threading.Thread(target=self._service.close, args=(0.0,), daemon=True)
        closing.start()
        until = time.monotonic() + ENGINE_END_SECONDS
        while closing.is_alive() and time.monotonic() < until:  # an engine that hangs must not keep the process
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
