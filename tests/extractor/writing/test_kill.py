"""kill −9 at any moment: never a half store, and the next run ends with the same bytes."""

import subprocess
import sys
from pathlib import Path

import pytest


def rounds(repository: Path, *arguments: str) -> int:
    """Run `kill_rounds` in a process of its own, which may fork; returns how many children were killed."""
    command = [sys.executable, "-m", "tests.extractor.writing.kill_rounds", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("stride", [71, pytest.param(9, marks=pytest.mark.exhaustive)])
def test_killed_before_any_step_an_extraction_continues(
    repository: Path, qwen_checkpoint: Path, tmp_path: Path, stride: int
) -> None:
    """Every `stride`-th of the about hundred calls that change the disk."""
    assert rounds(repository, str(qwen_checkpoint), str(tmp_path), "steps", str(stride)) >= 90 // stride


@pytest.mark.exhaustive
def test_killed_at_random_moments_an_extraction_continues(
    repository: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert rounds(repository, str(tiny_checkpoint), str(tmp_path), "random", "2") >= 1
