"""A shard, which is the file of one deep expert, and the shards that a store has open.

A shard is a valid safetensors file (https://github.com/huggingface/safetensors#format) whose header is a pure function
of the manifest: tensors `layers.{model_layer}.{name}` in span order, metadata with the deep expert's index and experts,
padded with spaces so that the data begins at a multiple of 4096. Invariants: the header is compared byte for byte, so a
truncated, altered or swapped file is found before any of its data is used; a descriptor in use is never closed.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expert_store.errors import ManifestError, ShardCorruptError
from expert_store.files import open_checked
from expert_store.manifest import DeepExpert, LayerSpec

SHARD_FORMAT = "deepfew-shard"
SHARD_VERSION = 1
DATA_ALIGNMENT = 4096
"""Data begins at a multiple of this, so that direct I/O and page-wise reads of the first span start on a page."""


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
                f"{layout.data_offset} and {layout.file_bytes}; the manifest was damaged: extract into "
                "an empty directory"
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
                dtype, shape = tensor.stored
                entries[f"layers.{spec.model_layer}.{tensor.name}"] = {
                    "dtype": dtype,
                    "shape": list(shape),
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
            f"{root / deep.file} cannot be read: {error.strerror}; check the disk, restore the file, or extract "
            "into an empty directory"
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


class _OpenShard:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0


class OpenShards:
    """Descriptors of shards, by the deep expert's index. All methods may be called from any thread.

    Args:
        root: the store.
        max_open_files: most files that stay open while they are not in use.
    """

    def __init__(self, root: Path, max_open_files: int) -> None:
        self._root = root
        self._max_open_files = max_open_files
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._forgotten: set[int] = set()
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def opened(self, deep: DeepExpert, layout: ShardLayout) -> Iterator[int]:
        """The descriptor of a checked shard, not closed while in use; the least recently used idle ones are closed.

        Raises:
            ManifestError: `close` was called. ShardCorruptError: not the file that the manifest names.
        """
        with self._lock:
            if self._closed:
                raise ManifestError(f"{self._root}: the store was closed; open it again")
            shard = self._open.get(deep.index)
            if shard is None:
                shard = self._open[deep.index] = _OpenShard(open_shard(self._root, deep, layout))
            self._open.move_to_end(deep.index)
            shard.users += 1
            self._close_idle()
        try:
            yield shard.descriptor
        finally:
            with self._lock:
                shard.users -= 1
                self._close_idle()

    def forget(self, indices: Iterable[int]) -> None:
        """Close the shards of deep experts that are gone for good, those in use when they no longer are."""
        with self._lock:
            self._forgotten.update(index for index in indices if index in self._open)
            self._close_idle()

    def close(self) -> None:
        """Close everything; reads in flight finish first, later ones raise."""
        with self._lock:
            self._closed = True
            self._close_idle()

    def _close_idle(self) -> None:
        excess = len(self._open) if self._closed else max(0, len(self._open) - self._max_open_files)
        if not excess and not self._forgotten:
            return
        idle = [index for index, shard in self._open.items() if shard.users == 0]
        for index in dict.fromkeys([*idle[:excess], *(index for index in idle if index in self._forgotten)]):
            os.close(self._open.pop(index).descriptor)
            self._forgotten.discard(index)
