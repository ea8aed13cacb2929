"""The file of the statistics that are collected while serving: read at start, written now and then and at the end.

Invariant: what was on disk at start is part of what is written. A file that cannot be read, or is of another
checkpoint, is set aside, never overwritten; one that cannot be written costs a warning, not the service. Writing
happens on a thread of its own, so that no request waits for the disk.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from pathlib import Path

from extractor.statistics import ExpertStatistics, StatisticsError
from extractor.statistics_file import read_statistics, write_statistics

log = logging.getLogger(__name__)

FILE_NAME = "statistics.safetensors"


def served_statistics(store: Path, fingerprint: str) -> ExpertStatistics | None:
    """What servers of the store at `store` collected; None where nothing was, or of another checkpoint.

    Raises:
        StatisticsError, OSError: the file cannot be read.
    """
    try:
        found = read_statistics(store / FILE_NAME)
    except FileNotFoundError:
        return None
    return found if found.fingerprint == fingerprint else None


class StatisticsFile:
    """Keeps statistics in a file.

    Args:
        path: of the file.
        empty: statistics with nothing in them, of the store being served.
        interval_seconds: between saves.

    Attributes:
        statistics: what to add to; holds earlier runs' statistics already.
    """

    def __init__(self, path: Path, empty: ExpertStatistics, interval_seconds: float) -> None:
        self._path = path
        self._interval = interval_seconds
        self._saved_at = time.monotonic()
        self._writer: threading.Thread | None = None
        self.statistics = empty
        try:
            self.statistics.merge(read_statistics(path))
        except FileNotFoundError:
            pass
        except (StatisticsError, OSError) as error:
            aside = path.with_name(f"{path.name}.unreadable-{time.strftime('%Y%m%d-%H%M%S')}")
            log.warning("statistics of earlier runs are not added: %s; they are kept as %s", error, aside.name)
            self._set_aside(aside)
        self._saved_tokens = int(self.statistics.num_tokens.sum())

    @property
    def is_due(self) -> bool:
        """Whether the interval has passed and the last save is done."""
        is_writing = self._writer is not None and self._writer.is_alive()
        return not is_writing and time.monotonic() - self._saved_at >= self._interval

    def save(self) -> None:
        """Begin to save what is there now, if anything is new; what is added meanwhile goes into the next save."""
        self._saved_at = time.monotonic()
        num_tokens = int(self.statistics.num_tokens.sum())
        if num_tokens == self._saved_tokens:
            return
        self._saved_tokens = num_tokens
        snapshot = copy.deepcopy(self.statistics)
        self._writer = threading.Thread(target=self._write, args=(snapshot,), name="statistics", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Save what is new and wait until it is on disk."""
        if self._writer is not None:
            self._writer.join()
        self.save()
        if self._writer is not None:
            self._writer.join()

    def _write(self, snapshot: ExpertStatistics) -> None:
        try:
            write_statistics(self._path, snapshot)
        except OSError as error:
            self._saved_tokens = -1
            log.warning("statistics could not be saved to %s: %s", self._path, error)

    def _set_aside(self, aside: Path) -> None:
        try:
            self._path.rename(aside)
        except OSError as error:
            log.warning("%s could not be renamed: %s", self._path, error)
