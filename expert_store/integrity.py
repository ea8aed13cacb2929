"""Hashing the files of a store: does each hold what the manifest says, byte for byte?

Invariant: every byte that the manifest vouches for is read once and enters the file's sha256 and, in shards, the
XXH3-64 of its span; all bad files are found before anything is raised.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from expert_store.errors import ShardCorruptError
from expert_store.manifest import Manifest
from expert_store.shard import ShardLayout, open_checked, read_fully

READ_BYTES = 4 * 2**20
Progress = Callable[[int], None]


def verify_files(root: Path, manifest: Manifest, progress: Progress | None = None) -> int:
    """Read all files of the store at `root` (resolved); returns the bytes read.

    `progress` is called with the number of bytes read since the last call. Raises one ShardCorruptError that names
    every bad file.
    """
    problems, total = [], 0
    for deep in manifest.deep_experts:
        layout = ShardLayout.of(manifest.layers, deep)
        cuts = [*layout.span_offsets, layout.file_bytes]
        try:
            hashes = _hash_file(root, deep.file, deep.bytes, deep.sha256, cuts, progress)
        except ShardCorruptError as error:
            problems.append(str(error))
            continue
        total += deep.bytes
        bad = [layer for layer, (got, want) in enumerate(zip(hashes, deep.span_hashes, strict=True)) if got != want]
        if bad:
            problems.append(f"{root / deep.file}: span_hashes of the manifest are wrong for the layers {bad}; {REMEDY}")
    for file in manifest.trunk:
        try:
            _hash_file(root, file.name, file.bytes, file.sha256, [file.bytes], progress)
        except ShardCorruptError as error:
            problems.append(str(error))
            continue
        total += file.bytes
    if problems:
        raise ShardCorruptError("\n".join(problems))
    return total


REMEDY = "restore the file, or extract into an empty directory"


def _hash_file(root: Path, name: str, size: int, sha256: str, cuts: list[int], progress: Progress | None) -> list[str]:
    """The XXH3-64 of each piece between two of `cuts`; raises ShardCorruptError when the whole is not `sha256`."""
    whole, buffer, at, hashes = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), 0, []
    descriptor = open_checked(root, name, size)
    try:
        for end in cuts:
            piece = xxhash.xxh3_64()
            while at < end:
                chunk = buffer[: min(READ_BYTES, end - at)]
                read_fully(descriptor, chunk, at, str(root / name))
                whole.update(chunk)
                piece.update(chunk)
                at += len(chunk)
                if progress is not None:
                    progress(len(chunk))
            hashes.append(piece.hexdigest())
    finally:
        os.close(descriptor)
    if whole.hexdigest() != sha256:
        raise ShardCorruptError(
            f"{root / name}: sha256 is {whole.hexdigest()}, the manifest says {sha256}; the file was altered: {REMEDY}"
        )
    return hashes[1:]
