"""Benchmarks run by hand: a renamed module or function of ours must be noticed without running them."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = sorted(
    ".".join(path.relative_to(BENCHMARKS.parent).with_suffix("").parts) for path in BENCHMARKS.rglob("*.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_benchmark_imports_what_exists(name: str) -> None:
    if name == "benchmarks.service.load_users":
        pytest.importorskip("locust")
    if name == "benchmarks.cpu.llama":
        pytest.importorskip("gguf")
    if name.startswith("benchmarks.gpu"):
        pytest.importorskip("triton")
    importlib.import_module(name)
