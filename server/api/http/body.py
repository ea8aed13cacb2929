"""The request body: bounded in bytes, time and depth, strictly JSON, strictly typed.

Invariant: what leaves here holds no NaN, no infinity, no NUL, no lone surrogate, no key given twice and no value of a
type other than the schema's. The standard parser and FastAPI accept all of these.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.api.http.errors import (
    BodyTooLargeError,
    MalformedBodyError,
    MediaTypeError,
    SlowClientError,
    validation_failed,
)

MAX_DEPTH = 32
MAX_DIGITS = 40
MAX_VALUES = 100_000
MAX_EXACT = 2**53
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{\]},]', re.DOTALL)
"""A string (or the rest of the body, where one is not closed: the scan stays linear), or a character of structure."""
_LONG_BODY_BYTES = 64 * 2**10

Model = TypeVar("Model", bound=BaseModel)


async def read_model(
    request: Request, schema: type[Model], *, max_bytes: int, receive_seconds: float, optional: bool = False
) -> Model:
    """The body of `request` as a `schema`; with `optional` a body that is left out is an empty object.

    Raises:
        ApiError: one of its kinds; the body is too long, too slow, not JSON, or not what the schema wants.
        ClientDisconnect: the client left.
    """
    if optional and request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return schema()
    body = await read_body(request, max_bytes=max_bytes, receive_seconds=receive_seconds)
    if len(body) > _LONG_BODY_BYTES:
        return await asyncio.to_thread(_parse, body, schema)
    return _parse(body, schema)


async def read_body(request: Request, *, max_bytes: int, receive_seconds: float) -> bytes:
    """The raw bytes, counted as they arrive; a declared length over the bound is refused before anything is read."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON: send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("compressed bodies are not taken; send the body without Content-Encoding")
    too_large = BodyTooLargeError(f"the body is longer than {max_bytes} bytes", headers={"Connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(receive_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {receive_seconds:g} s"
        raise SlowClientError(message, headers={"Connection": "close"}) from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parse strictly.

    Raises:
        MalformedBodyError: anything that RFC 8259 leaves out or leaves open.
    """
    if not body.strip():
        raise MalformedBodyError("the body is empty; a JSON object is wanted")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"the body is not UTF-8 (at byte {error.start})") from None
    if text.startswith("\ufeff"):
        raise MalformedBodyError("the body starts with a byte order mark; send UTF-8 without one")
    _check_depth(body)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_short_int,
        )
    except json.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is not JSON (at character {error.pos})") from None
    except RecursionError:
        raise MalformedBodyError(f"the body is nested deeper than {MAX_DEPTH} levels") from None


def _parse(body: bytes, schema: type[Model]) -> Model:
    try:
        return schema.model_validate(parse_json(body), strict=True)
    except ValidationError as error:
        raise validation_failed(error) from None


def _check_depth(body: bytes) -> None:
    depth = 0
    for count, match in enumerate(_STRUCTURE.finditer(body)):
        if count > MAX_VALUES:
            raise MalformedBodyError(f"the body has more than {MAX_VALUES} values")
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise MalformedBodyError(f"the body is nested deeper than {MAX_DEPTH} levels")
        elif first in b"]}":
            depth -= 1


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise MalformedBodyError("a key is given twice in one object")
    return values


def _refuse_constant(name: str) -> float:
    raise MalformedBodyError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedBodyError("a number is too large")
    # JSON has one kind of number: 2.0 is the integer 2, as JSON Schema says as well.
    return int(value) if value.is_integer() and abs(value) <= MAX_EXACT else value


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise MalformedBodyError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


__all__ = ["ClientDisconnect", "parse_json", "read_body", "read_model"]
