"""The usage ledger's file: read at start, written now and then and at the end, so that usage survives restarts.

Invariant: what was on disk at start is part of what is written. A file that cannot be read is set aside, never
overwritten; one that cannot be written costs a warning, not the service.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from router.ledger import LedgerError, UsageLedger

log = logging.getLogger(__name__)


class UsageFile:
    """Keeps a ledger in a file.

    Args:
        path: of `usage.json`.
        empty: a ledger with nothing in it, of the store being served.
        interval_seconds: between saves.

    Attributes:
        ledger: what to add to; holds earlier runs' usage already.
    """

    def __init__(self, path: Path, empty: UsageLedger, interval_seconds: float = 60.0) -> None:
        self._path = path
        self._interval = interval_seconds
        self._saved_at = time.monotonic()
        self._saved_tokens = -1
        self.ledger = empty
        try:
            self.ledger.merge(UsageLedger.load(path))
        except FileNotFoundError:
            pass
        except (LedgerError, OSError) as error:
            aside = path.with_name(f"{path.name}.unreadable-{time.strftime('%Y%m%d-%H%M%S')}")
            log.warning("usage of earlier runs is not added: %s; it is kept as %s", error, aside.name)
            self._set_aside(aside)
        self._saved_tokens = self.ledger.num_tokens

    def save_if_due(self) -> None:
        """Save when the interval has passed and there is something new."""
        if time.monotonic() - self._saved_at >= self._interval:
            self.save()

    def save(self) -> None:
        """Save now, if there is something new."""
        self._saved_at = time.monotonic()
        if self.ledger.num_tokens == self._saved_tokens:
            return
        try:
            self.ledger.save(self._path)
            self._saved_tokens = self.ledger.num_tokens
        except OSError as error:
            log.warning("usage could not be saved to %s: %s", self._path, error)

    def _set_aside(self, aside: Path) -> None:
        try:
            self._path.rename(aside)
        except OSError as error:
            log.warning("%s could not be renamed: %s", self._path, error)
