"""A shard: the file of one deep expert.

A valid safetensors file (https://github.com/huggingface/safetensors#format) whose header is a pure function of the
manifest: tensors `layers.{model_layer}.{name}` in span order, metadata with the deep expert's index and experts, padded
with spaces so that the data begins at a multiple of 4096. Invariant: because every header byte is predictable, a
truncated, altered or swapped file is told by comparison, before any of its data is believed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expert_store.errors import ManifestError, ShardCorruptError
from expert_store.manifest import DeepExpert, LayerSpec

SHARD_FORMAT = "deepfew-shard"
SHARD_VERSION = 1
DATA_ALIGNMENT = 4096
"""Data begins at a multiple of this, so that direct I/O and page-wise reads of the first span start on a page."""
MAX_READ_CALL_BYTES = 2**30


def shard_name(index: int) -> str:
    """The path below the store of deep expert `index`."""
    return f"experts/deep-{index:05d}.safetensors"


def encode_header(entries: Mapping[str, object]) -> bytes:
    """The beginning of a safetensors file: length field and header, padded so that data begins on a page."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class ShardLayout:
    """Where everything lies in the shard of deep expert `index` with `experts[layer]` of every MoE layer."""

    layers: tuple[LayerSpec, ...]
    index: int
    experts: tuple[int, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerSpec], deep: DeepExpert) -> ShardLayout:
        """The layout of `deep`; raises ManifestError when the manifest claims other offsets or sizes."""
        layout = cls(tuple(layers), deep.index, deep.experts)
        if (deep.data_offset, deep.bytes) != (layout.data_offset, layout.file_bytes):
            raise ManifestError(
                f"deep_experts[{deep.index}]: data_offset {deep.data_offset} and bytes {deep.bytes}, wanted "
                f"{layout.data_offset} and {layout.file_bytes}; the manifest was damaged: extract the store again"
            )
        return layout

    @cached_property
    def header(self) -> bytes:
        """The file's first `data_offset` bytes."""
        metadata = {
            "format": SHARD_FORMAT,
            "version": str(SHARD_VERSION),
            "index": str(self.index),
            "experts": ",".join(map(str, self.experts)),
        }
        entries: dict[str, object] = {"__metadata__": metadata}
        begin = 0
        for spec in self.layers:
            for tensor in spec.tensors:
                at = begin + tensor.offset
                entries[f"layers.{spec.model_layer}.{tensor.name}"] = {
                    "dtype": tensor.dtype,
                    "shape": list(tensor.shape),
                    "data_offsets": [at, at + tensor.bytes],
                }
            begin += spec.span_bytes
        return encode_header(entries)

    @cached_property
    def data_offset(self) -> int:
        """Bytes before the first span."""
        return len(self.header)

    @cached_property
    def span_offsets(self) -> tuple[int, ...]:
        """For each MoE layer the file offset at which its span begins."""
        offsets, at = [], self.data_offset
        for spec in self.layers:
            offsets.append(at)
            at += spec.span_bytes
        return tuple(offsets)

    @cached_property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.data_offset + sum(spec.span_bytes for spec in self.layers)


def resolve_inside(root: Path, name: str) -> Path:
    """The real path of `root/name`, where `root` is itself resolved.

    Raises ShardCorruptError when the file is missing or a symbolic link leads out of the store.
    """
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ShardCorruptError(
            f"{root / name}: the manifest names this file but it cannot be found ({error}); "
            "restore it, or extract into an empty directory"
        ) from None
    if not path.is_relative_to(root):
        raise ShardCorruptError(
            f"{root / name} is a link to {path}, outside the store; put the file itself there, or extract again"
        )
    return path


def open_checked(root: Path, name: str, size: int) -> int:
    """Open a file of the store for reading and return its descriptor (the caller closes it).

    Raises ShardCorruptError when it is missing, leads out of the store, is no regular file, or has not `size` bytes.
    """
    path = resolve_inside(root, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ShardCorruptError(f"{path} cannot be opened: {error.strerror}; check its permissions") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        os.close(descriptor)
        raise ShardCorruptError(
            f"{path} has {status.st_size} bytes, the manifest says {size}; the file was truncated or replaced: "
            "restore it, or extract into an empty directory"
        )
    return descriptor


def open_shard(root: Path, deep: DeepExpert, layout: ShardLayout) -> int:
    """Open the shard of `deep` after comparing its size and every header byte with the manifest.

    Returns a descriptor that the caller closes. Raises ShardCorruptError.
    """
    descriptor = open_checked(root, deep.file, deep.bytes)
    try:
        found = os.pread(descriptor, layout.data_offset, 0)
    except OSError as error:
        os.close(descriptor)
        raise ShardCorruptError(
            f"{root / deep.file} cannot be read: {error.strerror}; check the disk, restore the file, or extract again"
        ) from error
    if found != layout.header:
        os.close(descriptor)
        raise ShardCorruptError(
            f"{root / deep.file} does not begin with the header of deep expert {deep.index} "
            f"({_first_difference(found, layout.header)}); the file was altered or swapped with another: "
            "restore it, or extract into an empty directory"
        )
    return descriptor


def _first_difference(found: bytes, wanted: bytes) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} bytes read, wanted {len(wanted)}"
    at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"at byte {at} got {found[at : at + 16]!r}, wanted {wanted[at : at + 16]!r}"


def read_fully(descriptor: int, memory: memoryview, offset: int, where: str) -> None:
    """Fill `memory` from the file offset `offset` on. Raises ShardCorruptError, naming `where`."""
    done = 0
    while done < memory.nbytes:
        try:
            count = os.preadv(descriptor, [memory[done : done + MAX_READ_CALL_BYTES]], offset + done)
        except OSError as error:
            raise ShardCorruptError(
                f"{where} cannot be read: {error.strerror}; check the disk, restore the file, or extract again"
            ) from error
        if count == 0:
            raise ShardCorruptError(
                f"{where} ends after {offset + done} bytes, wanted {offset + memory.nbytes}; the file was truncated "
                "while it was open: restore it, or extract into an empty directory"
            )
        done += count
