"""Responses: a model as JSON, or models as server-sent events that stop when the client leaves.

Invariant: a field that was not set is left out, whatever its default. The source of a stream's events is always closed:
when the stream ends, when the client leaves, and when the client reads too slowly. Starlette's own streaming response
waits without limit for a client that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

Result = TypeVar("Result")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ModelResponse(Response):
    """A response whose body is a model's JSON."""

    media_type = "application/json"

    def render(self, content: BaseModel) -> bytes:
        return content.model_dump_json(exclude_unset=True).encode()


def event(payload: BaseModel) -> bytes:
    """One `data:` event, in ASCII: some clients split lines at U+2028 and others, which JSON need not escape."""
    return b"data: " + payload.model_dump_json(exclude_unset=True, ensure_ascii=True).encode() + b"\n\n"


def named_event(payload: BaseModel) -> bytes:
    """An event with its name, which is the payload's `type`."""
    return b"event: " + str(payload.type).encode() + b"\n" + event(payload)  # type: ignore[attr-defined]


class EventStream(Response):
    """A response that streams `events`.

    Args:
        events: byte chunks, each at least one whole event. The generator is closed in any case.
        guard: entered for as long as the stream lasts.
        send_seconds: the stream ends when one chunk cannot be sent for this long.
        headers: further headers of the response.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        guard: AbstractContextManager[Any],
        send_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.events = events
        self.guard = guard
        self.send_seconds = send_seconds
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                **(headers or {}),
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.guard:
            await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writer, watcher):
                task.cancel()
            results = await asyncio.gather(writer, watcher, return_exceptions=True)
            await self.events.aclose()
        error = results[0]
        if isinstance(error, TimeoutError):
            log.info("slow reader", extra={"reason": f"nothing was read for {self.send_seconds:g} s"})
            abort(scope)
        elif isinstance(error, Exception):
            raise error

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self.events:
            async with asyncio.timeout(self.send_seconds):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left first.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


def abort(scope: Scope) -> None:
    """Close the connection at once and drop what was not sent, where the server underneath allows it."""
    cut = scope.get("state", {}).get("abort")
    if cut is not None:
        with contextlib.suppress(OSError, RuntimeError):
            cut()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
