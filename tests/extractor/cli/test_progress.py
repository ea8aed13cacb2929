"""Progress on standard error: a bar on a terminal, lines elsewhere, never on standard output."""

import sys

import pytest

from extractor.cli import progress
from extractor.cli.progress import progress_bar


def test_lines_have_bytes_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("copying", 4 * 2**20) as bar:
        for _ in range(4):
            now += 2.5
            bar.advance(2**20)
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == [
        "copying: 2.0 MiB of 4.0 MiB, 409.6 KiB/s, 5 s left",
        "copying: 4.0 MiB of 4.0 MiB, 409.6 KiB/s, 0 s left",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("copying", 10, quiet=True) as bar:
        bar.advance(10)
    found = capsys.readouterr()
    assert found.out == found.err == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("copying", 2**20) as bar:
        bar.advance(2**20)
    found = capsys.readouterr()
    assert found.out == ""
    assert "copying" in found.err
    assert "1.0" in found.err
