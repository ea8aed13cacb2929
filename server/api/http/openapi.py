"""The OpenAPI document: bodies that we read ourselves, the error responses of every route, and the key.

FastAPI knows neither the bodies (`body.py` parses them, more strictly than it would) nor the errors, so both are put in
here; `tests` hold the document against the running server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

Responses = dict[int | str, dict[str, Any]]
ADMIN_TAG = "admin"
"""Routes that need the admin key."""
REF = "#/components/schemas/{model}"
POST_ERRORS = {
    400: "The body is not a JSON document, or (under /v1) a value is not taken.",
    404: "Nothing of that name.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    415: "The body is not application/json.",
    422: "A value or a parameter that is not taken.",
    424: "The generation failed.",
    429: "The queue is full; see Retry-After.",
    500: "The generation broke off.",
    503: "No requests are taken now: loading, draining or failed; or memory did not suffice.",
}


def responses(success: type[BaseModel] | None, error: type[BaseModel], *, stream: str | None = None) -> Responses:
    """Responses of a route that takes a body and generates.

    Args:
        success: of an answer without a stream, if there is one.
        error: of every refusal.
        stream: name of the model of a stream's events; empty where there is a stream without one.
    """
    content: dict[str, Any] = {}
    if success is not None:
        content["application/json"] = {"schema": {"$ref": REF.format(model=success.__name__)}}
    if stream is not None:
        data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json"}
        if stream:
            data["contentSchema"] = {"$ref": REF.format(model=stream)}
        content["text/event-stream"] = {"schema": {"type": "object", "properties": {"data": data}}}
    found: Responses = {200: {"description": "Generated.", "content": content}}
    for status, text in POST_ERRORS.items():
        found[status] = error_response_of(error, text)
    return found


def error_response_of(error: type[BaseModel], text: str) -> dict[str, Any]:
    """One documented error response."""
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": REF.format(model=error.__name__)}}},
    }


def install_openapi(
    app: FastAPI,
    *,
    bodies: dict[str, type[BaseModel]],
    models: list[type[BaseModel]],
    key_error: type[BaseModel],
    openai_key_error: type[BaseModel],
    has_key: bool,
    has_admin_key: bool,
    optional_bodies: frozenset[str],
    open_paths: frozenset[str],
    model_name: Callable[[], str | None],
) -> None:
    """Complete the document that FastAPI makes.

    Args:
        bodies: path → model of the JSON body of its POST.
        models: other models that responses refer to.
        key_error, openai_key_error: shape of the 401 in either dialect.
        has_key: whether a key guards the routes; has_admin_key: whether one opens those of `ADMIN_TAG`.
        optional_bodies: paths whose body may be left out.
        open_paths: routes that need no key.
        model_name: of the model that is served, None while it loads.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        app.openapi_schema = None
        document = build()
        inputs = list(dict.fromkeys(bodies.values()))
        outputs = [model for model in dict.fromkeys([*models, key_error, openai_key_error]) if model not in inputs]
        _, definitions = models_json_schema(
            [(model, "validation") for model in inputs] + [(model, "serialization") for model in outputs],
            ref_template=REF,
        )
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        if (name := model_name()) is not None:
            for body in inputs:
                if "model" in body.model_fields:
                    schemas[body.__name__]["properties"]["model"] = {"enum": [name]}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]  # FastAPI's, for path parameters that cannot be wrong
                if method == "post" and path in bodies:
                    schema = {"$ref": REF.format(model=bodies[path].__name__)}
                    content = {"application/json": {"schema": schema}}
                    operation["requestBody"] = {"required": path not in optional_bodies, "content": content}
                if has_key and path not in open_paths:
                    error = openai_key_error if path.startswith("/v1/") else key_error
                    operation["responses"]["401"] = error_response_of(error, "The API key is missing or wrong.")
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
