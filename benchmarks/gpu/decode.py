"""Decoding on a GPU at the hardware's limit: step times beside the floors that this machine sets, in one run.

What is measured, in words:
- *resident*: one decode step with every expert in a slot, KV memory 1,024 tokens deep, as a captured graph; its
  *floor* is the bytes that the step must read (trunk, and the distinct experts that the batch chose) over the read
  rate.
- *split*: the step without one stage, subtracted from the whole: what that stage adds. Each row has a mask that leaves
  its experts alone, so that all variants choose the same.
- *paging*: the mean step over the trace's second part while a trace's recorded or synthetic choices replace the
  router's; *missed* are the bytes of experts that were in no slot; its *limit* is 1.2 times the larger of the
  resident step and missed bytes over the copy rate.
- *host-driven*, *device-driven*: `decode` of the two runners on the same weights, with their own routers' choices,
  wall clock including what the host does around it; 12 of the 48 layers, since the host-driven one needs its own
  pinned copy.
- *offload*: transformers with accelerate's hooks, a quarter of the layers on the GPU; 4 of the 48 layers, times 12.
- *prefill*: 2,048 tokens through the device-driven runner; floor: the same chunk with every expert resident, or
  missed bytes over the copy rate, the larger.

Shapes: Qwen3-30B-A3B (48 layers, 128 experts, top-8, H 2048, I 768) and that of the recorded traces (26 layers, 64
experts, top-6, H 2048, I 1408, with the same attention), bf16, random weights. Pinned memory holds fewer distinct
spans than the model has, which no copy can tell. Sections that fail are named in the result; the rest stands.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import paging as gpu_paging
from benchmarks.gpu import paths as gpu_paths
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.steps import CONTEXT, STAGES, Replay, full_pages, random_codes, random_experts, random_trunk
from benchmarks.harness.reporting import environment, finish, table
from expert_store.paging.pages import DevicePages, PagesShape, Policy
from server.model.device.step.graphs import in_parallel
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape, TrunkWeights

QWEN = DecodeShape(
    num_layers=48, hidden=2048, num_heads=32, num_kv_heads=4, head_dim=128, vocab=151936, num_experts=128, top_k=8,
    intermediate=768, max_rows=8, max_tokens=4096,
)  # fmt: skip
MANY_ROWS = replace(QWEN, max_rows=32)
"""The same of a server for more requests at once than by default, whose products are other kernels."""
TRACED = replace(QWEN, num_layers=26, num_experts=64, top_k=6, intermediate=1408)
DEVICE = "cuda:0"
SYNTHETIC = ((0.6, 0.3), (1.0, 0.5))
SHARES = (0.125, 0.25, 0.5)
BATCHES = (1, 2, 4, 8, 16, 32)
PIN_BYTES = 6 << 30


class Bench:
    """Weights and rates that the sections share, and the result that they fill."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {"environment": environment("cuda:0"), "failed": {}}
        self.started = time.perf_counter()
        self.read_rate = self.copy_rate = 0.0
        self.trunks: dict[str, TrunkWeights] = {}
        self.packed_for: Any = None

    def section(self, name: str, run: Callable[[], Any]) -> None:
        """Runs one part; a failure is recorded and the next one starts from freed memory."""
        began = time.perf_counter()
        try:
            self.result[name] = run()
        except Exception as error:
            traceback.print_exc()
            self.result["failed"][name] = repr(error)[:300]
        gc.collect()
        torch.cuda.empty_cache()
        now = time.perf_counter()
        print(json.dumps({name: self.result.get(name)}), file=sys.stderr)
        print(f"[{now - self.started:.0f} s] {name}: {now - began:.0f} s", file=sys.stderr, flush=True)

    def machine(self) -> dict[str, float]:
        self.read_rate = gpu_timing.read_rate()
        self.spans, pin_rate = gpu_timing.pinned_spans(PIN_BYTES // (QWEN.span_elements * 2), QWEN.span_elements)
        self.copy_rate = gpu_timing.copy_rate(self.spans)
        return {"read_rate": self.read_rate, "copy_rate": self.copy_rate, "pin_rate": pin_rate}

    # -- resident ------------------------------------------------------------------------------------------------------

    def resident(self) -> list[dict[str, Any]]:
        trunk = self._trunk("qwen", QWEN)
        pages, state = full_pages(MANY_ROWS, DEVICE), RowState(MANY_ROWS, DEVICE)
        rows = []
        shapes = {batch: QWEN if batch <= QWEN.max_rows else MANY_ROWS for batch in BATCHES}
        with in_parallel():
            for batch, shape in shapes.items():
                DecodeStep(shape, trunk, pages, state, batch, StepOptions(pdl=batch == 1)).compile()
        for batch, shape in shapes.items():
            rows.append(self._resident_step(shape, trunk, pages, state, batch))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        self.result["split"] = self._split(trunk, pages, state)
        self.result["variants"] = {
            "without dependent launch": self._time(QWEN, trunk, pages, state, 1, StepOptions()),
            **{
                f"{splits} attention splits": self._time(
                    QWEN, trunk, pages, state, 1, self._tuned(attention_splits=splits)
                )
                for splits in (8, 32)
            },
            **{
                f"router on {warps} warps": self._time(QWEN, trunk, pages, state, 1, self._tuned(route_warps=warps))
                for warps in (1, 4)
            },
            **{
                f"{rows} up rows": self._time(QWEN, trunk, pages, state, 1, self._tuned(up_rows=rows))
                for rows in (2, 8)
            },
            "blocks of KV memory in any order": self._in_any_order(trunk, pages, state),
        }
        return rows

    def _in_any_order(self, trunk: TrunkWeights, pages: DevicePages, state: RowState) -> float:
        in_order = state.table.clone()
        state.table.copy_(torch.randperm(state.table.numel(), device=DEVICE).view(state.table.shape))
        step_ms = self._time(QWEN, trunk, pages, state, 1, StepOptions(pdl=True))
        state.table.copy_(in_order)
        return step_ms

    def _resident_step(
        self, shape: DecodeShape, trunk: TrunkWeights, pages: DevicePages, state: RowState, batch: int
    ) -> dict[str, Any]:
        began = time.perf_counter()
        replay = Replay(shape, trunk, pages, state, batch, StepOptions(pdl=batch == 1))
        build_seconds = time.perf_counter() - began
        step_ms = gpu_timing.median_ms(replay)
        ids = replay.step.log_ids.cpu()
        distinct = sum(len(set(layer.flatten().tolist())) for layer in ids) / shape.num_layers
        floor_bytes = shape.trunk_bytes + shape.num_layers * distinct * shape.span_bytes
        floor_ms = floor_bytes / self.read_rate * 1e3
        return {
            "batch": batch,
            "step_ms": step_ms,
            "floor_ms": floor_ms,
            "ratio": step_ms / floor_ms,
            "distinct": distinct,
            "compile_and_capture_seconds": build_seconds,
        }

    def _split(self, trunk: TrunkWeights, pages: DevicePages, state: RowState) -> dict[str, dict[str, float]]:
        split = {}
        for batch in (1, 8):
            # Without a stage the rows would converge and choose fewer experts.
            trace = gpu_paging.synthetic(batch, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, 0.0, 0.0, seed=2)
            state.masks[:batch] = 0
            state.masks[:batch].scatter_(2, torch.from_numpy(trace).long().to(DEVICE), 1)
            options = StepOptions(pdl=batch == 1, masked=True)
            whole = self._time(QWEN, trunk, pages, state, batch, options)
            parts = {}
            for stage in STAGES:
                parts[stage] = whole - self._time(QWEN, trunk, pages, state, batch, options, without=[stage])
            split[f"batch {batch}"] = {"whole": whole, **parts}
        return split

    # -- paging --------------------------------------------------------------------------------------------------------

    def paging_synthetic(self) -> list[dict[str, Any]]:
        trunk, state = self._trunk("qwen", QWEN), RowState(QWEN, DEVICE)
        resident_ms = next(row["step_ms"] for row in self.result["resident"] if row["batch"] == 1)
        rows = []
        for skew, stickiness in SYNTHETIC:
            trace = gpu_paging.synthetic(144, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, skew, stickiness, seed=1)
            for share in SHARES:
                name = f"zipf {skew}, sticky {stickiness}"
                rows.append(self._paging(QWEN, trunk, state, trace, share, resident_ms, name, warmup=64))
        return rows

    def paging_recorded(self) -> list[dict[str, Any]]:
        trunk, state = self._trunk("traced", TRACED), RowState(TRACED, DEVICE)
        pages = full_pages(TRACED, DEVICE)
        resident_ms = self._resident_step(TRACED, trunk, pages, state, 1)["step_ms"]
        del pages
        rows = []
        for task in ("intent", "summary"):
            trace = gpu_paging.recorded(task)
            for share in SHARES:
                rows.append(self._paging(TRACED, trunk, state, trace[:160], share, resident_ms, task, warmup=80))
        return rows

    def paging_variants(self) -> list[dict[str, Any]]:
        """Gains of the choices of the paging path, on one trace with few and one with many misses."""
        trunk, state = self._trunk("qwen", QWEN), RowState(QWEN, DEVICE)
        resident_ms = next(row["step_ms"] for row in self.result["resident"] if row["batch"] == 1)
        rows = []
        cases: list[tuple[int, float, list[dict[str, Any]]]] = [
            (1, 0.5, [{"fetchers": 16}, {"fetchers": 64}, {"down_fetches": False}, {"pdl": False}]),
            (0, 0.25, [{"fetchers": 16}, {"copy_elements": 16384}, {"down_fetches": False}]),
        ]
        for at, share, variants in cases:
            skew, stickiness = SYNTHETIC[at]
            trace = gpu_paging.synthetic(144, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, skew, stickiness, seed=1)
            for changed in variants:
                name = f"{changed}, zipf {skew}"
                options = StepOptions() if "pdl" in changed else self._tuned(**changed)
                rows.append(self._paging(QWEN, trunk, state, trace, share, resident_ms, name, 64, options))
        return rows

    def policies(self) -> list[dict[str, Any]]:
        """Hit rates over the second half of 640 recorded tokens; usage to pin by comes from the first half."""
        trunk, state = self._trunk("traced", TRACED), RowState(TRACED, DEVICE)
        rows = []
        for task in ("intent", "summary"):
            trace = gpu_paging.recorded(task)
            for share in SHARES:
                num_slots = int(share * TRACED.num_experts)
                row = {"task": task, "slots": num_slots}
                for name, policy, kept in (
                    ("lru", "lru", 0),
                    ("lfu", "lfu", 0),
                    ("pinned", "lru", num_slots - TRACED.top_k),
                ):
                    row[name] = self._hit_rate(trunk, state, trace, num_slots, policy, kept)
                row["belady"] = gpu_paging.belady_hit_rate(trace, num_slots, TRACED.num_experts, len(trace) // 2)
                rows.append(row)
        return rows

    def _hit_rate(
        self, trunk: TrunkWeights, state: RowState, trace: gpu_paging.Trace, num_slots: int, policy: str, kept: int
    ) -> float:
        """The device's own page table over the trace; experts' products and trunk left out, since nothing reads
        them.
        """
        order = gpu_paging.most_used(trace[: len(trace) // 2], num_slots, TRACED.num_experts) if kept else None
        pages = self._pages(TRACED, num_slots, policy, kept, order)
        without = set(STAGES) - {"embed", "route"}
        replay = Replay(TRACED, trunk, pages, state, 1, StepOptions(), trace=trace, without=without)
        for step in range(len(trace)):
            if step == len(trace) // 2:
                pages.stats.zero_()
            replay()
        return pages.hit_rate()

    def _paging(
        self, shape: DecodeShape, trunk: TrunkWeights, state: RowState, trace: gpu_paging.Trace, share: float,
        resident_ms: float, name: str, warmup: int, options: StepOptions | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        num_slots = int(share * shape.num_experts)
        pages = self._pages(shape, num_slots)
        replay = Replay(shape, trunk, pages, state, 1, options or StepOptions(pdl=True), trace=trace)
        for _ in range(warmup):
            replay()
        torch.cuda.synchronize()
        pages.stats.zero_()
        state.lengths.fill_(CONTEXT)
        steps = len(trace) - warmup
        step_ms = gpu_timing.mean_ms(replay, repeats=steps)
        pages.check_integrity()
        missed = float(pages.stats[:, 1].sum()) / steps * shape.span_bytes
        copy_ms = missed / self.copy_rate * 1e3
        bound_ms = max(resident_ms, copy_ms)
        row = {
            "trace": name, "slots": num_slots, "share": share, "hit_rate": pages.hit_rate(), "missed_bytes": missed,
            "step_ms": step_ms, "copy_ms": copy_ms, "resident_ms": resident_ms, "ratio": step_ms / bound_ms,
            "pcie_rate": missed / step_ms * 1e3,
        }  # fmt: skip
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row

    # -- building ------------------------------------------------------------------------------------------------------

    def _trunk(self, name: str, shape: DecodeShape) -> TrunkWeights:
        if name not in self.trunks:
            self.trunks.clear()
            self.trunks[name] = random_trunk(shape, DEVICE)
        return self.trunks[name]

    def _pages(
        self, shape: DecodeShape, num_slots: int, policy: str = "lru", kept: int = 0, order: Any = None
    ) -> DevicePages:
        spans = self._host_spans(shape)
        index = torch.arange(shape.num_layers * shape.num_experts).view(shape.num_layers, -1) % len(spans)
        paged = PagesShape(
            shape.num_layers, shape.num_experts, shape.top_k, num_slots, shape.span_elements, 1, shape.span_dtype
        )
        chosen: Policy = "lfu" if policy == "lfu" else "lru"
        pages = DevicePages(paged, spans, index, device=DEVICE, policy=chosen, num_kept=kept)
        random_experts(shape, pages.slots)
        first = np.arange(num_slots)[None].repeat(shape.num_layers, axis=0) if order is None else order
        pages.adopt(torch.from_numpy(np.ascontiguousarray(first)))
        return pages

    def _host_spans(self, shape: DecodeShape) -> torch.Tensor:
        """The page-locked memory as spans of this shape; packed ones all have scales of their own."""
        spans = self.spans.view(-1).view(shape.span_dtype)
        spans = spans[: spans.numel() // shape.span_elements * shape.span_elements].view(-1, shape.span_elements)
        if shape.packed is not None and self.packed_for != (shape.packed, shape.span_elements):
            some = torch.empty(64, shape.span_elements, dtype=torch.int32, device=DEVICE)
            random_codes(shape, some)
            for part in spans.split(64):
                part.copy_(some[: len(part)])
            self.packed_for = shape.packed, shape.span_elements
        return spans

    def _tuned(self, **sizes: Any) -> StepOptions:
        base = StepOptions(pdl=True)
        return replace(base, tuning=replace(base.tuning, **sizes))

    def _time(
        self, shape: DecodeShape, trunk: TrunkWeights, pages: DevicePages, state: RowState, batch: int,
        options: StepOptions, without: Collection[str] = (),
    ) -> float:  # fmt: skip
        return gpu_timing.median_ms(Replay(shape, trunk, pages, state, batch, options, without=without))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decode_gpu.json")
    parser.add_argument("--only", nargs="*", help="sections to run; machine and resident always run")
    parser.add_argument("--limit-seconds", type=float, default=540.0, help="no section starts after this long")
    arguments = parser.parse_args()
    bench = Bench()
    bench.section("machine", bench.machine)
    bench.section("resident", bench.resident)
    sections: dict[str, Callable[[], Any]] = {
        "paging_synthetic": bench.paging_synthetic,
        "paging_recorded": bench.paging_recorded,
        "prefill": lambda: gpu_paths.prefill(QWEN, bench.spans, bench.copy_rate),
        "runners": lambda: gpu_paths.runners(QWEN),
        "offload": lambda: gpu_paths.offload(QWEN),
        "paging_variants": bench.paging_variants,
        "policies": bench.policies,
    }
    for name, run in sections.items():
        if time.perf_counter() - bench.started > arguments.limit_seconds:
            bench.result["failed"][name] = "not begun within the time limit"
        elif not arguments.only or name in arguments.only:
            if name in ("runners", "prefill", "offload"):
                bench.trunks.clear()
            bench.section(name, run)
    bench.result["seconds"] = time.perf_counter() - bench.started
    report(bench.result)
    finish("decode_gpu", bench.result, save=arguments.save)


def report(result: dict[str, Any]) -> None:
    """Prints the tables that there are figures for."""
    for name in ("resident", "paging_recorded", "paging_synthetic", "paging_variants", "policies"):
        rows = result.get(name)
        if rows:
            print(f"\n## {name}\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    for name in ("machine", "split", "variants", "runners", "prefill", "offload", "failed"):
        if result.get(name):
            print(f"\n## {name}\n{json.dumps(result[name], indent=1)}")


if __name__ == "__main__":
    main()
