"""Values in settings: devices, dtypes, and amounts of memory such as 8GiB or 25%.

Invariant: a parsed value prints as a text that parses to the same value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from extractor.planning.sizes import parse_share, parse_size

_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)


def parse_device(text: str) -> str:
    """`auto` (a GPU where there is one), `cpu`, `cuda`, or a GPU by its number such as `cuda:1`.

    Raises:
        ValueError: none of these. Whether the machine has the device is known only to `resolve_device`.
    """
    if _DEVICE.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is no device; write auto, cpu, cuda, or a GPU by its number such as cuda:1")
    return text


Device = Annotated[str, AfterValidator(parse_device)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class MemoryAmount:
    """Memory as bytes, or as a share of a total; exactly one of the two is set."""

    num_bytes: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str | int) -> MemoryAmount:
        """`8GiB`, `25%`, or a number of bytes.

        Raises:
            ValueError: neither a size nor a percentage above 0 and at most 100.
        """
        if isinstance(text, int):
            text = str(text)
        if text.strip().endswith("%"):
            return cls(share=parse_share(text))
        return cls(num_bytes=parse_size(text))

    def resolve(self, total_bytes: int) -> int:
        """The amount in bytes; a share is of `total_bytes`."""
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
