"""The front of many replicas: an application that passes each request on to one of them and its answer back.

It reads the body, so that a replica can be chosen by what the request says; the replica checks all else. Invariant: a
client gets an answer in its dialect whatever happens behind. A request whose replica was lost runs again elsewhere if
the client has seen nothing of an answer; otherwise its stream ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextvars import Context

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import fleet
from server.api.admin.schemas import HealthResponse
from server.api.http.body import receive_body
from server.api.http.errors import ApiError, dialect_of, error_body, error_response
from server.api.http.middleware import OPEN_PATHS, as_routed
from server.api.http.responses import ModelResponse, abort, event, named_event, unless_disconnected
from server.api.replicas import PassedRequest, ReplicaLostError, Replicas
from server.engine.request import EngineError
from server.settings.schema import HttpSettings

log = logging.getLogger(__name__)

MAX_TRIES = 3
MAX_MESSAGES = 64
"""Messages of an answer that wait for a front that reads slowly."""
UNREPEATABLE = ("/experts/grow", "/experts/shrink")


class Front:
    """The ASGI application.

    Args:
        replicas: take the requests.
        http: limits of bodies.
    """

    def __init__(self, replicas: Replicas, http: HttpSettings) -> None:
        self._replicas = replicas
        self._http = http

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            has_begun = False

            async def send_noted(message: Message) -> None:
                nonlocal has_begun
                has_begun = True
                await send(message)

            routed = as_routed(scope)
            try:
                await self._answer(routed, scope["method"], receive, send_noted)
            except ClientDisconnect:
                return
            except Exception as error:
                if not isinstance(error, ApiError | EngineError):
                    log.exception("unexpected error")
                if has_begun:
                    raise  # the server underneath closes the connection
                await error_response(error, routed["path"])(routed, receive, send)

    async def _answer(self, scope: Scope, method: str, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in OPEN_PATHS:
            await ModelResponse(HealthResponse(status="ok"))(scope, receive, send)
            return
        request = Request(scope, receive)
        body = await receive_body(
            request, max_bytes=self._http.max_body_bytes, receive_seconds=self._http.receive_seconds
        )
        passed = PassedRequest(method, path, scope.get("query_string", b""), tuple(map(tuple, scope["headers"])), body)
        if (together := await fleet.answer(self._replicas, passed)) is not None:
            await together(scope, receive, send)
        else:
            await unless_disconnected(request, self._pass_on(passed, scope, send))

    async def _pass_on(self, request: PassedRequest, scope: Scope, send: Send) -> None:
        for tries_left in reversed(range(1 if request.path in UNREPEATABLE else MAX_TRIES)):
            start: Message | None = None
            has_begun = False
            try:
                async with contextlib.aclosing(self._replicas.open(request)) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":
                            start = message  # kept back until there is a body: until then another replica may answer
                            continue
                        if start is not None and not has_begun:
                            await send(start)
                            has_begun = True
                        await send(message)
                return
            except ReplicaLostError as error:
                if has_begun:
                    await _end_broken(error, start or {}, request.path, scope, send)
                    return
                if not tries_left:
                    raise
                log.warning("a replica was lost; its request runs again", extra={"path": request.path})


async def _end_broken(error: ReplicaLostError, start: Message, path: str, scope: Scope, send: Send) -> None:
    """End an answer of which the client has seen a part: a stream with an error event, else with the connection."""
    headers = dict(start.get("headers", ()))
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        abort(scope)
        raise error
    payload = error_body(error, path)
    last = named_event(payload) if dialect_of(path) == "anthropic" else event(payload)
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def answer_of(
    application: ASGIApp, request: PassedRequest, context: Context | None = None
) -> AsyncGenerator[list[Message], None]:
    """The messages of an application's answer, as many at once as there are. Closing it is as if the client left.

    Args:
        context: in which the application runs; None is a copy of the caller's.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(MAX_MESSAGES)
    unread: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.get_running_loop().create_future()

    async def run() -> None:
        try:
            await application(_scope(request), receive, messages.put)
        finally:
            await messages.put(None)

    task = asyncio.create_task(run(), context=context)
    try:
        while True:
            batch = [await messages.get()]
            while not messages.empty():
                batch.append(messages.get_nowait())
            yield [message for message in batch if message is not None]
            if None in batch:
                await task  # raises what the application raised
                return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _scope(request: PassedRequest) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": [list(header) for header in request.headers],
        "client": None,
        "server": None,
    }
