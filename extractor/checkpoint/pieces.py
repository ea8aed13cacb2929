"""The pieces that a store's files are put together from: plain data, so that a finished store needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from extractor.checkpoint.tensor_file import TensorEntry


@dataclass(frozen=True, slots=True)
class CopiedPiece:
    """`num_bytes` bytes that stand in `source`, from the file offset `offset` on."""

    source: TensorEntry
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ConvertedPiece:
    """`num_bytes` bytes that `load` reads and converts; it uses host memory of about twice as much."""

    num_bytes: int
    load: Callable[[], memoryview]


Piece = CopiedPiece | ConvertedPiece
