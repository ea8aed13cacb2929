"""The store of a plan's trained experts: their shards, the trunk as it was, and the adapter that was trained with them.

Invariants: the store that they come from is only read; the manifest is written last, so a killed run leaves no store;
the same training gives the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expert_store.adapter import Adapter, Changes, remove_unnamed, write_adapter
from expert_store.errors import ShardCorruptError
from expert_store.files import sync_directory
from expert_store.manifest import (
    DTYPE_BYTES,
    MANIFEST_NAME,
    Alignment,
    LayerSpec,
    Manifest,
    Source,
    TensorSpec,
    Training,
    TrunkFile,
    write_manifest,
)
from expert_store.shard import ShardLayout, shard_name
from expert_store.store import Store
from extractor.checkpoint.tensor_file import ConvertedPiece, CopiedPiece, Piece, TensorEntry
from extractor.errors import DiskFullError, TargetError
from extractor.planning.sizes import format_size
from extractor.writing.disk import DISK_MARGIN_BYTES, free_bytes
from extractor.writing.outputs import OutputFile, shard_file
from extractor.writing.pipeline import stream
from server.model.seam.changed import changed, read_experts

ADAPTER = "trained"
"""The name of the adapter in such a store."""
FOLDERS = ("trunk", "experts", "adapters")


class TrainedStore:
    """The work of writing such a store.

    Args:
        store: holds the experts as they were.
        target: a new or empty directory, or one that a killed run left.
        deep_experts: the experts of each deep expert; transposed: whether the model's plain matrices have their input
            rows first.

    Raises:
        TargetError: `target` is something else. DiskFullError.
    """

    def __init__(
        self, store: Store, target: Path, deep_experts: Sequence[tuple[int, ...]], *, transposed: bool
    ) -> None:
        self._store, self._target, self._deep_experts = store, target, deep_experts
        self._transposed = transposed
        self.layers = tuple(_plain(spec, transposed) for spec in store.manifest.layers)
        self._shards = [ShardLayout(self.layers, at, experts) for at, experts in enumerate(deep_experts)]
        self._check_target()

    @property
    def total_bytes(self) -> int:
        """Bytes of its shards and its trunk."""
        trunk = sum(file.bytes for file in self._store.manifest.trunk)
        return trunk + sum(shard.file_bytes for shard in self._shards)

    def write(
        self, adapter: Adapter, changes: Changes, tokens: int, on_bytes: Callable[[int], None] | None = None
    ) -> Manifest:
        """Write the store; returns its manifest.

        Args:
            changes: of the experts of each layer in the order of their ids, as `expert_parameters` has them, on the
                CPU.
            tokens: that were trained.

        Raises:
            StoreError: an expert cannot be read; ShardCorruptError: the trunk was changed. OSError.
        """
        self._check_target()
        for folder in FOLDERS:
            (self._target / folder).mkdir(parents=True, exist_ok=True)
        before = self._store.manifest
        outputs = [*map(self._trunk_file, before.trunk), *(self._shard(shard, changes) for shard in self._shards)]
        digests = {digest.name: digest for digest in stream(outputs, self._target, on_bytes)}
        for file in before.trunk:
            if digests[file.name].sha256 != file.sha256:
                raise ShardCorruptError(f"{self._store.path / file.name} was changed: extract the store again")
        fingerprint = _fingerprint(before, adapter.changes, changes)
        entry = write_adapter(self._target, ADAPTER, replace(adapter, fingerprint=fingerprint))
        for name in (*FOLDERS, "."):
            sync_directory(self._target / name)
        manifest = replace(
            before,
            source=Source(before.source.name, fingerprint, before.source.location),
            layers=self.layers,
            alignment=Alignment("plan", {}),
            deep_experts=tuple(digests[shard_name(shard.index)].entry(shard) for shard in self._shards),
            retired_below=0,
            made=None,
            adapters=(entry,),
            trained=Training(before.source.fingerprint, tokens, ADAPTER),
        )
        write_manifest(self._target, manifest)
        remove_unnamed(self._target)
        return manifest

    def _check_target(self) -> None:
        target = self._target
        if target.exists() and not target.is_dir():
            raise TargetError(f"{target} is a file, and trained experts make a new store: name a new directory")
        held = sorted(path.name for path in target.iterdir() if path.name not in FOLDERS) if target.is_dir() else []
        if held:
            what = "a store" if MANIFEST_NAME in held else f"not empty (it holds {', '.join(held[:3])})"
            raise TargetError(f"{target} is {what}, and trained experts make a new store: name a new directory")
        free = free_bytes(target)
        if self.total_bytes + DISK_MARGIN_BYTES > free:
            raise DiskFullError(
                f"the disk of {target} is too small: the store of the trained experts has "
                f"{format_size(self.total_bytes)}, {format_size(free)} are free; make room, or name another disk"
            )

    def _trunk_file(self, file: TrunkFile) -> OutputFile:
        entry = TensorEntry(file.name, self._store.path / file.name, "U8", (file.bytes,), 0, file.bytes)
        return OutputFile(file.name, file.bytes, b"", lambda: iter((CopiedPiece(entry, 0, file.bytes),)))

    def _shard(self, shard: ShardLayout, changes: Changes) -> OutputFile:
        def span(layer: int, expert: int) -> Iterator[Piece]:
            spec = self.layers[layer]
            yield ConvertedPiece(spec.span_bytes, partial(self._span, spec, expert, changes))

        return shard_file(shard, span)

    def _span(self, spec: LayerSpec, expert: int, changes: Changes) -> memoryview:
        """The bytes of an expert of a layer with its change."""
        index = sorted(deep[spec.layer] for deep in self._deep_experts).index(expert)
        parts = []
        for name, value in read_experts(self._store, spec.layer, [expert], self._transposed).items():
            own = {part: one[index : index + 1] for part, one in changes.get(f"{spec.module}.{name}", {}).items()}
            new = changed(value, own) if own else value
            parts.append(new.contiguous().view(-1).view(torch.uint8))
        return memoryview(torch.cat(parts).numpy())  # type: ignore[arg-type]


def _plain(spec: LayerSpec, transposed: bool) -> LayerSpec:
    """The layout of a layer's span with its encoded tensors in the dtype that they are computed in."""
    tensors: list[TensorSpec] = []
    offset = 0
    for tensor in spec.tensors:
        is_turned = tensor.encoding is not None and transposed
        shape = tensor.shape[::-1] if is_turned else tensor.shape
        size = math.prod(shape) * DTYPE_BYTES[tensor.dtype]
        tensors.append(TensorSpec(tensor.name, tensor.dtype, shape, offset, size))
        offset += size
    return replace(spec, span_bytes=offset, tensors=tuple(tensors))


def _fingerprint(before: Manifest, *changes: Changes) -> str:
    """Of a checkpoint that has the trained experts and no others."""
    found: Any = hashlib.sha256(before.source.fingerprint.encode())
    for one in changes:
        for module in sorted(one):
            for part in sorted(one[module]):
                found.update(f"{module}.{part}".encode())
                found.update(one[module][part].contiguous().numpy().tobytes())
    return str(found.hexdigest())
