"""`deepfew doctor` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from server.cli.main import main
from server.machine import checks
from server.machine.versions import Finding


def test_doctor_reports_every_finding_and_fails_on_an_error_alone(
    tiny_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Finding("threads", "warning", "8", "set OMP_NUM_THREADS=2")]
    monkeypatch.setattr(checks, "examine", lambda store: found)
    assert main(["doctor"]) == 0
    assert "set OMP_NUM_THREADS=2" in capsys.readouterr().out
    found.append(Finding("GPU", "error", "none", "install torch with CUDA"))
    assert main(["doctor", str(tiny_store), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["error"], report["warning"]) == (1, 1)
    assert report["findings"][-1] == {
        "subject": "GPU",
        "status": "error",
        "found": "none",
        "remedy": "install torch with CUDA",
    }


def test_doctor_refuses_a_directory_that_is_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_a_library_that_cannot_be_imported_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "server.machine.checks", None)
    assert main(["doctor"]) == 1
    assert "install deepfew again" in capsys.readouterr().out
