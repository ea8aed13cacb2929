"""Decoding over experts in 4 and 8 bits: step times beside the floors that this machine sets, in one run.

What is measured, in words:
- *resident*: as in `benchmarks.gpu.decode`: one captured step with every expert in a slot, KV memory 1,024 tokens deep;
  its *floor* is the bytes that the step must read over the read rate. The same step over plain bf16 experts is first.
- *tuning*: the same for other tiles of the experts' kernels.
- *paging*: as there, with the trace's choices in the router's place; its bound is the larger of the resident step and
  the missed bytes over the copy rate of pieces of one expert.

Shapes: Qwen3-30B-A3B and that of the recorded traces; random codes with scales that keep activations in range.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import paging as gpu_paging
from benchmarks.gpu import paths as gpu_paths
from benchmarks.gpu import timing as gpu_timing
from benchmarks.gpu.decode import DEVICE, MANY_ROWS, QWEN, SHARES, SYNTHETIC, TRACED, Bench
from benchmarks.gpu.steps import full_pages
from benchmarks.harness.reporting import finish, table
from extractor.encoding import names
from server.model.device.step.graphs import in_parallel
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape

NAMES = {"int4 by 64": "int4-g64", "int4 by 32": "int4", "fp8 by 128": "fp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4",
         "int8 by 128": "int8"}  # fmt: skip
ENCODINGS = {label: (names.ENCODINGS[name], names.ENCODINGS[name]) for label, name in NAMES.items()}
BATCHES = (1, 8, 32)
TUNED: tuple[dict[str, Any], ...] = (
    {"packed_up_rows": 1}, {"packed_up_rows": 4}, {"packed_down_rows": 2},
)  # fmt: skip
FETCHERS: tuple[dict[str, Any], ...] = (
    *({"packed_fetchers": num} for num in (64, 128, 256, 512)), {"packed_fetchers": 256, "packed_up_rows": 1},
    {"packed_fetchers": 256, "packed_up_rows": 4},
)  # fmt: skip


class PackedBench(Bench):
    """The sections over packed shapes; `wanted` are the encodings to run, all if it is empty."""

    wanted: Collection[str] = ()

    def packed(self) -> list[dict[str, Any]]:
        trunk, state, rows = self._trunk("qwen", QWEN), RowState(MANY_ROWS, DEVICE), []
        for name, encodings in {"bf16": None, **ENCODINGS}.items():
            if self.wanted and name not in self.wanted:
                continue
            shape = replace(QWEN, packed=encodings)
            gc.collect()
            torch.cuda.empty_cache()
            pages = full_pages(replace(shape, max_rows=32), DEVICE)
            shapes = {batch: replace(shape, max_rows=8 if batch <= 8 else 32) for batch in BATCHES}
            with in_parallel():
                for batch, one in shapes.items():
                    DecodeStep(one, trunk, pages, state, batch, StepOptions(pdl=batch == 1)).compile()
            for batch, one in shapes.items():
                rows.append({"experts": name, **self._resident_step(one, trunk, pages, state, batch)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if name == "int4 by 64":
                self.result["tuning"] = self._tuning(shape, pages, state)
            del pages
        return rows

    def _tuning(self, shape: DecodeShape, pages: Any, state: RowState) -> list[dict[str, Any]]:
        trunk, found = self._trunk("qwen", QWEN), []
        options = [self._tuned(**changed) for changed in TUNED]
        with in_parallel():
            for one in options:
                DecodeStep(shape, trunk, pages, state, 1, one).compile()
        base = self._time(shape, trunk, pages, state, 1, self._tuned())
        stages = ("gate_up", "down", "route", "attention")
        for stage in stages:
            found.append(
                {"stage": stage, "ms": base - self._time(shape, trunk, pages, state, 1, self._tuned(), [stage])}
            )
        for changed, one in zip(TUNED, options, strict=True):
            found.append({"changed": changed, "ms": self._time(shape, trunk, pages, state, 1, one), "base": base})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        return found

    def paging_packed(self) -> list[dict[str, Any]]:
        rows = []
        for name in ("int4 by 64", "fp8 by 128"):
            shape = replace(QWEN, packed=ENCODINGS[name])
            trunk, state = self._trunk("qwen", QWEN), RowState(QWEN, DEVICE)
            resident_ms = next(r["step_ms"] for r in self.result["packed"] if (r["experts"], r["batch"]) == (name, 1))
            self.copy_rate = gpu_timing.copy_rate(self._host_spans(shape))
            for skew, stickiness in SYNTHETIC:
                trace = gpu_paging.synthetic(144, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, skew, stickiness, 1)
                for share in SHARES:
                    label = f"{name}, zipf {skew}"
                    rows.append(self._paging(shape, trunk, state, trace, share, resident_ms, label, warmup=64))
            self.result[f"copy rate, {name}"] = self.copy_rate
        return rows

    def prefill_packed(self) -> dict[str, Any]:
        """As the section of that name in `decode`, over int4 by 64."""
        shape = replace(QWEN, packed=ENCODINGS["int4 by 64"])
        self.trunks.clear()
        return gpu_paths.prefill(shape, self._host_spans(shape), self.copy_rate)

    def fetchers(self) -> list[dict[str, Any]]:
        """Paging at 25 and 50 % in slots with other numbers of programs that fetch."""
        shape, rows = replace(QWEN, packed=ENCODINGS["int4 by 64"]), []
        trunk, state = self._trunk("qwen", QWEN), RowState(QWEN, DEVICE)
        resident_ms = next(r["step_ms"] for r in self.result["packed"] if r["experts"] == "int4 by 64")
        self.copy_rate = gpu_timing.copy_rate(self._host_spans(shape))
        for (skew, stickiness), share in zip(SYNTHETIC, (0.25, 0.5), strict=True):
            trace = gpu_paging.synthetic(144, QWEN.num_layers, QWEN.num_experts, QWEN.top_k, skew, stickiness, 1)
            for changed in FETCHERS:
                label = f"{changed}, zipf {skew}"
                options = self._tuned(**changed)
                rows.append(self._paging(shape, trunk, state, trace, share, resident_ms, label, 64, options))
        return rows

    def paging_recorded_packed(self) -> list[dict[str, Any]]:
        shape, rows = replace(TRACED, packed=ENCODINGS["int4 by 64"]), []
        trunk, state = self._trunk("traced", TRACED), RowState(TRACED, DEVICE)
        pages = full_pages(shape, DEVICE)
        resident_ms = self._resident_step(shape, trunk, pages, state, 1)["step_ms"]
        del pages
        self.copy_rate = gpu_timing.copy_rate(self._host_spans(shape))
        for task in ("intent", "summary"):
            trace = gpu_paging.recorded(task)
            for share in SHARES:
                rows.append(self._paging(shape, trunk, state, trace[:160], share, resident_ms, task, warmup=80))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/packed_gpu.json")
    parser.add_argument("--only", nargs="*", help="sections to run; machine and packed always run")
    parser.add_argument("--encodings", nargs="*", default=[], help="of the resident steps, by default all")
    arguments = parser.parse_args()
    bench = PackedBench()
    bench.wanted = arguments.encodings
    bench.section("machine", bench.machine)
    bench.section("packed", bench.packed)
    sections = (bench.paging_packed, bench.paging_recorded_packed, bench.fetchers, bench.prefill_packed)
    for section in sections:
        if not arguments.only or section.__name__ in arguments.only:
            bench.section(section.__name__, section)
    for name in ("packed", "paging_packed", "paging_recorded_packed", "fetchers"):
        if rows := bench.result.get(name):
            print(f"\n## {name}\n" + table(list(rows[0]), [list(row.values()) for row in rows]))
    for name in ("machine", "tuning", "prefill_packed", "failed"):
        print(json.dumps({name: bench.result.get(name)}))
    finish("packed_gpu", bench.result, save=arguments.save)


if __name__ == "__main__":
    main()
