"""Every error that a client can see: one table from error type to status, and the two dialects' shapes.

Invariant: a message is written by us, bounded, printable, and never repeats what the client sent. The dialect follows
from the path: `/v1/…` speaks OpenAI's, everything else Text Generation Inference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from expert_store.errors import StoreError
from server.engine.request import (
    ContextTooLongError,
    EngineError,
    EngineStoppedError,
    ExpertMissingError,
    GenerationError,
    InvalidRequestError,
    MemoryExhaustedError,
    QueueFullError,
)
from server.growth.status import GrowthBusyError, GrowthError, GrowthSourceError, NothingToGrowError
from server.serving.service import NotReadyError

MAX_MESSAGE = 600


class ApiError(Exception):
    """A request that the HTTP layer itself refuses.

    ApiError
      MalformedBodyError   400  not JSON, not UTF-8, a number that does not exist, a key given twice
      UnauthorizedError    401  no key, or a wrong one
      ForbiddenError       403  a route that needs the admin key
      NotFoundError        404  no such path, no such model
      MethodError          405  the path exists, the method does not
      SlowClientError      408  the body did not arrive in time
      BodyTooLargeError    413  longer than `max_body_bytes`
      MediaTypeError       415  not application/json, or compressed
      MisdirectedError     421  addressed to another name than this machine's, where there is no key
      ValidationFailed     422  well-formed, but a value or a parameter that we do not take

    Args:
        message: what, got, wanted; never the client's own text.
        param: where the parameter stands in the body, as in `messages[0].role`, if it is one.
        headers: of the response.
    """

    def __init__(self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = dict(headers or {})


class MalformedBodyError(ApiError):
    """The body is not a JSON document."""


class UnauthorizedError(ApiError):
    """The key is missing or wrong."""


class ForbiddenError(ApiError):
    """The key does not open this route."""


class MisdirectedError(ApiError):
    """The request was meant for another host, as those are that a page of that host's sends here."""


class NotFoundError(ApiError):
    """Nothing is there."""


class MethodError(ApiError):
    """The path has other methods."""


class SlowClientError(ApiError):
    """The client took too long to send its request."""


class BodyTooLargeError(ApiError):
    """The body is longer than allowed."""


class MediaTypeError(ApiError):
    """The body's type or encoding is not taken."""


class ValidationFailed(ApiError):
    """A value, a name or a combination that is not taken."""


class ModelNotFoundError(NotFoundError):
    """An OpenAI request named a model that is not served."""


class RequestTimeoutError(GenerationError):
    """The request took longer than `max_request_seconds`."""


class SlowReaderError(GenerationError):
    """The client left its stream unread for too long."""


@dataclass(frozen=True)
class Row:
    """How one error type is shown: status and type in the TGI dialect, status, type and code in OpenAI's."""

    status: int
    error_type: str
    openai_status: int
    openai_type: str
    openai_code: str | None


