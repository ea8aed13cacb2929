"""Request bodies: limited in bytes, time and depth, strict JSON, strict types.

Invariant: a parsed body has no NaN, no infinity, no NUL, no lone surrogate, no duplicate key, and no value of another
type than the schema's. Python's parser and FastAPI accept all of these.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

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
"""A string, or one character of structure. An unclosed string runs to the end of the body, so the scan is linear."""
_LONG_BODY_BYTES = 64 * 2**10

Model = TypeVar("Model", bound=BaseModel)


async def read_model(
    request: Request, schema: type[Model], *, max_bytes: int, receive_seconds: float, optional: bool = False
) -> Model:
    """The body of `request` as a `schema`; with `optional` a missing body is an empty object.

    Raises:
        ApiError: the body is too long, too slow, not JSON, or does not fit the schema.
        ClientDisconnect: the client left.
    """
    if optional and request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers:
        return schema()
    body = await read_body(request, max_bytes=max_bytes, receive_seconds=receive_seconds)
    if len(body) > _LONG_BODY_BYTES:
        return await asyncio.to_thread(_parse, body, schema)
    return _parse(body, schema)


async def read_body(request: Request, *, max_bytes: int, receive_seconds: float) -> bytes:
    """The raw bytes, counted as they come. A declared length above `max_bytes` is refused at once."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("the body must be JSON: send the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("compressed bodies are not taken; send the body without Content-Encoding")
    return await receive_body(request, max_bytes=max_bytes, receive_seconds=receive_seconds)


async def receive_body(request: Request, *, max_bytes: int, receive_seconds: float) -> bytes:
    """As `read_body`, of any type."""
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
    """The value of a JSON document.

    Raises:
        MalformedBodyError: it is not RFC 8259's JSON, or uses what that standard leaves open.
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
