"""Server-sent events: a response that writes events as they come and stops at once when nobody reads them.

Invariant: the source generator is always closed, whether the stream ended, the client left, or it read too slowly.
Starlette's own streaming response waits without bound on a client that does not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.http.middleware import abort

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One `data:` event; JSON has no raw line breaks, so it is one line."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Streams `events`.

    Args:
        events: byte chunks, each at least one whole event; closed in any case.
        guard: entered for as long as the stream lasts.
        send_seconds: a chunk that could not be written for this long ends the stream.
        headers: more of the response's.
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
            logger.info("slow reader", extra={"reason": f"nothing was read for {self.send_seconds:g} s"})
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
