"""The output of every benchmark: where it ran, a table, and one JSON line last on standard output.

Invariant: a result carries the commit, the device and the versions that it was measured with; the README's figures cite
result files under `benchmarks/results/` that were written by `finish`.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
BUNDLED = REPOSITORY / "models" / "tiny-moe"
"""The bundled checkpoint."""


def environment(device: str = "cpu") -> dict[str, Any]:
    """Commit, device, core count and versions; imports torch only to name a GPU."""
    name = _processor()
    if device.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "commit": _commit(),
        "device": device,
        "device_name": name,
        "num_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "safetensors")},
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal too; floats with three significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[at]) for line in [list(columns), *cells]) for at in range(len(columns))]
    lines = [list(columns), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write `result` to `benchmarks/results/{name}.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def finish(name: str, result: dict[str, Any], *, save: bool) -> None:
    """Print `result` as the last line, and write it to `benchmarks/results/{name}.json` when asked."""
    if save:
        write_result(name, result)
        print(f"saved benchmarks/results/{name}.json")
    print(json.dumps(result))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _commit() -> str:
    """The commit and whether the packages differ from it; BENCH_COMMIT where the copy that runs has no git."""
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "expert_store", "router", "extractor", "server"
    )
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
