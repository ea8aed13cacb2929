"""Every error that a client can see: one table of statuses and kinds, and the error's JSON in every dialect.

Invariant: a message is written by us, bounded and printable, and never repeats what the client sent, but words of a
schema or a pattern that cannot be enforced. The path decides the dialect: `/v1/messages` has Anthropic's, other paths
under `/v1` OpenAI's, all others Text Generation Inference's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

from expert_store.errors import StoreError
from server.api.http.fields import KIND, WRONG_TYPE
from server.api.http.responses import ModelResponse
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
from server.errors import ServerError
from server.growth.status import GrowthBusyError, GrowthError, GrowthSourceError, NothingToGrowError
from server.serving.service import NotReadyError

MAX_MESSAGE = 600
_OF_PYTHON = re.compile(r"a valid dictionary( or instance of \w+)?")


class ApiError(ServerError):
    """A request that the HTTP layer refuses. `TABLE` has the status of each subclass.

    Args:
        message: what was wrong, what was got and what was wanted; never the client's own text.
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
    """No key is set, and the Host header names another machine, as a web page's request does."""


class NotFoundError(ApiError):
    """Nothing is at this path."""


class ModelNotFoundError(NotFoundError):
    """No model of this name is served."""


class TooManyWatchersError(ApiError):
    """As many viewers as there may be watch the experts already."""


class MethodError(ApiError):
    """The path has other methods."""


class SlowClientError(ApiError):
    """The body did not arrive in time."""


class BodyTooLargeError(ApiError):
    """The body is longer than allowed."""


class MediaTypeError(ApiError):
    """The type or the encoding of the body is not taken."""


class ValidationFailed(ApiError):
    """A value, a name or a combination that is not taken."""


class RequestTimeoutError(GenerationError):
    """The request took longer than `max_request_seconds`."""


class SlowReaderError(GenerationError):
    """The client left its stream unread for too long."""


Dialect = Literal["tgi", "openai", "anthropic"]


class ErrorResponse(BaseModel):
    """Every error outside `/v1`."""

    error: str
    error_type: str


class OpenAIErrorDetails(BaseModel):
    """The error of an `OpenAIErrorResponse`."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorResponse(BaseModel):
    """Every error under `/v1`."""

    error: OpenAIErrorDetails


class AnthropicErrorDetails(BaseModel):
    """The error of an `AnthropicErrorResponse`."""

    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """Every error under `/v1/messages`; also the payload of an error event, which has no id."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str | None = None


@dataclass(frozen=True)
class Row:
    """One type of error, as a client sees it.

    Attributes:
        status: outside `/v1`. OpenAI and Anthropic have no 422: there it is 400.
        error_type: outside `/v1`.
        openai_type, openai_code: under `/v1`.
        when: for the OpenAPI document.
    """

    status: int
    error_type: str
    openai_type: str
    openai_code: str | None
    when: str

    def status_in(self, dialect: Dialect) -> int:
        """The status in a dialect."""
        return 400 if self.status == 422 and dialect != "tgi" else self.status

    @property
    def anthropic_type(self) -> str:
        """The type under `/v1/messages`, which follows the status."""
        fault = "api_error" if self.openai_type == _FAULT else _INVALID
        return _ANTHROPIC_TYPES.get(self.status, fault)


