"""The rate of reading files from the disk, in pieces of about one expert, by as many threads as the server has.

Invariant: the pieces are dropped from the page cache first, as far as the system drops them; nothing is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from expert_store.residency.host_tier import READ_THREADS

PIECE_BYTES = 8 << 20
SAMPLE_BYTES = 256 << 20


def read_rate(paths: Sequence[Path], most_bytes: int = SAMPLE_BYTES) -> float:
    """Bytes a second of reading up to `most_bytes` of the files, spread evenly over all of them.

    Raises:
        OSError: a file cannot be read. ValueError: the files are empty.
    """
    pieces = [(path, at) for path in paths for at in range(0, path.stat().st_size, PIECE_BYTES)]
    if not pieces:
        raise ValueError(f"{len(paths)} files without a byte have no reading rate")
    chosen = pieces[:: max(1, len(pieces) * PIECE_BYTES // most_bytes)]
    for path in {path for path, _ in chosen}:
        _drop(path)
    began = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="disk-rate") as threads:
        num_bytes = sum(threads.map(_read, chosen))
    return num_bytes / (time.perf_counter() - began)


def _read(piece: tuple[Path, int]) -> int:
    path, at = piece
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return len(os.pread(descriptor, PIECE_BYTES, at))
    finally:
        os.close(descriptor)


def _drop(path: Path) -> None:
    """Drop the file's pages from the page cache; macOS has no call for it and keeps them."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
