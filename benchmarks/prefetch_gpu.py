"""Fetching ahead on a GPU: a decode step with and without it, side by side in one run on one trace.

What is measured, in words:
- *step*: the mean captured step over the trace's second part, batch 1, KV memory 1,024 tokens deep, the trace's choices
  replacing the routers'; *ratio*: over the larger of resident step (given) and missed bytes at the copy engine's rate.
- *right*: the trace has no hidden states, so its guesses are made up: each true pick is among the guessed K with this
  probability one layer early, and with 0.04 less two layers early; the others are experts by popularity, all in random
  order. 0 is what always being wrong costs, 1 the most that can be won; what real routers reach is measured by
  `benchmarks.prefetch`. *none*: without fetching ahead.
- *equal*: the last step's logits equal those without fetching ahead, bit for bit, and the page table is sound.
- *own*: the routers' own choices and guesses by their own gates, random weights: equal only, its times mean nothing.

Shape: Qwen3-30B-A3B, bf16, random weights, half or a quarter of the experts in slots.

    python -m benchmarks.prefetch_gpu [--save]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_paging, gpu_timing
from benchmarks.decode_gpu import CONTEXT, DEVICE, QWEN
from benchmarks.prefetch import guessed_at_random, two_early
from benchmarks.reporting import environment, finish, table
from expert_store.paging.pages import DevicePages, PagesShape
from server.model.device.graph import StepGraph
from server.model.device.options import StepOptions
from server.model.device.prefetch import Prefetch
from server.model.device.state import RowState
from server.model.device.step import DecodeStep
from server.model.device.weights import random_trunk

STEPS, WARMUP = 144, 64
PIN_BYTES = 3 << 30
PLANS = (
    # skew, stickiness, share of the experts in slots, probabilities, programs
    (1.0, 0.5, 0.5, (None, 0.0, 0.76, 0.88, 1.0, None), 16),
    (1.0, 0.5, 0.5, (0.88,), 8),
    (1.0, 0.5, 0.5, (0.88,), 12),
    (1.0, 0.5, 0.5, (0.88,), 32),
    (1.0, 0.5, 0.25, (None, 0.0, 0.88), 16),
    (0.6, 0.3, 0.5, (None, 0.0, 0.88), 16),
)


class Bench:
    """Weights, host memory and rates that all rows share."""

    def __init__(self, resident_ms: float) -> None:
        torch.manual_seed(0)
        self.resident_ms = resident_ms
        self.trunk, self.state = random_trunk(QWEN, DEVICE), RowState(QWEN, DEVICE)
        self.spans, _ = gpu_timing.pinned_spans(PIN_BYTES // (QWEN.span_elements * 2), QWEN.span_elements)
        self.copy_rate = gpu_timing.copy_rate(self.spans)
        self.logits: dict[tuple[float, float], torch.Tensor] = {}

    def row(self, skew: float, stickiness: float, share: float, right: float | None, programs: int) -> dict[str, Any]:
        """One graph over one trace."""
        trace = gpu_paging.synthetic(STEPS, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, skew, stickiness, seed=1)
        pages = self._pages(int(share * QWEN.num_experts))
        forced = torch.from_numpy(np.ascontiguousarray(trace[:, :, None])).to(DEVICE)
        options = StepOptions(greedy=True, pdl=True, forced=forced)
        ahead = None
        if right is not None:
            ahead = Prefetch(
                QWEN, pages, tile_rows=options.tuning.up_rows, num_programs=programs, forced=_guesses(trace, right)
            )
        step, replay = self._graph(pages, options, ahead)
        for _ in range(WARMUP):
            replay()
        torch.cuda.synchronize()
        pages.stats.zero_()
        step_ms = gpu_timing.mean_ms(replay, repeats=STEPS - WARMUP)
        pages.check_integrity()
        logits = self.logits.setdefault((skew, share), step.logits.cpu())
        copy_ms = float(pages.stats[:, 1].sum()) / (STEPS - WARMUP) * QWEN.span_elements * 2 / self.copy_rate * 1e3
        return {
            "skew": skew, "share": share, "right": "none" if right is None else right, "programs": programs,
            "step_ms": step_ms, "copy_ms": copy_ms, "ratio": step_ms / max(self.resident_ms, copy_ms),
            "equal": torch.equal(logits, step.logits.cpu()),
        }  # fmt: skip

    def own(self) -> dict[str, Any]:
        """The routers' own choices for 24 steps, with guesses by the next layers' gates and without."""
        logits, fetched = [], 0
        for on in (False, True):
            pages = self._pages(QWEN.num_experts // 2)
            options = StepOptions(greedy=True, pdl=True)
            ahead = Prefetch(QWEN, pages, tile_rows=options.tuning.up_rows) if on else None
            step, replay = self._graph(pages, options, ahead)
            for _ in range(24):
                replay()
            torch.cuda.synchronize()
            pages.check_integrity()
            logits.append(step.logits.cpu())
            if ahead is not None:
                fetched = int((ahead.state % 4 == 2).sum())
        return {"equal": torch.equal(*logits), "tiles_in_lanes": fetched}

    def _pages(self, num_slots: int) -> DevicePages:
        gc.collect()
        torch.cuda.empty_cache()
        index = torch.arange(QWEN.num_layers * QWEN.num_experts).view(QWEN.num_layers, -1) % len(self.spans)
        shape = PagesShape(
            QWEN.num_layers, QWEN.num_experts, QWEN.top_k, num_slots, QWEN.span_elements, 1, QWEN.dtype
        )  # fmt: skip
        pages = DevicePages(shape, self.spans, index, device=DEVICE)
        pages.seed(torch.arange(num_slots).expand(QWEN.num_layers, num_slots))
        return pages

    def _graph(self, pages: DevicePages, options: StepOptions, ahead: Prefetch | None) -> tuple[DecodeStep, Any]:
        step = DecodeStep(QWEN, self.trunk, pages, self.state, 1, options, ahead=ahead)
        graph = StepGraph(step)
        graph.capture()
        step.rows.fill_(0)
        step.tokens.fill_(5)
        self.state.lengths.fill_(CONTEXT)
        for memory in (*self.state.keys, *self.state.values):
            memory.zero_()
        pages.step.fill_(-1)
        pages.last_use.fill_(-1)
        if ahead is not None:
            ahead.reset()
        return step, graph.replay


def _guesses(trace: gpu_paging.Trace, right: float) -> torch.Tensor:
    """[steps, L, 2, K] int32, best first."""
    found = []
    for distance, share in enumerate((right, two_early(right))):
        scores = guessed_at_random(trace.astype(np.int64), QWEN.num_experts, share, seed=3 + distance)
        found.append(np.argsort(-scores, axis=2)[:, :, : QWEN.top_k])
    return torch.from_numpy(np.stack(found, 2).astype(np.int32)).contiguous().to(DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resident-ms", type=float, default=2.95, help="of the step with every expert in a slot")
    parser.add_argument("--limit-seconds", type=float, default=120.0, help="no row starts after this long")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/prefetch_gpu.json")
    arguments = parser.parse_args()
    began = time.perf_counter()
    bench = Bench(arguments.resident_ms)
    rows = []
    for skew, stickiness, share, rights, programs in PLANS:
        for right in rights:
            if time.perf_counter() - began < arguments.limit_seconds:
                rows.append(bench.row(skew, stickiness, share, right, programs))
                print(rows[-1], f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"environment": environment(DEVICE), "copy_rate": bench.copy_rate, "rows": rows}
    result["own"] = bench.own()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish("prefetch_gpu", result, save=arguments.save)


if __name__ == "__main__":
    main()
