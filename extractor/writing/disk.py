"""Room on the disk: how much there is, whether a file can be written, and the `--keep` that fits into too little.

Invariant: a `--keep` that is named here selects at least one deep expert and fits into the room that was measured.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from extractor.errors import TargetError

DISK_MARGIN_BYTES = 16 * 2**20
"""Room left for the manifest, the journal and the file system's own bookkeeping."""


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that `path` lies on or would lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_writable(path: Path, flag: str) -> None:
    """Tell before the work, rather than after it, that its result could not be written to the file `path`.

    Missing folders are fine: they will be made. Raises TargetError.
    """
    if path.is_dir():
        raise TargetError(f"{flag} {path} is a directory, wanted the file to write; name one in it")
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise TargetError(f"{flag} {path} cannot be written: {place} is a file; name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TargetError(f"{flag} {path} cannot be written: {place} does not allow it; name another folder")


def keep_that_fits(room_bytes: int, trunk_bytes: int, shard_bytes: int, num_experts: int, at_least: int) -> str | None:
    """The largest `--keep` whose whole store takes at most `room_bytes`, as "12.5%".

    None when that is fewer than `at_least` deep experts or none at all.
    """
    count = min((room_bytes - DISK_MARGIN_BYTES - trunk_bytes) // shard_bytes, num_experts)
    if count < max(at_least, 1):
        return None
    return f"{math.ceil(10000 * count / num_experts) / 100:g}%"
