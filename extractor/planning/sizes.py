"""Parsing and formatting of sizes and shares.

Invariant: every command and every setting reads a size by `parse_size` and a share by `parse_share`, so that a text
means the same number everywhere. GiB is 2^30 bytes and GB is 10^9; a letter alone is binary, so 8G is 8GiB.
"""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([KMGT])(I?B)?|B?)", re.ASCII)
_SHARE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(%?)", re.ASCII)


def parse_size(text: str) -> int:
    """Parse a size such as `8GiB`, `1.5 GB`, `512M` or `4096` to bytes; upper or lower case.

    Raises:
        ValueError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    base = 1000 if match and match[3] == "B" else 1024
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise ValueError(f"{text[:40]!r} is not a size of at least one byte; write it like 8GiB, 500MB or 4096")
    return size


def parse_share(text: str) -> float:
    """Parse a share such as `25%` or `0.25`; it is above 0 and at most 1.

    Raises:
        ValueError: not a share.
    """
    match = _SHARE.fullmatch(text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{text[:40]!r} is not a share above 0 and at most 1; write it like 25% or 0.25")
    return share


def format_size(size: float) -> str:
    """Format a size: 4096 is "4.0 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
