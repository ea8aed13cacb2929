"""Progress of commands on standard error: a bar on a terminal; elsewhere lines for bytes, and nothing for the rest.

Invariant: any thread may report progress to a `Bar`, which is cheap; nothing is written to standard output.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from extractor.planning.sizes import format_size

LINE_SECONDS = 5.0


@contextmanager
def progress_bar(title: str, total_bytes: int | None = None, *, quiet: bool = False) -> Iterator[Bar]:
    """A bar while the block runs.

    Args:
        title: title of the work.
        total_bytes: size of a copy, which reports by `Bar.advance`; None for other work, which reports by `Bar.show`.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Bar(title, None if quiet else total_bytes)
        return
    rate = (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, *((TimeElapsedColumn(),) if total_bytes is None else rate), console=console) as drawn:
        drawn.add_task(title, total=total_bytes)
        yield Bar(title, total_bytes, drawn)


class Bar:
    """The progress of one piece of work. Without `drawn`, it prints a line at intervals if it has `total_bytes`."""

    def __init__(self, title: str, total_bytes: int | None, drawn: Progress | None = None) -> None:
        self._title = title
        self._total = total_bytes
        self._drawn = drawn
        self._done = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def show(self, doing: str, done: float, total: float | None) -> None:
        """Show the current work `doing` with `done` of `total`; a total of None is unknown."""
        if self._drawn is not None:
            (task,) = self._drawn.task_ids
            self._drawn.update(task, description=doing, completed=done, total=total)

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        if self._drawn is not None:
            (task,) = self._drawn.task_ids
            self._drawn.advance(task, num_bytes)
        elif self._total is not None:
            self._write_line(num_bytes, self._total)

    def _write_line(self, num_bytes: int, total: int) -> None:
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if now - self._last < LINE_SECONDS and self._done < total:
                return
            self._last = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (total - self._done) / max(rate, 1.0)
            line = (
                f"{self._title}: {format_size(self._done)} of {format_size(total)}, "
                f"{format_size(rate)}/s, {left:.0f} s left"
            )
        print(line, file=sys.stderr, flush=True)
