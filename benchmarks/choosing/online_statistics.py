"""The cost of collecting statistics while serving: decode with and without it, in turns, in one process.

    python -m benchmarks.choosing.online_statistics [--checkpoint models/tiny-moe] [--pairs 800] [--save]

A *block* is `--block` decode steps of the engine's batch over `--rows` rows, all of it: schedule, forward, sampling,
detokenising, ledger, events. The same rows go on and on; blocks with and without the collector come in pairs, in random
order within each, so close together that whatever else the machine does falls on both alike. *Overhead* is the seconds
of all blocks with ÷ those of all without − 1, and its interval the middle 95 % over resampled pairs. Seconds are CPU
time of the engine's thread (with one compute thread that is all there is) and, beside it, wall time. *Accounted* is the
share of the steps' time that the collector says it took, which its budget holds at `MAX_SHARE`; *observed* the share of
the tokens that were observed. Prompts' steps are not timed; the first pairs after each warm up and are not counted.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from expert_store.store import Store
from router.ledger import UsageLedger
from server.engine.batch import Batch
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sequence import Sequence
from server.engine.snapshots import StatisticsFile
from server.engine.statistics import MAX_SHARE, OnlineStatistics, collect_from, empty_statistics
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import Runner, RunnerOptions

TEXTS = ["Once upon a time there was a", "The capital of France is", "Der Hund ist groß und", "def main():"]
WARMUP_PAIRS = 4
MAX_TOKENS = 512


@dataclass(frozen=True)
class Block:
    """Seconds of one block: wall, and CPU of this thread."""

    wall: float
    cpu: float


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--pairs", type=int, default=800, help="for each number of rows")
    parser.add_argument("--block", type=int, default=4, help="decode steps of a block")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(
            Store.open(make_store(options.checkpoint, Path(folder) / "store")),
            RunnerOptions(device=torch.device("cpu"), dtype=getattr(torch, options.dtype), num_slots=options.slots),
        )
        for rows in options.rows:
            runner = HostRunner(model, max_rows=rows, max_tokens=MAX_TOKENS)
            file = StatisticsFile(Path(folder) / f"statistics-{rows}", empty_statistics(model.store.manifest), 60.0)
            results.append(_measure(runner, collect_from(runner, file), rows, options.pairs, options.block))
    columns = ["rows", "CPU ms a step without", "with", "overhead, CPU", "wall", "accounted", "observed"]
    print(table(columns, [_row(result) for result in results]))
    finish(
        "online_statistics",
        {
            "environment": environment(),
            "checkpoint": options.checkpoint.name,
            "dtype": options.dtype,
            "slots": options.slots,
            "block_steps": options.block,
            "budget": MAX_SHARE,
            "results": results,
        },
        save=options.save,
    )


def _measure(runner: Runner, collector: OnlineStatistics, rows: int, num_pairs: int, steps: int) -> dict[str, Any]:
    pairs: list[tuple[Block, Block]] = []
    order = random.Random(0)
    num_collected = 0
    while len(pairs) < num_pairs:
        batch = _prompted(runner, rows)
        fitting = (MAX_TOKENS - 64) // (2 * steps)
        for pair in range(min(WARMUP_PAIRS + num_pairs - len(pairs), fitting)):
            blocks: dict[bool, Block] = {}
            for is_collecting in order.sample([True, False], 2):
                batch.collector = collector if is_collecting else None
                blocks[is_collecting] = _block(batch, steps)
            num_collected += steps * rows
            if pair >= WARMUP_PAIRS:
                pairs.append((blocks[False], blocks[True]))
        batch.cancel({f"row-{row}" for row in range(rows)})
    return {
        "rows": rows,
        "pairs": len(pairs),
        "step_ms_without": 1e3 * float(np.median([without.cpu for without, _ in pairs])) / steps,
        "step_ms_with": 1e3 * float(np.median([with_.cpu for _, with_ in pairs])) / steps,
        "overhead_cpu": _overhead([(without.cpu, with_.cpu) for without, with_ in pairs]),
        "overhead_wall": _overhead([(without.wall, with_.wall) for without, with_ in pairs]),
        "accounted_share": collector.spent_seconds / collector.served_seconds,
        "observed_share": collector.num_observed_tokens / num_collected,
    }


def _prompted(runner: Runner, rows: int) -> Batch:
    """A batch whose rows have their prompts behind them and room for all the blocks."""
    batch = Batch(
        runner, UsageLedger(runner.model.num_layers, runner.model.store.manifest.model.num_experts, "benchmark"), 256
    )
    for row in range(rows):
        ids = tuple(runner.model.tokenizer(TEXTS[row % len(TEXTS)]).input_ids)
        params = SamplingParams(max_new_tokens=MAX_TOKENS - len(ids), ignore_eos=True)
        batch.admit(Sequence(GenerationRequest(f"row-{row}", ids, params), lambda event: None, lambda sequence: None))
        batch.step()
    return batch


def _block(batch: Batch, steps: int) -> Block:
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        batch.step()
    return Block(time.perf_counter() - wall, time.thread_time() - cpu)


def _overhead(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of (without, with): the ratio of their sums less 1, and its middle 95 % over resampled pairs."""
    values = np.array(pairs)
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    sums = values[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 1] / sums[:, 0] - 1, [0.025, 0.975])
    total = values.sum(axis=0)
    return {"overhead": float(total[1] / total[0] - 1), "low": float(low), "high": float(high)}


def _row(result: dict[str, Any]) -> list[object]:
    def percent(value: dict[str, float]) -> str:
        return f"{value['overhead']:+.1%} ({value['low']:+.1%} to {value['high']:+.1%})"

    return [
        result["rows"],
        result["step_ms_without"],
        result["step_ms_with"],
        percent(result["overhead_cpu"]),
        percent(result["overhead_wall"]),
        f"{result['accounted_share']:.2%}",
        f"{result['observed_share']:.1%}",
    ]


if __name__ == "__main__":
    main()