_INVALID = "invalid_request_error"
_FAULT = "server_error"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
TABLE: dict[type[Exception], Row] = {
    MalformedBodyError: Row(400, "validation", _INVALID, "malformed_body", "The body is not a JSON document."),
    UnauthorizedError: Row(
        401, "unauthorized", "authentication_error", "invalid_api_key", "The API key is missing or wrong."
    ),
    ForbiddenError: Row(
        403, "forbidden", "permission_error", "admin_key_required", "The admin key is missing or wrong, or none is set."
    ),
    ModelNotFoundError: Row(404, "not_found", _INVALID, "model_not_found", "No model of this name is served."),
    NotFoundError: Row(404, "not_found", _INVALID, "not_found", "Nothing is here; what is served cannot change."),
    MethodError: Row(405, "method_not_allowed", _INVALID, "method_not_allowed", "The path has other methods."),
    SlowClientError: Row(408, "timeout", "timeout", "request_timeout", "The body did not arrive in time."),
    GrowthBusyError: Row(409, "busy", _INVALID, "busy", "Another change of the store is under way."),
    NothingToGrowError: Row(409, "nothing_to_grow", _INVALID, "nothing_to_grow", "No expert can be added."),
    GrowthSourceError: Row(409, "no_source", _INVALID, "no_source", "The store's checkpoint is not where it was."),
    BodyTooLargeError: Row(413, "validation", _INVALID, "body_too_large", "The body is too long."),
    MediaTypeError: Row(415, "validation", _INVALID, "unsupported_media_type", "The body is not application/json."),
    MisdirectedError: Row(421, "misdirected", _INVALID, "misdirected", "The Host header names another machine."),
    ValidationFailed: Row(422, "validation", _INVALID, None, "A value or a parameter is not taken."),
    ContextTooLongError: Row(
        422, "validation", _INVALID, "context_length_exceeded", "The prompt does not fit the context."
    ),
    InvalidRequestError: Row(422, "validation", _INVALID, None, "The model cannot serve this request."),
    GrowthError: Row(422, "validation", _INVALID, None, "The store cannot be changed so."),
    ExpertMissingError: Row(
        424, "expert_missing", _INVALID, "expert_missing", "A token wanted an expert that is not available."
    ),
    # Clients of OpenAI's dialect send a request again after a 500. Neither of these two would end otherwise then.
    RequestTimeoutError: Row(424, "generation", _FAULT, "timeout", "The generation took too long."),
    GenerationError: Row(424, "generation", _FAULT, "generation_failed", "The generation failed."),
    TooManyWatchersError: Row(429, "overloaded", "rate_limit_error", "too_many_watchers", "Too many watch already."),
    QueueFullError: Row(429, "overloaded", "rate_limit_error", "queue_full", "The queue is full; see Retry-After."),
    EngineError: Row(500, "incomplete_generation", _FAULT, "generation_failed", "The generation broke off."),
    Exception: Row(500, "internal", _FAULT, "internal_error", "The server failed; its log says why."),
    NotReadyError: Row(
        503, "healthcheck", _FAULT, "not_ready", "No request is taken now: the model is loading, draining or failed."
    ),
    EngineStoppedError: Row(503, "healthcheck", _FAULT, "not_ready", "The server is shutting down."),
    MemoryExhaustedError: Row(503, "overloaded", _FAULT, "out_of_memory", "Memory did not suffice."),
}


def row_of(error: Exception) -> Row:
    """The table's row for the most specific type of `error`."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def dialect_of(path: str) -> Dialect:
    """The dialect that a path speaks."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if path == "/v1" or path.startswith("/v1/") else "tgi"


def message_of(error: Exception) -> str:
    """Bounded, printable text. The text of an error that we did not raise on purpose is not shown."""
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


def error_body(
    error: Exception, path: str, request_id: str | None = None
) -> ErrorResponse | OpenAIErrorResponse | AnthropicErrorResponse:
    """The error in the dialect of `path`; also the payload of an error event inside a stream."""
    row, message, dialect = row_of(error), message_of(error), dialect_of(path)
    if dialect == "tgi":
        return ErrorResponse(error=message, error_type=row.error_type)
    if dialect == "anthropic":
        details = AnthropicErrorDetails(type=row.anthropic_type, message=message)
        identity = {} if request_id is None else {"request_id": request_id}
        return AnthropicErrorResponse(type="error", error=details, **identity)
    param = getattr(error, "param", None)
    return OpenAIErrorResponse(
        error=OpenAIErrorDetails(message=message, type=row.openai_type, param=param, code=row.openai_code)
    )


def error_response(error: Exception, path: str, request_id: str | None = None) -> ModelResponse:
    """The response that a client gets for `error`."""
    headers = dict(getattr(error, "headers", {}))
    retry_after = getattr(error, "retry_after_seconds", None)
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, round(retry_after)))
    return ModelResponse(
        error_body(error, path, request_id), status_code=row_of(error).status_in(dialect_of(path)), headers=headers
    )


def validation_failed(error: ValidationError) -> ValidationFailed:
    """The refusal that names the wrong fields and the wanted values, in our words and without the client's values."""
    problems: list[str] = []
    found = error.errors(include_input=False, include_url=False, include_context=False)
    places = [_path(problem["loc"] + ("type",) * (problem["type"] == WRONG_TYPE)) for problem in found]
    for problem, place in zip(found, places, strict=True):
        wanted = "is not a known parameter" if problem["type"] == "extra_forbidden" else problem["msg"]
        wanted = _OF_PYTHON.sub("an object", wanted)
        problems.append(f"`{place}`: {wanted.removeprefix('Value error, ')}" if place else wanted)
    shown = "; ".join(dict.fromkeys(problems[:5]))
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return ValidationFailed(shown + more, param=places[0] or None)


def _path(parts: Sequence[int | str]) -> str:
    """Where a value stands in the body, as in `messages[0].role`."""
    real = [part for part in parts if isinstance(part, int) or not (part == "[key]" or part.startswith(KIND))]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in real)
    return text.removeprefix(".")


def _printable(part: str) -> str:
    """A field's name for a message. A name that the client made up is shown only if it looks like a name."""
    plain = part.isascii() and len(part) <= 40 and all(char.isalnum() or char in "_-." for char in part)
    return part if plain else "(unprintable name)"
