"""Safetensors files of a checkpoint: their headers, checked before any data is read, and the pieces of output files.

Invariant: the tensors of a `TensorFile` lie inside the file, do not overlap, and have the bytes that shape and dtype
need. Format: https://github.com/huggingface/safetensors#format. Files are read with pread, never mapped, so that memory
stays bounded and a file that shrinks is an error and not a signal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_store.manifest import DTYPE_BYTES
from extractor.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 10**6
"""The limit that the safetensors library sets itself."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a checkpoint: `offset` is from the beginning of `path`, `dtype` a safetensors name."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file with its raw header (length field included) and tensors in file order."""

    path: Path
    file_bytes: int
    header: bytes
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class CopiedPiece:
    """`num_bytes` bytes of an output file that are those of `source`'s file, from the offset `offset` on."""

    source: TensorEntry
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ConvertedPiece:
    """`num_bytes` bytes that `load` reads and converts; it uses about twice as much host memory."""

    num_bytes: int
    load: Callable[[], memoryview]


Piece = CopiedPiece | ConvertedPiece


REMEDY = "copy or download the file again, or have the program that wrote it write it again"


def read_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of `path`. Raises CheckpointError, naming the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{path} has {size} bytes and claims a header of {length}; it is truncated or no safetensors file: "
                    + REMEDY
                )
            header = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy or download the whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check the disk and its permissions") from error
    tensors = _parse(path, header, 8 + length)
    end = max((tensor.offset + tensor.bytes for tensor in tensors), default=8 + length)
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{path} is {what}: it has {size} bytes, its header needs {end}; {REMEDY}")
    return TensorFile(path, size, prefix + header, tensors)


def read_bytes(entry: TensorEntry, offset: int, num_bytes: int) -> bytearray:
    """`num_bytes` from byte `offset` of the file of `entry`. Raises CheckpointError when the file became shorter."""
    memory = bytearray(num_bytes)
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < num_bytes:
            count = os.preadv(descriptor, [memoryview(memory)[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{entry.path} became shorter while it was read; run again when nothing writes to it"
                )
            done += count
    finally:
        os.close(descriptor)
    return memory


def _parse(path: Path, header: bytes, data_offset: int) -> tuple[TensorEntry, ...]:
    try:
        document = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error}); {REMEDY}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is no JSON object; {REMEDY}")
    tensors = [_entry(path, name, fields, data_offset) for name, fields in document.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.bytes))
    end = data_offset
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {tensor.name} begins at byte {tensor.offset}, wanted {end}; its tensors overlap or leave "
                f"holes: {REMEDY}"
            )
        end += tensor.bytes
    return tuple(tensors)


def _entry(path: Path, name: str, fields: Any, data_offset: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed; {REMEDY}") from None
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: {name} has the dtype {dtype!r}, wanted one of {', '.join(DTYPE_BYTES)}; "
            "use a checkpoint in one of these (bfloat16 is the usual one)"
        )
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: {name} has impossible sizes {numbers}; {REMEDY}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: {name} takes {end - begin} bytes, its shape {list(shape)} and dtype {dtype} need "
            f"{math.prod(shape) * DTYPE_BYTES[dtype]}; {REMEDY}"
        )
    return TensorEntry(name, path, dtype, shape, data_offset + begin, end - begin)
