"""JSON Schemas as they are given to llguidance, and the place in a schema that it refuses.

Invariant: a keyword is left out only where JSON Schema itself says that it constrains nothing: a `format` that is not
among those known. Source: JSON Schema 2020-12, and `items` as a list and `definitions` of its older drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any] | bool

KNOWN_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
"""Formats that llguidance enforces."""
MAX_DEPTH = 128
MAX_PROBES = 256
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(place, schema) of each schema directly within another one, as `("properties", "age")`; definitions first."""
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            yield from (((key, name), each) for name, each in schema[key].items())
    for key in _ONE:
        if isinstance(schema.get(key), (dict, bool)):
            yield (key,), schema[key]
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from (((key, at), each) for at, each in enumerate(schema[key]))


def enforceable(schema: Any, depth: int = 0) -> Any:
    """A copy without unknown formats, which are annotations.

    Raises:
        RecursionError: it nests more than `MAX_DEPTH` deep.
    """
    if not isinstance(schema, Mapping):
        return schema
    if depth > MAX_DEPTH:
        raise RecursionError(f"nested more than {MAX_DEPTH} deep")
    copy = {key: value for key, value in schema.items() if key != "format" or value in KNOWN_FORMATS}
    for place, each in subschemas(schema):
        inner = enforceable(each, depth + 1)
        if len(place) == 1:
            copy[str(place[0])] = inner
            continue
        key, at = place
        if copy[str(key)] is schema[str(key)]:
            held = schema[str(key)]
            copy[str(key)] = list(held) if isinstance(held, list) else dict(held)
        copy[str(key)][at] = inner
    return copy


def refused_place(schema: Schema, reason: str, reason_of: Callable[[Schema], str]) -> tuple[str | int, ...]:
    """The place of the innermost schema that is refused for `reason`; empty if that is the whole schema.

    Args:
        reason_of: the reason for which a schema by itself is refused; empty if it is not.
    """
    root = schema if isinstance(schema, Mapping) else {}
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    place: tuple[str | int, ...] = ()
    probes = MAX_PROBES
    found = True
    while found and isinstance(schema, Mapping):
        found = False
        for inner, each in subschemas(schema):
            if probes == 0:
                return place
            probes -= 1
            if reason_of({**definitions, **each} if isinstance(each, Mapping) else each) == reason:
                place, schema, found = (*place, *inner), each, True
                break
    return place


def shown(place: tuple[str | int, ...]) -> str:
    """A place for a message, as `properties.age.items`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
