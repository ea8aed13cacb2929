"""The file of the statistics that are collected while serving. See `snapshot_file.py` for when it is written."""

from __future__ import annotations

from pathlib import Path

from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from server.engine.snapshot_file import SnapshotFile

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


class StatisticsFile(SnapshotFile[ExpertStatistics]):
    """Keeps statistics in a file.

    Attributes:
        statistics: what to add to; holds earlier runs' statistics already.
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
