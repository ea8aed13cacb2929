"""Verifies the files of a store against their hashes, and against the checkpoint.

Invariant: every file that the manifest names is read and hashed; against a checkpoint, every file is produced again
from it (in memory, not on disk) and must have the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from expert_store.integrity import verify_files
from expert_store.manifest import Manifest, ModelSpec, format_ids, read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import MismatchError
from extractor.writing.outputs import OutputFile, all_trunk_outputs, shard_output
from extractor.writing.pipeline import FileDigest, stream

if TYPE_CHECKING:
    from extractor.checkpoint.layout import ExpertsLayout

MAX_REPORTED = 10


def verify_store(path: str | os.PathLike[str], on_bytes: Callable[[int], None] | None = None) -> int:
    """Hash every file of the store at `path`; returns the bytes read.

    Raises ManifestError, or one ShardCorruptError that names every bad file.
    """
    root = Path(path).resolve()
    return verify_files(root, read_manifest(root), on_bytes)


def verify_against(
    path: str | os.PathLike[str], checkpoint: Checkpoint, on_bytes: Callable[[int], None] | None = None
) -> int:
    """Compare every file's hash in the manifest of the store at `path` with the file that `checkpoint` gives.

    Together with `verify_store` this proves equality bit for bit. The checkpoint's division into files does not matter.
    Returns the bytes compared. Raises MismatchError, naming layers and experts that differ.
    """
    return open_comparison(path, checkpoint).run(on_bytes)


@dataclass(frozen=True)
class Comparison:
    """A store and a checkpoint of the same model, ready to be compared."""

    path: str | os.PathLike[str]
    checkpoint: Checkpoint
    manifest: Manifest
    outputs: list[OutputFile]

    def run(self, on_bytes: Callable[[int], None] | None = None) -> int:
        """Compare; see `verify_against`."""
        problems, total = [], 0
        for digest in stream(self.outputs, None, on_bytes):
            total += digest.file_bytes
            problems += _differences(self.manifest, digest)
        listed = {file.name for file in self.manifest.trunk}
        made = {output.name for output in self.outputs}
        problems += [f"{name} is not in the checkpoint" for name in sorted(listed - made)]
        if problems:
            more = f"\n… and {len(problems) - MAX_REPORTED} more" if len(problems) > MAX_REPORTED else ""
            raise MismatchError(
                f"{self.path} differs from {self.checkpoint.path}:\n" + "\n".join(problems[:MAX_REPORTED]) + more + "\n"
                "it was extracted from another version of the checkpoint: extract this one into an empty directory"
            )
        return total


def open_comparison(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Comparison:
    """Prepare a comparison without reading weights. Raises MismatchError for a checkpoint of another model."""
    from extractor.checkpoint.layout import (
        ExpertsLayout,  # imports transformers, which hashing a store need not wait for
    )

    manifest = read_manifest(path)
    layout = ExpertsLayout.of_store(checkpoint, manifest, Path(path))
    if (layout.model, layout.layers) != (manifest.model, manifest.layers):
        raise MismatchError(
            f"{path} and {checkpoint.path} are different models: {_difference(manifest.model, layout.model)}; name the "
            "checkpoint that the store was extracted from"
        )
    return Comparison(path, checkpoint, manifest, _outputs(manifest, layout))


def _difference(store: ModelSpec, checkpoint: ModelSpec) -> str:
    pairs = [(one.name, getattr(store, one.name), getattr(checkpoint, one.name)) for one in fields(ModelSpec)]
    differing = [f"{name} is {mine} in the store and {theirs} there" for name, mine, theirs in pairs if mine != theirs]
    return ", ".join(differing) or "their experts' tensors have other shapes, dtypes or encodings"


def compared_bytes(manifest: Manifest) -> int:
    """The number of bytes that `verify_store` reads; `verify_against` reads about as many without the adapters'."""
    shards = sum(deep.bytes for deep in manifest.deep_experts)
    return shards + sum(file.bytes for file in manifest.trunk) + sum(file.bytes for file in manifest.adapters)


def _outputs(manifest: Manifest, layout: ExpertsLayout) -> list[OutputFile]:
    shards = [shard_output(layout, deep.index, deep.experts) for deep in manifest.deep_experts]
    return all_trunk_outputs(layout) + shards


def _differences(manifest: Manifest, digest: FileDigest) -> list[str]:
    for deep in manifest.deep_experts:
        if deep.file == digest.name:
            layers = [
                layer for layer, (a, b) in enumerate(zip(deep.span_hashes, digest.span_hashes, strict=True)) if a != b
            ]
            if layers:
                experts = ", ".join(f"layer {layer} expert {deep.experts[layer]}" for layer in layers[:3])
                return [f"{deep.file}: the layers {format_ids(layers)} differ ({experts}{', …' * (len(layers) > 3)})"]
            return [] if deep.sha256 == digest.sha256 else [f"{deep.file} differs"]
    for file in manifest.trunk:
        if file.name == digest.name:
            return [] if file.sha256 == digest.sha256 else [f"{file.name} differs"]
    return [f"{digest.name} is not in the store"]
