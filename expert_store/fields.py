"""Strict reading of a parsed JSON document.

`Fields` wraps one JSON object. Every access names a key and the type that it must have; `finish()` refuses keys that
nobody asked for. Every refusal says where in the document it happened, what was found and what was wanted.
"""

from __future__ import annotations

import re
from typing import Any

from expert_store.errors import ManifestError

MAX_INTEGER = 2**62


class Fields:
    """One JSON object of the manifest, read key by key; `where` is its path in the document, for messages."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where or 'the document'} is {_kind(value)}, wanted an object{REMEDY}")
        self.where = where
        self._value: dict[str, Any] = value
        self._seen: set[str] = set()

    def take(self, key: str) -> Any:
        """The raw value of `key`, which must be there."""
        if key not in self._value:
            raise ManifestError(f"{self.path(key)} is missing{REMEDY}")
        self._seen.add(key)
        return self._value[key]

    def has(self, key: str) -> bool:
        """Whether the object has `key`."""
        return key in self._value

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def string(self, key: str, pattern: str | None = None, max_length: int = 4096) -> str:
        value = self.take(key)
        if not isinstance(value, str) or len(value) > max_length:
            raise ManifestError(f"{self.path(key)} is {_kind(value)}, wanted a string of at most {max_length}{REMEDY}")
        if pattern is not None and re.fullmatch(pattern, value) is None:
            raise ManifestError(f"{self.path(key)} is {value[:80]!r}, wanted something like {pattern}{REMEDY}")
        return value

    def integer(self, key: str, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        return check_integer(self.take(key), self.path(key), minimum, maximum)

    def integers(self, key: str, minimum: int = 0, maximum: int = MAX_INTEGER) -> tuple[int, ...]:
        path = self.path(key)
        return tuple(check_integer(item, f"{path}[{i}]", minimum, maximum) for i, item in enumerate(self.array(key)))

    def array(self, key: str) -> list[Any]:
        value = self.take(key)
        if not isinstance(value, list):
            raise ManifestError(f"{self.path(key)} is {_kind(value)}, wanted a list{REMEDY}")
        return value

    def strings(self, key: str, pattern: str) -> tuple[str, ...]:
        values = self.array(key)
        for i, value in enumerate(values):
            if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
                raise ManifestError(f"{self.path(key)}[{i}] is {value!r}, wanted something like {pattern}{REMEDY}")
        return tuple(values)

    def child(self, key: str) -> Fields:
        return Fields(self.take(key), self.path(key))

    def children(self, key: str) -> list[Fields]:
        return [Fields(item, f"{self.path(key)}[{i}]") for i, item in enumerate(self.array(key))]

    def mapping(self, key: str) -> dict[str, Any]:
        """A free-form object, returned as it is."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise ManifestError(f"{self.path(key)} is {_kind(value)}, wanted an object{REMEDY}")
        return value

    def finish(self) -> None:
        """Refuse keys that were not read: an unknown key may change the meaning of the known ones."""
        unknown = sorted(set(self._value) - self._seen)
        if unknown:
            raise ManifestError(f"{self.where or 'the document'} has the unknown key(s) {', '.join(unknown)}{REMEDY}")


REMEDY = "; the manifest was damaged or written by another program: extract the store again"


def check_integer(value: Any, path: str, minimum: int, maximum: int) -> int:
    """`value` if it is an int (not a bool, not a float) within the bounds, else ManifestError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ManifestError(f"{path} is {_kind(value)}, wanted an integer{REMEDY}")
    if not minimum <= value <= maximum:
        raise ManifestError(f"{path} is {value}, wanted {minimum} to {maximum}{REMEDY}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}"[:60])
