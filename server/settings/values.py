"""Values that people write in settings: sizes such as 8GiB, and amounts of memory such as 8GiB or 25%.

Invariant: a parsed value prints as a text that parses to the same value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes of `8GiB`, `1.5 GB`, `512MiB`, `4096`; a lone K, M, G or T is binary.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match.group(2).lower() not in units:
        raise ValueError(f"{text[:40]!r} is not a size; write it like 8GiB, 512MiB or 4096")
    num_bytes = int(float(match.group(1)) * units[match.group(2).lower()])
    if num_bytes < 1:
        raise ValueError(f"{text[:40]!r} is less than one byte")
    return num_bytes


@dataclass(frozen=True, slots=True)
class MemoryAmount:
    """Memory as bytes, or as a share of all that there could be; exactly one of the two is set."""

    num_bytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | int) -> MemoryAmount:
        """`8GiB`, `25%`, or a number of bytes.

        Raises:
            ValueError: neither a size nor a percentage in (0, 100].
        """
        if isinstance(text, int):
            text = str(text)
        if text.strip().endswith("%"):
            try:
                percent = float(text.strip()[:-1])
            except ValueError:
                percent = 0.0
            if not 0 < percent <= 100:
                raise ValueError(f"{text[:40]!r} is not a percentage above 0 and at most 100")
            return cls(share=percent / 100)
        return cls(num_bytes=parse_size(text))

    def resolve(self, total_bytes: int) -> int:
        """Bytes, where a share is of `total_bytes`."""
        return self.num_bytes if self.num_bytes is not None else round((self.share or 0.0) * total_bytes)

    def __str__(self) -> str:
        if self.share is not None:
            return f"{self.share * 100:.10g}%"
        return str(self.num_bytes)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> MemoryAmount:
            if isinstance(value, MemoryAmount):
                return value
            if isinstance(value, (str, int)) and not isinstance(value, bool):
                return cls.parse(value)
            raise ValueError("write it like 8GiB or 25%")

        return core_schema.no_info_plain_validator_function(validate)
