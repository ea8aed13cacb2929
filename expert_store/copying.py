"""Copies of a store that may change on their own.

Invariant: a copy has all files of its manifest, which is written last. Files of a store are replaced, never changed,
so a copy on the same file system shares them by hard links until one of the two stores gives them up.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from expert_store.errors import ManifestError
from expert_store.files import replacing
from expert_store.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest


def copy_store(source: Path, target: Path) -> Manifest:
    """The manifest of a copy of the store `source` at `target`, which is made unless it is there.

    Raises:
        ManifestError: `source` is no store, or `target` is a store of another checkpoint. OSError.
    """
    manifest = read_manifest(source)
    if (target / MANIFEST_NAME).exists():
        found = read_manifest(target)
        if found.source.fingerprint != manifest.source.fingerprint:
            raise ManifestError(
                f"{target} is a store of the checkpoint {found.source.fingerprint}, wanted one of "
                f"{manifest.source.fingerprint}, as {source} is: remove it, or name another folder"
            )
        return found
    trunk, shards = [file.name for file in manifest.trunk], [deep.file for deep in manifest.deep_experts]
    for name in (*trunk, *shards, *(adapter.file for adapter in manifest.adapters)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link(source / name, target / name)
    write_manifest(target, manifest)
    return manifest


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)  # of a copy that was broken off
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        with replacing(target) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)
