"""Progress of long copies on standard error: a bar on a terminal, plain lines elsewhere.

Invariant: `advance` may be called from any thread and is cheap; nothing is written to standard output.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from extractor.writing.disk import format_bytes

LINE_SECONDS = 5.0


@contextmanager
def byte_progress(title: str, total_bytes: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told of every few bytes done; shows bytes, rate and time left while the block runs."""
    if quiet:
        yield lambda count: None
    elif not sys.stderr.isatty():
        yield _Lines(title, total_bytes).advance
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total_bytes)
            yield lambda count: progress.advance(task, count)


class _Lines:
    """A line every few seconds, and one at the end."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title = title
        self._total = total_bytes
        self._done = 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < LINE_SECONDS and self._done < self._total:
                return
            self._last = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1.0)
            line = (
                f"{self._title}: {format_bytes(self._done)} of {format_bytes(self._total)}, "
                f"{format_bytes(rate)}/s, {left:.0f} s left"
            )
        print(line, file=sys.stderr, flush=True)
