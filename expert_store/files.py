"""The files of a store, and every file that is replaced as a whole.

Invariants: `replacing` leaves the old content or the whole new one, never a part, whatever fails; a file that is opened
here lies inside the store, is a regular file and has the size that the manifest says.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from expert_store.errors import ShardCorruptError

MAX_READ_CALL_BYTES = 2**30


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` as a whole, durably, when the block ends; missing folders are created.

    If anything fails, `path` keeps its content and the new file is removed. Raises OSError, which names a file.
    """
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # the error of a write does not name the file
        raise


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make renames and new names in `directory` durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_inside(root: Path, name: str) -> Path:
    """The real path of `root/name`, where `root` is itself resolved.

    Raises ShardCorruptError when the file is missing or a symbolic link leads out of the store.
    """
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ShardCorruptError(
            f"{root / name}: the manifest names this file but it cannot be found ({error}); "
            "restore it, or extract into an empty directory"
        ) from None
    if not path.is_relative_to(root):
        raise ShardCorruptError(
            f"{root / name} is a link to {path}, outside the store; put the file itself there, or extract into an "
            "empty directory"
        )
    return path


def open_checked(root: Path, name: str, size: int) -> int:
    """Open a file of the store for reading and return its descriptor (the caller closes it).

    Raises ShardCorruptError when it is missing, leads out of the store, is no regular file, or has not `size` bytes.
    """
    path = resolve_inside(root, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ShardCorruptError(f"{path} cannot be opened: {error.strerror}; check its permissions") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        os.close(descriptor)
        raise ShardCorruptError(
            f"{path} has {status.st_size} bytes, the manifest says {size}; the file was truncated or replaced: "
            "restore it, or extract into an empty directory"
        )
    return descriptor


def read_fully(descriptor: int, memory: memoryview, offset: int, where: str) -> None:
    """Fill `memory` from the file offset `offset` on. Raises ShardCorruptError, naming `where`."""
    done = 0
    while done < memory.nbytes:
        try:
            count = os.preadv(descriptor, [memory[done : done + MAX_READ_CALL_BYTES]], offset + done)
        except OSError as error:
            raise ShardCorruptError(
                f"{where} cannot be read: {error.strerror}; check the disk, restore the file, or extract into an "
                "empty directory"
            ) from error
        if count == 0:
            raise ShardCorruptError(
                f"{where} ends after {offset + done} bytes, wanted {offset + memory.nbytes}; the file was truncated "
                "while it was open: restore it, or extract into an empty directory"
            )
        done += count
