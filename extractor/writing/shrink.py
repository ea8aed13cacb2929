"""Making a store smaller: rewriting its manifest without some deep experts.

Invariant: the extraction's journal is the lock, so that nothing grows the store meanwhile; the files stay until
`Store.remove_unnamed` (or `tidy`) finds that no process reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from expert_store.manifest import Manifest, read_manifest, write_manifest
from expert_store.shrink import ReaderLock, remove_unnamed_shards, without
from extractor.writing.journal import Journal, journal_head


def shrink_store(path: Path, indices: Collection[int]) -> Manifest:
    """Remove the deep experts of these indices; return the new manifest. A reader may have the store open.

    Raises ManifestError (see `without`), or TargetError while the store is being extracted into.
    """
    before = read_manifest(path)
    after = without(before, indices)
    if after == before:
        return before
    head, held = (
        journal_head(
            manifest.source.fingerprint,
            manifest.layers,
            [deep.experts for deep in manifest.deep_experts],
            manifest.made,
        )
        for manifest in (after, before)
    )
    journal = Journal.open(path, head, held)
    try:
        after = without(read_manifest(path), indices)  # another writer may have finished before we took the lock
        write_manifest(path, after)
        journal.remove()
    finally:
        journal.close()
    return after


def tidy(path: Path) -> int | None:
    """Delete the files of removed deep experts; return their bytes, or None while another process reads the store."""
    readers = ReaderLock(path)
    try:
        with readers.alone() as is_alone:
            return remove_unnamed_shards(path, read_manifest(path)) if is_alone else None
    finally:
        readers.close()
