"""The files that hold an engine's counters: usage.json and the statistics that are collected while serving.

They are read at the start; a thread of their own writes them at intervals and at the end. Invariant: a saved file
includes the content that was on disk at the start. A file that cannot be read is renamed, never overwritten; one that
cannot be written causes a warning, and serving goes on. No step of the engine waits for the disk.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from expert_store.files import replacing
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from router.errors import LedgerError
from router.ledger import UsageLedger

log = logging.getLogger(__name__)

USAGE_FILE = "usage.json"
STATISTICS_FILE = "statistics.safetensors"


class Mergeable(Protocol):
    """A value to which another one can be added."""

    def merge(self, other: Self) -> None:
        """Add another value; raises one of the file's `unreadable` if the two do not fit together."""


Value = TypeVar("Value", bound=Mergeable)


class SnapshotFile(ABC, Generic[Value]):
    """Keeps a value in a file; the thread that adds to the value calls it.

    Args:
        path: of the file.
        value: an empty value; the file's content is added to it first.
        interval_seconds: between two saves.

    Attributes:
        what: the name of the content, for messages.
        unreadable: errors that `read` and merging raise for a file of another kind or of another model.
    """

    what: ClassVar[str]
    unreadable: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, path: Path, value: Value, interval_seconds: float = 60.0) -> None:
        self._path, self._value, self._interval = path, value, interval_seconds
        self._saved_at = time.monotonic()
        self._writer: threading.Thread | None = None
        expected: tuple[type[Exception], ...] = (*self.unreadable, OSError)
        try:
            value.merge(self.read(path))
        except FileNotFoundError:
            pass
        except expected as error:
            self._set_aside(error)
        self._saved_count = self.count(value)

    @abstractmethod
    def read(self, path: Path) -> Value:
        """Read the file. Raises FileNotFoundError, OSError, or one of `unreadable`."""

    @abstractmethod
    def write(self, path: Path, value: Value) -> None:
        """Write the file, atomically. Raises OSError."""

    @abstractmethod
    def count(self, value: Value) -> int:
        """A count that rises with every addition to the value."""

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed and the last save is done."""
        is_writing = self._writer is not None and self._writer.is_alive()
        return not is_writing and time.monotonic() - self._saved_at >= self._interval

    def save(self) -> None:
        """Begin to save the value as it is now, if it has changed; later additions go into the next save."""
        self._saved_at = time.monotonic()
        count = self.count(self._value)
        if count == self._saved_count:
            return
        self._saved_count = count
        snapshot = copy.deepcopy(self._value)
        self._writer = threading.Thread(target=self._write, args=(snapshot,), name=f"save-{self.what}", daemon=True)
        self._writer.start()

    def save_if_due(self) -> None:
        """Call `save` if the interval has passed."""
        if self.is_due:
            self.save()

    def close(self) -> None:
        """Save the value, if it has changed, and wait until it is on disk."""
        if self._writer is not None:
            self._writer.join()
        self.save()
        if self._writer is not None:
            self._writer.join()

    def _write(self, snapshot: Value) -> None:
        try:
            self.write(self._path, snapshot)
        except OSError as error:
            self._saved_count = -1
            log.warning("%s could not be saved to %s: %s", self.what, self._path, error)

    def _set_aside(self, cause: Exception) -> None:
        aside = self._path.with_name(f"{self._path.name}.unreadable-{time.strftime('%Y%m%d-%H%M%S')}")
        log.warning("%s of earlier runs is not added: %s; the file is kept as %s", self.what, cause, aside.name)
        try:
            self._path.rename(aside)
        except OSError as error:
            log.warning("%s could not be renamed: %s", self._path, error)


class UsageFile(SnapshotFile[UsageLedger]):
    """Keeps a ledger in a file."""

    what = "usage"
    unreadable = (LedgerError,)

    def read(self, path: Path) -> UsageLedger:
        """See `UsageLedger.load`."""
        return UsageLedger.load(path)

    def write(self, path: Path, value: UsageLedger) -> None:
        """See `SnapshotFile.write`."""
        with replacing(path) as file:
            file.write(json.dumps(value.to_json()).encode())

    def count(self, value: UsageLedger) -> int:
        """Tokens routed."""
        return value.num_tokens


def served_statistics(store: Path, fingerprint: str) -> ExpertStatistics | None:
    """Read the statistics that servers of `store` collected; None if there are none, or they are of another checkpoint.

    Raises:
        StatisticsError, OSError: the file cannot be read.
    """
    try:
        found = read_statistics(store / STATISTICS_FILE)
    except FileNotFoundError:
        return None
    return found if found.fingerprint == fingerprint else None


class StatisticsFile(SnapshotFile[ExpertStatistics]):
    """Keeps statistics in a file.

    Attributes:
        statistics: the value to add to; it includes the statistics of earlier runs.
    """

    what = "what was observed of the experts"
    unreadable = (StatisticsError,)

    @property
    def statistics(self) -> ExpertStatistics:
        """The value that is kept."""
        return self._value

    def read(self, path: Path) -> ExpertStatistics:
        """See `read_statistics`."""
        return read_statistics(path)

    def write(self, path: Path, value: ExpertStatistics) -> None:
        """See `write_statistics`."""
        write_statistics(path, value)

    def count(self, value: ExpertStatistics) -> int:
        """Tokens observed, in all domains."""
        return int(value.num_tokens.sum())
