"""The usage ledger's file, `usage.json`: how usage survives restarts. See `snapshot_file.py` for when it is written."""

from __future__ import annotations

import json
from pathlib import Path

from expert_store.files import replacing
from router.errors import LedgerError
from router.ledger import UsageLedger
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
        """See `SnapshotFile.write`."""
        with replacing(path) as file:
            file.write(json.dumps(value.to_json()).encode())

    def count(self, value: UsageLedger) -> int:
        """Tokens routed."""
        return value.num_tokens
