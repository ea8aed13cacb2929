"""Giving deep experts up: a manifest without them first, their files later.

Invariant: a file goes only after a manifest without it is durable, so a crash at any moment leaves a whole store; and
the manifest remembers how far its indices went, so that a later growth never puts another file where a reader of an
older manifest expects a removed one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from expert_store.errors import ManifestError
from expert_store.manifest import Manifest, read_manifest, sync_directory

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

    Returns their bytes, or None when they have to stay because `manifest` is not the one on disk. The caller knows that
    nobody else reads the store. What an extraction has under way is left alone: it is numbered from `next_index` on.
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
