"""The process that holds a port, for the error of a server that cannot bind it. It is found in Linux's /proc only."""

from __future__ import annotations

import os
from pathlib import Path

_LISTEN = "0A"


def holder_of(port: int, proc: Path = Path("/proc")) -> str:
    """` by process 123 (nginx)`, or an empty text if it is unknown (another user's process, no /proc)."""
    sockets = _listening_inodes(port, proc)
    try:
        processes = [entry for entry in proc.iterdir() if entry.name.isdecimal()] if sockets else []
    except OSError:
        return ""
    for process in processes:
        try:
            if any(_target(descriptor) in sockets for descriptor in (process / "fd").iterdir()):
                command = (process / "comm").read_text().strip()
                return f" by process {process.name} ({command})"
        except OSError:
            continue
    return ""


def _target(descriptor: Path) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:  # closed since it was listed
        return ""


def _listening_inodes(port: int, proc: Path) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == _LISTEN:
                found.add(f"socket:[{fields[9]}]")
    return found
