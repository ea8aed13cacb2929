"""Compares the hashes of a store's files with the manifest.

Invariant: every byte that the manifest covers is read once and enters the file's sha256 and, in shards, the XXH3-64 of
its span; all bad files are found before an error is raised. A `TrunkCheck` checks the trunk alone while another thread
loads it, so that the two share the page cache.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import xxhash

from expert_store.errors import ShardCorruptError
from expert_store.files import open_checked, read_fully
from expert_store.manifest import Manifest, TrunkFile
from expert_store.shard import ShardLayout

READ_BYTES = 4 * 2**20
Progress = Callable[[int], None]
SMALL_BYTES = 64 * 2**20
"""Largest size of a trunk file that is hashed at once: those that are read before the weights, such as the config."""
CHECK_THREADS = 4
REMEDY = "restore the file, or extract into an empty directory"


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
    others = [(file.name, file.bytes, file.sha256) for file in manifest.trunk]
    others += [(adapter.file, adapter.bytes, adapter.sha256) for adapter in manifest.adapters]
    for name, size, sha256 in others:
        try:
            _hash_file(root, name, size, sha256, [size], progress)
        except ShardCorruptError as error:
            problems.append(str(error))
            continue
        total += size
    if problems:
        raise ShardCorruptError("\n".join(problems))
    return total


class TrunkCheck:
    """Compares the trunk's files at `root` (resolved) with the manifest's sha256 while another thread loads them.

    The constructor reads the small files; threads of its own, which release the interpreter's lock, read the others.
    Raises ShardCorruptError for a bad small file.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root = root
        self._problems: list[str] = []
        self._failures: list[Exception] = []
        self._left: SimpleQueue[TrunkFile] = SimpleQueue()
        for file in manifest.trunk:
            if file.bytes < SMALL_BYTES:
                self._compare(file)
            else:
                self._left.put(file)
        self.poll()
        count = min(CHECK_THREADS, self._left.qsize())
        self._threads = [threading.Thread(target=self._work, name="trunk-check", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def poll(self) -> None:
        """Raise one ShardCorruptError that names the bad files found so far, if there are any; never waits."""
        if self._failures:
            raise self._failures[0]
        if self._problems:
            raise ShardCorruptError("\n".join(sorted(self._problems)))

    def wait(self) -> None:
        """Wait until all files were read. Raises as `poll`."""
        for thread in self._threads:
            thread.join()
        self.poll()

    def _work(self) -> None:
        with suppress(Empty):
            while True:
                self._compare(self._left.get_nowait())

    def _compare(self, file: TrunkFile) -> None:
        try:
            _hash_file(self._root, file.name, file.bytes, file.sha256, [file.bytes], None)
        except ShardCorruptError as error:
            self._problems.append(str(error))
        except Exception as error:  # the waiting thread raises it; this thread ends normally
            self._failures.append(error)


def _hash_file(root: Path, name: str, size: int, sha256: str, cuts: list[int], progress: Progress | None) -> list[str]:
    """The XXH3-64 of each piece between two of `cuts`, without the bytes before the first.

    Raises ShardCorruptError when the whole is not `sha256`.
    """
    whole, buffer, at, hashes = hashlib.sha256(), memoryview(bytearray(READ_BYTES)), 0, []
    descriptor = open_checked(root, name, size)
    try:
        for number, end in enumerate(cuts):
            piece = xxhash.xxh3_64()
            while at < end:
                chunk = buffer[: min(READ_BYTES, end - at)]
                read_fully(descriptor, chunk, at, str(root / name))
                whole.update(chunk)
                if number:
                    piece.update(chunk)
                at += len(chunk)
                if progress is not None:
                    progress(len(chunk))
            hashes.append(piece.hexdigest())
    finally:
        os.close(descriptor)
    if whole.hexdigest() != sha256:
        raise ShardCorruptError(
            f"{root / name}: sha256 is {whole.hexdigest()}, the manifest says {sha256}; the file was altered: {REMEDY} "
            f"(`deepfew verify {root}` finds every bad file)"
        )
    return hashes[1:]
