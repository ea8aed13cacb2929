"""Encodings of an expert's matrix in fewer bits: the bytes of one output row, and the values that they stand for.

A matrix [O, N] is O rows of `row_bytes` bytes. A row holds its codes, then its overall scale, its scales and its zero
points, then zeros up to a multiple of 16 bytes: a tile of rows is one range of bytes, for a disk, for PCIe and for a
kernel alike. A value is (code - zero) * scale, the scale first multiplied or divided by the overall one, in float32.
`expert_store.rows` packs and reads rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

ROW_ALIGNMENT = 16
"""Bytes: the widest load of a GPU."""
ROW_GROUP_COLUMNS = 8
"""A row has a multiple of so many columns, and so has a group of them."""

CODE_BITS = {"fp8": 8, "int8": 8, "fp4": 4, "int4": 4}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I16": 2}


@dataclass(frozen=True, slots=True)
class RowEncoding:
    """The encoding of a matrix.

    Attributes:
        codes: fp8 is E4M3 and fp4 E2M1; integers are unsigned, with their zero point in the middle if `zeros` is None.
            Of two four-bit codes in a byte, the low nibble comes first.
        group: columns that share a scale and a zero point.
        scales: dtype of the scales; an F8_E8M0 is a power of two.
        zeros: dtype of the zero points, one for each scale.
        overall: each row has an F32 beside its scales, which multiplies or divides them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    codes: Literal["fp8", "int8", "fp4", "int4"]
    group: Annotated[int, Field(ge=ROW_GROUP_COLUMNS, le=1 << 24)]
    scales: Literal["F32", "F16", "BF16", "F8_E4M3", "F8_E8M0"]
    zeros: Literal["U8", "I16"] | None = None
    overall: Literal["factor", "divisor"] | None = None

    def fields(self, columns: int) -> dict[str, tuple[int, int]]:
        """Byte offset and number of elements of each field of a row of `columns` values.

        Raises ValueError if the groups do not divide the columns.
        """
        if columns % self.group or columns % ROW_GROUP_COLUMNS:
            raise ValueError(f"rows of {columns} columns in groups of {self.group}: wanted whole groups and bytes")
        groups = columns // self.group
        sizes = {"codes": (columns * CODE_BITS[self.codes] // 8, 1)}
        if self.overall is not None:
            sizes["overall"] = (1, 4)
        sizes["scales"] = (groups, _BYTES[self.scales])
        if self.zeros is not None:
            sizes["zeros"] = (groups, _BYTES[self.zeros])
        found, at = {}, 0
        for name, (count, size) in sizes.items():
            at += -at % size
            found[name] = (at, count)
            at += count * size
        return found

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` values."""
        at, groups = self.fields(columns)["zeros" if self.zeros else "scales"]
        end = at + groups * _BYTES[self.zeros or self.scales]
        return end + -end % ROW_ALIGNMENT

    def bits(self, columns: int) -> float:
        """Bits of one value, with its share of scales and padding."""
        return 8.0 * self.row_bytes(columns) / columns

    @property
    def middle(self) -> int:
        """The zero point of integer codes without zero points of their own; 0 for floating point codes."""
        return 1 << (CODE_BITS[self.codes] - 1) if self.codes.startswith("int") else 0

    def __str__(self) -> str:
        return f"{self.codes} in groups of {self.group}{' with zero points' if self.zeros else ''}"
