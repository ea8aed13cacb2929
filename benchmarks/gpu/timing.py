"""Timing on the device and the machine's own ceilings, which every limit of the GPU benchmark is a multiple of.

- *read rate*: bytes of a 4 GB matrix that our product kernel reads once, over the median time; the best of a few
  tilings.
- *copy rate*: pinned host memory to the device by the copy engine, in pieces of one expert.
- *median*: over replays timed one by one with device events, after warm-up; nothing synchronises in between.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from server.model.device.kernels import trunk


def median_ms(run: Callable[[], Any], *, repeats: int = 30, warmup: int = 5) -> float:
    """Median milliseconds of `run` on the device."""
    for _ in range(warmup):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def mean_ms(run: Callable[[], Any], *, repeats: int) -> float:
    """Mean milliseconds over consecutive runs, for runs that differ from each other; no warm-up."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(repeats):
        run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / repeats


def wall_ms(run: Callable[[], Any], *, repeats: int, warmup: int = 1) -> float:
    """Median wall-clock milliseconds, the device's work included."""
    times = []
    for attempt in range(warmup + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if attempt >= warmup:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def read_rate() -> float:
    """Bytes a second."""
    width, rows = 2048, 1 << 20
    matrix = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_()
    x = torch.randn(width, device="cuda").bfloat16()
    out = torch.empty(rows, device="cuda")
    best = min(
        median_ms(
            lambda tile=tile, warps=warps: trunk.product[(rows // tile,)](
                x, x, matrix, x, x, x, out, x, x, x, 1e-6, rows, B=1, K=width, KP=width, STRIDE=width, BN=tile, GROUP=0,
                NORM=False, BIAS=False, RESIDUAL=False, SCALE=1.0, CAP=0.0, ADAPTED=False, RANK=0, PDL=False,
                num_warps=warps,
            ),
            repeats=10,
        )
        for tile, warps in ((8, 4), (16, 4), (16, 8), (4, 4))
    )  # fmt: skip
    return matrix.nbytes / best * 1e3


def pinned_spans(num: int, elements: int) -> tuple[torch.Tensor, float]:
    """Random spans [num, elements] in page-locked memory, and the rate at which it was pinned, bytes a second."""
    started = time.perf_counter()
    spans = torch.empty(num, elements, dtype=torch.bfloat16, pin_memory=True)
    rate = spans.nbytes / (time.perf_counter() - started)
    spans.copy_(torch.empty(num, elements, dtype=torch.bfloat16, device="cuda").normal_(0.0, 0.03))
    return spans, rate


def copy_rate(spans: torch.Tensor) -> float:
    """Bytes a second of the copy engine."""
    target = torch.empty_like(spans[0], device="cuda")
    pieces = spans[:64]

    def run() -> None:
        for piece in pieces:
            target.copy_(piece, non_blocking=True)

    return pieces.nbytes / median_ms(run, repeats=5, warmup=1) * 1e3
