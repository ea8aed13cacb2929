"""What every request passes: an id, the key, one line in the log, and a last net under errors.

Invariant: no route but liveness is reached without the key, where one is set; and nothing that fails inside reaches the
client with anything but our own words.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import UnauthorizedError, error_response
from server.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live"})
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/metrics/vllm"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Gate:
    """The outermost layer of ours around the application.

    Args:
        app: what is guarded.
        api_key: the key, or None where there is none.
        metrics: counts responses.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self._key_digest = None if api_key is None else _digest(api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.perf_counter()
        seen: dict[str, Any] = {"status": None}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self.metrics.response(message["status"])
            await send(message)

        try:
            if self._key_digest is not None and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
                error = UnauthorizedError(
                    "the API key is missing or wrong: send Authorization: Bearer KEY, or X-API-Key: KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error, scope["path"])(scope, receive, send_with_id)
                return
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("unexpected error", extra={"request_id": request_id, "path": _path(scope)})
            if seen["status"] is None:
                await error_response(error, scope["path"])(scope, receive, send_with_id)
            else:
                abort(scope)
        finally:
            logger.log(
                logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO,
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": _path(scope),
                    "status": seen["status"],
                    "seconds": round(time.perf_counter() - started, 4),
                },
            )

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        candidates = [headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        assert self._key_digest is not None
        # Both are always compared, as digests of one length, so that the time says nothing about the key.
        matches = [hmac.compare_digest(_digest(candidate), self._key_digest) for candidate in candidates]
        return any(matches)


def abort(scope: Scope) -> None:
    """Cut the connection at once, unsent bytes included, where the server underneath allows it."""
    cut = scope.get("state", {}).get("abort")
    if cut is not None:
        with contextlib.suppress(OSError, RuntimeError):
            cut()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _path(scope: Scope) -> str:
    """The path as it is safe to log: printable ASCII, bounded."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in scope["path"][:128])
