"""Tensors of the trunk's files, and linear layers that a store holds in 8 bits: as shipped, or made by row.

Such a layer is two tensors, E4M3 codes under the weight's own name and their scales beside it, as releases in FP8 have
them; a value is code * scale. Invariant: `Checkpoint.open` of the trunk's folder recognises both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from extractor.checkpoint.quantised import QuantisedEntry, piece_of, read_part
from extractor.checkpoint.tensor_file import ConvertedPiece, Piece, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an output file; `dtype` is a safetensors name, and the pieces have together `num_bytes` bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    pieces: Callable[[], Iterator[Piece]]

    @classmethod
    def of(cls, entry: TensorEntry) -> OutputTensor:
        """The tensor as the checkpoint has it, dequantised if it is quantised there."""
        return cls(entry.name, entry.dtype, entry.shape, entry.bytes, lambda: iter((piece_of(entry),)))


def shipped_tensors(entry: TensorEntry) -> list[OutputTensor]:
    """The tensors that the checkpoint has for a layer that `is_eight_bit`."""
    assert isinstance(entry, QuantisedEntry), f"{entry.name} is plain"
    return [OutputTensor.of(part) for part in entry.encoding.parts.values()]


def made_tensors(entry: TensorEntry) -> list[OutputTensor]:
    """Codes and scales of a plain matrix [O, N], made by row."""
    stem, rows = entry.name.removesuffix(".weight"), entry.shape[0]
    codes, scales = partial(_bytes_of, entry, 0), partial(_bytes_of, entry, 1)
    num_codes = rows * entry.shape[1]
    return [
        OutputTensor(entry.name, "F8_E4M3", entry.shape, num_codes, lambda: iter((ConvertedPiece(num_codes, codes),))),
        OutputTensor(
            f"{stem}.weight_scale", "F32", (rows, 1), 4 * rows, lambda: iter((ConvertedPiece(4 * rows, scales),))
        ),
    ]


def made_by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes [O, N] and fp32 scales [O, 1] of a matrix [O, N]: a row's largest value becomes the largest code."""
    import torch

    scales = weight.float().abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight.float() / scales).to(torch.float8_e4m3fn), scales


def _bytes_of(entry: TensorEntry, which: int) -> memoryview:
    import torch

    made = made_by_row(read_part(entry))[which]
    return memoryview(made.contiguous().view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]
