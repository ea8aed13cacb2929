"""The captured step's kernels compile for an H100, and for an A100, with whatever Triton is installed and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from tests.server.model.ahead_of_time import CASES

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
QUICK = ("tiny", "mixtral")


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton brings no ptxas")
@pytest.mark.parametrize(
    ("capability", "case"),
    [pytest.param(90, case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES]
    + [pytest.param(80, case, marks=pytest.mark.slow) for case in ("bundled", "glm4")],
)
def test_every_kernel_of_the_step_compiles(capability: int, case: str, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.model.ahead_of_time", str(capability), case],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("compiled") == len(CASES[case].steps)
