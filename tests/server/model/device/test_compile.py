"""The captured step's kernels compile for an H100, and for an A100, with whatever Triton is installed and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from tests.server.model.device.ahead_of_time import CASES

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
KINDS = ["tiny, every kind", "tiny, latents", "tiny, delta nets", "tiny, convolutions", "tiny, mamba"]
ADAPTED = [name for name, case in CASES.items() if case.rank]
SMALL = ["tiny", "tiny, few slots", "bundled", "half", "mixtral"]
PACKED = ["fp8", "mxfp4", "nvfp4", "int8"]
LATENTS = ["deepseek-v3", "deepseek-v3 in float32", "deepseek-v2-lite", "glm-4-lite"]
CHANNELS = ["tiny, decays by channel", "kimi-linear", "ling"]
LARGE = [name for name in CASES if name not in (*KINDS, *SMALL, *PACKED, *LATENTS, *ADAPTED, *CHANNELS)]


@pytest.mark.exhaustive
@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton brings no ptxas")
@pytest.mark.parametrize(
    ("capability", "cases"),
    [
        (90, KINDS[:1]),
        (90, KINDS[1:]),
        (90, SMALL),
        (90, LARGE[:2]),
        (90, LARGE[2:]),
        (90, PACKED),
        (90, LATENTS),
        (90, ADAPTED),
        (80, [*KINDS, "bundled", "int4", "gpt-oss", "gpt-oss, mxfp4", "ernie", "mimo", "gemma", "phimoe"]),
        (90, CHANNELS),
        (80, ["qwen3.6", "tiny, decays by channel", "ling", "qwen3, 64 rows"]),
        (80, ["lfm2", "granite-4"]),
    ],
)
def test_every_kernel_of_the_step_compiles(
    capability: int, cases: list[str], tmp_path: Path, repository: Path
) -> None:  # fmt: skip
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.model.device.ahead_of_time", str(capability), *cases],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("compiled") == sum(len(CASES[case].steps) for case in cases)


@pytest.mark.exhaustive
@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton brings no ptxas")
def test_steps_with_adapters_have_the_operations_of_steps_without_in_their_order(
    tmp_path: Path, repository: Path
) -> None:  # fmt: skip
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.model.device.orders"],
        cwd=repository, env=environment, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("kept") > 10
