"""Middleware around every route: it gives the request an id, checks the keys, logs one line, and catches every error.

Invariant: where a key is set, only liveness and the files of the page are reached without it. Where none is set, only
requests to a name of this machine are served. Routes that change the server need the admin key. A client never sees the
text of an unexpected error.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.errors import ForbiddenError, MisdirectedError, UnauthorizedError, dialect_of, error_response
from server.api.http.responses import abort
from server.serving.metrics import Metrics
from server.settings.schema import is_loopback

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live"})
QUIET_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/metrics", "/metrics/vllm"})
PAGE_PATH = "/page/"
"""The files of the page, which hold nothing of the server, are below this path."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Gate:
    """Checks and logs every request before the application sees it.

    Args:
        app: the guarded application.
        api_key: the key; None lets everybody in.
        admin_key: opens all that `api_key` opens, and the routes that `require_admin` guards. None closes those routes.
        metrics: counts responses.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_key: str | None, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self._key_digest = None if api_key is None else _digest(api_key)
        self._admin_digest = None if admin_key is None else _digest(admin_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, scope = scope["method"], as_routed(scope)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        is_user, is_admin = self._rights(headers)
        is_public = scope["path"] in OPEN_PATHS or _is_of_the_page(scope, headers)
        scope.setdefault("state", {}).update(request_id=request_id, is_admin=is_admin, is_head=method == "HEAD")
        started = time.perf_counter()
        seen: dict[str, Any] = {"status": None}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                milliseconds = round(1000 * (time.perf_counter() - started))
                MutableHeaders(scope=message).update(_head_of(scope["path"], request_id, milliseconds))
                self.metrics.response(message["status"])
            await send(message)

        try:
            is_open = is_public or is_admin
            if not is_open and not is_user:
                error = UnauthorizedError(
                    "the API key is missing or wrong: send Authorization: Bearer KEY, or X-API-Key: KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error_response(error, scope["path"], request_id)(scope, receive, send_with_id)
                return
            if self._key_digest is None and not is_open and not _is_to_this_machine(headers.get("host", "")):
                misdirected = MisdirectedError(
                    "without an API key only requests to this machine by a name of its own are taken, and the Host "
                    "header has another: call http://127.0.0.1 or http://localhost, or set an API key"
                )
                await error_response(misdirected, scope["path"], request_id)(scope, receive, send_with_id)
                return
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("unexpected error", extra={"request_id": request_id, "path": _path(scope)})
            if seen["status"] is None:
                await error_response(error, scope["path"], request_id)(scope, receive, send_with_id)
            else:
                abort(scope)
        finally:
            log.log(
                logging.DEBUG if is_public or scope["path"] in QUIET_PATHS else logging.INFO,
                "request",
                extra={
                    "request_id": request_id,
                    "method": method,
                    "path": _path(scope),
                    "status": seen["status"],
                    "seconds": round(time.perf_counter() - started, 4),
                },
            )

    def _rights(self, headers: Headers) -> tuple[bool, bool]:
        """Whether the request may reach ordinary routes, and whether it has the admin key."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        shown = [headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        digests = [_digest(candidate) for candidate in shown]
        is_user = self._key_digest is None or _is_among(self._key_digest, digests)
        return is_user, self._admin_digest is not None and _is_among(self._admin_digest, digests)


def _head_of(path: str, request_id: str, milliseconds: int) -> dict[str, str]:
    """Headers of every response: the id, also by the name that clients of the dialect read, and the time until now."""
    head = {"x-request-id": request_id}
    dialect = dialect_of(path)
    if dialect == "anthropic":
        head["request-id"] = request_id
    elif dialect == "openai":
        head["openai-processing-ms"] = str(milliseconds)
    return head


async def require_admin(request: Request) -> None:
    """Guard a route that changes the server, on loopback too.

    Raises:
        ForbiddenError: the request does not have the admin key, or none is set.
    """
    if request.state.is_admin:
        return
    if request.app.state.context.http.admin_key is None:
        raise ForbiddenError(
            "this route changes the server and needs an admin key, and none is set: set `http.admin_key_file` "
            "(--admin-key-file FILE, or DEEPFEW_ADMIN_KEY_FILE)"
        )
    raise ForbiddenError(
        "this route changes the server and needs the admin key (`http.admin_key`); the API key does not open it: send "
        "Authorization: Bearer ADMIN_KEY, or X-API-Key: ADMIN_KEY"
    )


def as_routed(scope: Scope) -> Scope:
    """The request as the routes know it: without double and trailing slashes, and with GET for HEAD.

    uvicorn keeps the scope of its own and sends no body for HEAD.
    """
    path = "/" + "/".join(part for part in scope["path"].split("/") if part)
    return {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}


def wants_page(headers: Headers) -> bool:
    """Whether a request asks for a page, as a browser that opens an address does; other clients name no such type."""
    return "text/html" in headers.get("accept", "").lower()


def _is_of_the_page(scope: Scope, headers: Headers) -> bool:
    is_file = scope["path"].startswith(PAGE_PATH) or (scope["path"] == "/" and wants_page(headers))
    return is_file and scope["method"] == "GET"


def _is_among(digest: bytes, shown: list[bytes]) -> bool:
    """Compare all, as digests of one length, so that the time tells nothing about the key."""
    matches = [hmac.compare_digest(candidate, digest) for candidate in shown]
    return any(matches)


def _is_to_this_machine(host: str) -> bool:
    """Whether a Host header names loopback. A web page whose name resolves to 127.0.0.1 still sends its own name."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().rstrip(".")
    return not name or name.endswith(".localhost") or is_loopback(name)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _path(scope: Scope) -> str:
    """The path for the log: printable ASCII, bounded."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in scope["path"][:128])
