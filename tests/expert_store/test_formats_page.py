"""The page about encodings tells the bits that a row takes."""

import re
from pathlib import Path

import pytest

from expert_store.encoding import RowEncoding

COLUMNS = 2048


def test_the_pages_bits_are_those_of_the_rows(repository: Path) -> None:
    page = (repository / "docs/formats.md").read_text()
    lines = re.findall(r"^\|[^|]*\| `RowEncoding\((.*)\)` \| ([\d.]+) \|$", page, flags=re.MULTILINE)
    assert len(lines) == 18
    for arguments, bits in lines:
        encoding = eval(f"RowEncoding({arguments})", {"RowEncoding": RowEncoding})
        assert encoding.bits(COLUMNS) == pytest.approx(float(bits))
