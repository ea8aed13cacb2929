"""The usage ledger's file, `usage.json`: how usage survives restarts. See `snapshot_file.py` for when it is written."""

from __future__ import annotations

from pathlib import Path

from router.ledger import LedgerError, UsageLedger
from server.engine.snapshot_file import SnapshotFile

FILE_NAME = "usage.json"


class UsageFile(SnapshotFile[UsageLedger]):
    """Keeps a ledger in a file."""

    what = "usage"
    unreadable = (LedgerError,)

    def read(self, path: Path) -> UsageLedger:
        """See `UsageLedger.load`."""
        return UsageLedger.load(path)

    def write(self, path: Path, value: UsageLedger) -> None:
        """See `UsageLedger.save`."""
        value.save(path)

    def count(self, value: UsageLedger) -> int:
        """Tokens routed."""
        return value.num_tokens
