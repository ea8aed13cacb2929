"""Enqueues a kernel, or only compiles it: compiling makes the same call as launching, so nothing else is compiled."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, compiles: bool, **constants: Any) -> None:
    """Enqueues a Triton kernel on the current stream; `compiles`: only compiles it, see `graphs.in_parallel`."""
    if compiles:
        kernel.warmup(*args, grid=grid, **constants)
    else:
        kernel[grid](*args, **constants)
