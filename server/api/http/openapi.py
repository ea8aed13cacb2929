"""The OpenAPI document: the request bodies, the error responses of every route, and the keys.

FastAPI knows neither the bodies, which `body.py` parses, nor the errors, so this module adds both. Invariant: the error
responses come from the table in `errors.py`. The tests compare the document with a running server.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.http.errors import (
    TABLE,
    AnthropicErrorResponse,
    BodyTooLargeError,
    Dialect,
    ErrorResponse,
    MalformedBodyError,
    MediaTypeError,
    OpenAIErrorResponse,
    SlowClientError,
    UnauthorizedError,
    ValidationFailed,
    dialect_of,
)
from server.engine.request import EngineError, GenerationError, MemoryExhaustedError, QueueFullError
from server.serving.service import NotReadyError

Responses = dict[int | str, dict[str, Any]]
ADMIN_TAG = "admin"
"""Routes that need the admin key."""
REF = "#/components/schemas/{model}"
_SHAPES: dict[Dialect, type[BaseModel]] = {
    "tgi": ErrorResponse,
    "openai": OpenAIErrorResponse,
    "anthropic": AnthropicErrorResponse,
}
_BODY_ERRORS = (MalformedBodyError, SlowClientError, BodyTooLargeError, MediaTypeError, ValidationFailed)
_GENERATION_ERRORS = (GenerationError, QueueFullError, EngineError, NotReadyError, MemoryExhaustedError)


def refusals(*errors: type[Exception], body: bool = False, dialect: Dialect = "tgi") -> Responses:
    """Documented error responses, from the table of errors.

    Args:
        errors: types that the route raises.
        body: the route takes a body.
        dialect: of the route.
    """
    texts: dict[int, list[str]] = {}
    for error in (*(_BODY_ERRORS if body else ()), *errors):
        row = TABLE[error]
        texts.setdefault(row.status_in(dialect), []).append(row.when)
    shape = _SHAPES[dialect]
    return {status: _documented(shape, " ".join(found)) for status, found in sorted(texts.items())}


def generation_responses(
    answer: type[BaseModel] | None,
    stream_event: type[BaseModel],
    *errors: type[Exception],
    dialect: Dialect = "tgi",
    ends_with_done: bool = False,
) -> Responses:
    """Documented responses of a route that generates.

    Args:
        answer: of a request without a stream; None where every answer is a stream.
        stream_event: of a stream.
        errors: types that the route raises beyond those of every generation.
        dialect: of the route.
        ends_with_done: whether a stream ends with `[DONE]`.
    """
    content: dict[str, Any] = {}
    if answer is not None:
        content["application/json"] = {"schema": {"$ref": REF.format(model=answer.__name__)}}
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
    if ends_with_done:  # `contentSchema` has no word for the end
        data["description"] = f"JSON of {REF.format(model=stream_event.__name__)}; [DONE] ends the stream"
    else:
        data["contentSchema"] = {"$ref": REF.format(model=stream_event.__name__)}
    content["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": data}}}
    return {
        200: {"description": "Generated.", "content": content},
        **refusals(*_GENERATION_ERRORS, *errors, body=True, dialect=dialect),
    }


def _documented(shape: type[BaseModel], text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": REF.format(model=shape.__name__)}}},
    }


def install_openapi(
    app: FastAPI,
    *,
    bodies: dict[str, type[BaseModel]],
    models: list[type[BaseModel]],
    has_key: bool,
    has_admin_key: bool,
    optional_bodies: frozenset[str],
    open_paths: frozenset[str],
) -> None:
    """Add to the document that FastAPI makes.

    Args:
        bodies: path → model of the JSON body of its POST.
        models: models that the responses refer to.
        has_key: whether a key guards the routes; has_admin_key: whether one opens those of `ADMIN_TAG`.
        optional_bodies: paths whose body may be left out.
        open_paths: routes that need no key.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        app.openapi_schema = None
        document = build()
        inputs = list(dict.fromkeys(bodies.values()))
        outputs: list[type[BaseModel]] = [*models, *_SHAPES.values()]
        _, definitions = models_json_schema(
            [(model, "validation") for model in inputs] + [(model, "serialization") for model in outputs],
            ref_template=REF,
        )
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]  # FastAPI adds it for path parameters, which cannot be wrong here
                if method == "post" and path in bodies:
                    schema = {"$ref": REF.format(model=bodies[path].__name__)}
                    content = {"application/json": {"schema": schema}}
                    operation["requestBody"] = {"required": path not in optional_bodies, "content": content}
                if has_key and path not in open_paths:
                    refused = refusals(UnauthorizedError, dialect=dialect_of(path))
                    operation["responses"] |= {str(status): text for status, text in refused.items()}
                    operation["security"] = [{"bearer": []}, {"header": []}]
                if has_admin_key and ADMIN_TAG in operation.get("tags", ()):
                    operation["security"] = [{"admin_bearer": []}, {"admin_header": []}]
        schemes = [("", "the key")] * has_key + [("admin_", "the admin key, for routes that change the server")] * (
            has_admin_key
        )
        if schemes:
            components["securitySchemes"] = {}
        for prefix, text in schemes:
            components["securitySchemes"] |= {
                f"{prefix}bearer": {"type": "http", "scheme": "bearer", "description": text},
                f"{prefix}header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": text},
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]
