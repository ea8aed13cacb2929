"""Removing deep experts from a store: first a manifest without them, later their files.

Invariants: a file is deleted only after a manifest without it is durable, so a crash at any moment leaves a whole
store, and only while no other process reads the store (`ReaderLock`). The manifest keeps the largest index that was
used, so a later growth never reuses the file name of a removed shard, which a reader of an older manifest may open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from expert_store.errors import ManifestError
from expert_store.files import sync_directory
from expert_store.manifest import Manifest, read_manifest

_SHARD = re.compile(r"deep-(\d{5,})\.safetensors")


def without(manifest: Manifest, indices: Collection[int]) -> Manifest:
    """`manifest` without the deep experts of these indices.

    Raises ManifestError for an index that it does not have, or when fewer than top-k deep experts would be left.
    """
    unknown = set(indices) - {deep.index for deep in manifest.deep_experts}
    if unknown:
        raise ManifestError(f"the store has no deep expert {min(unknown)}; `deepfew inspect` lists what it has")
    kept = tuple(deep for deep in manifest.deep_experts if deep.index not in set(indices))
    if len(kept) < min(manifest.model.top_k, len(manifest.deep_experts)):
        raise ManifestError(
            f"{len(kept)} deep experts would be left, and every token wants {manifest.model.top_k} of each layer: give "
            f"up at most {max(len(manifest.deep_experts) - manifest.model.top_k, 0)}"
        )
    retired = manifest.next_index if kept[-1].index + 1 < manifest.next_index else 0
    return replace(manifest, deep_experts=kept, retired_below=retired)


def remove_unnamed_shards(path: Path, manifest: Manifest) -> int | None:
    """Delete the shards of deep experts that the store at `path` once had and `manifest` does not name any more.

    Returns their bytes, or None if they must stay because `manifest` is not the one on disk. The caller ensures that no
    other process reads the store. Files of a running extraction stay: their indices begin at `next_index`.
    """
    if read_manifest(path) != manifest:
        return None
    named = {deep.file for deep in manifest.deep_experts}
    freed = 0
    for file in sorted((path / "experts").iterdir()):
        match = _SHARD.fullmatch(file.name)
        if match is None or int(match.group(1)) >= manifest.next_index or f"experts/{file.name}" in named:
            continue
        freed += file.lstat().st_size
        file.unlink()
    if freed:
        sync_directory(path / "experts")
    return freed


class ReaderLock:
    """A shared lock on the directory of the store at `path`; every open `Store` holds one until `close`.

    A file system without such locks counts as never alone, so that files stay rather than go too early. Raises OSError
    when the directory cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._is_locked = self._take(fcntl.LOCK_SH)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this is the only reader; no other one can begin inside the block if so."""
        is_alone = self._is_locked and self._take(fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield is_alone
        finally:
            if self._is_locked:  # an attempt that failed gave the shared lock up as well
                self._is_locked = self._take(fcntl.LOCK_SH)

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, operation: int) -> bool:
        try:
            fcntl.flock(self._descriptor, operation)
        except OSError:  # held by another, or not offered by this file system
            return False
        return True
