"""Who is reading a store: a shared lock on its directory, held by every open `Store`.

Files of removed deep experts may go only when no reader is left that could still want them. Invariant: while `alone`
says yes, no other process and no other `Store` has the directory open. A file system without such locks counts as never
alone, so that files stay rather than go too early.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


class ReaderLock:
    """A shared lock on the store at `path`, held until `close`.

    Raises OSError when the directory cannot be opened.
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
        """Let go of the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, operation: int) -> bool:
        try:
            fcntl.flock(self._descriptor, operation)
        except OSError:  # held by another, or not offered by this file system
            return False
        return True