_INVALID = "invalid_request_error"
TABLE: dict[type[Exception], Row] = {
    MalformedBodyError: Row(400, "validation", 400, _INVALID, "malformed_body"),
    UnauthorizedError: Row(401, "unauthorized", 401, "authentication_error", "invalid_api_key"),
    ForbiddenError: Row(403, "forbidden", 403, "permission_error", "admin_key_required"),
    ModelNotFoundError: Row(404, "not_found", 404, _INVALID, "model_not_found"),
    NotFoundError: Row(404, "not_found", 404, _INVALID, "not_found"),
    MethodError: Row(405, "method_not_allowed", 405, _INVALID, "method_not_allowed"),
    SlowClientError: Row(408, "timeout", 408, "timeout", "request_timeout"),
    BodyTooLargeError: Row(413, "validation", 413, _INVALID, "body_too_large"),
    MediaTypeError: Row(415, "validation", 415, _INVALID, "unsupported_media_type"),
    MisdirectedError: Row(421, "misdirected", 421, _INVALID, "misdirected"),
    ValidationFailed: Row(422, "validation", 400, _INVALID, None),
    ContextTooLongError: Row(422, "validation", 400, _INVALID, "context_length_exceeded"),
    InvalidRequestError: Row(422, "validation", 400, _INVALID, None),
    QueueFullError: Row(429, "overloaded", 429, "rate_limit_error", "queue_full"),
    NotReadyError: Row(503, "healthcheck", 503, "server_error", "not_ready"),
    EngineStoppedError: Row(503, "healthcheck", 503, "server_error", "not_ready"),
    GrowthBusyError: Row(409, "busy", 409, _INVALID, "busy"),
    NothingToGrowError: Row(409, "nothing_to_grow", 409, _INVALID, "nothing_to_grow"),
    GrowthSourceError: Row(409, "no_source", 409, _INVALID, "no_source"),
    GrowthError: Row(422, "validation", 400, _INVALID, None),
    ExpertMissingError: Row(424, "expert_missing", 424, _INVALID, "expert_missing"),
    MemoryExhaustedError: Row(503, "overloaded", 503, "server_error", "out_of_memory"),
    # clients of OpenAI's dialect send again what is answered with 500, and neither of these ends otherwise then
    RequestTimeoutError: Row(424, "generation", 424, "server_error", "timeout"),
    GenerationError: Row(424, "generation", 424, "server_error", "generation_failed"),
    EngineError: Row(500, "incomplete_generation", 500, "server_error", "generation_failed"),
    Exception: Row(500, "internal", 500, "server_error", "internal_error"),
}


def row_of(error: Exception) -> Row:
    """The table's row for the most specific type of `error`."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def is_openai(path: str) -> bool:
    """Whether the path speaks OpenAI's dialect."""
    return path == "/v1" or path.startswith("/v1/")


def message_of(error: Exception) -> str:
    """Bounded, printable text; an error that we did not raise on purpose says nothing of itself."""
    if isinstance(error, EngineError) and isinstance(error.__cause__, StoreError):  # its text names paths of the server
        return (
            "the generation could not be finished: an expert could not be read from the store; the log names the file"
        )
    text = (
        str(error)
        if isinstance(error, (ApiError, EngineError, GrowthError))
        else "internal error; the log has the details"
    )
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def error_body(error: Exception, path: str) -> dict[str, Any]:
    """The JSON object in the dialect of `path`; also the payload of an error event inside a stream."""
    row = row_of(error)
    if is_openai(path):
        return {
            "error": {
                "message": message_of(error),
                "type": row.openai_type,
                "param": getattr(error, "param", None),
                "code": row.openai_code,
            }
        }
    return {"error": message_of(error), "error_type": row.error_type}


def error_response(error: Exception, path: str) -> JSONResponse:
    """The response that a client gets for `error`."""
    row = row_of(error)
    headers = dict(getattr(error, "headers", {}))
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, round(retry_after)))
    status = row.openai_status if is_openai(path) else row.status
    return JSONResponse(error_body(error, path), status_code=status, headers=headers)


def validation_failed(error: ValidationError) -> ValidationFailed:
    """Say which fields were wrong and what was wanted, in our words and without their values."""
    problems: list[str] = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        place = _path(problem["loc"])
        wanted = "is not a known parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
        problems.append(f"`{place}`: {wanted.removeprefix('Value error, ')}" if place else wanted)
    shown = "; ".join(dict.fromkeys(problems[:5]))
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]["loc"]
    return ValidationFailed(shown + more, param=_path(first) or None)


def _path(parts: Sequence[int | str]) -> str:
    """Where a value stands in the body, as in `messages[0].role`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in parts)
    return text.removeprefix(".")


def _printable(part: str) -> str:
    """A field's name as we show it: names that clients make up are shown only when they look like names."""
    plain = part.isascii() and len(part) <= 40 and all(char.isalnum() or char in "_-." for char in part)
    return part if plain else "(unprintable name)"
