"""What collecting statistics while serving costs: decode with and without it, in turns, in one process.

    python -m benchmarks.online_statistics [--checkpoint models/tiny-moe] [--rounds 120] [--save]

A *block* is `--tokens` decode steps of the engine's batch over `--rows` rows, all of it: schedule, forward, sampling,
detokenising, ledger, events. Blocks with and without the collector take turns in random order within each pair, over
the same rows and texts, in one process, so that whatever else the machine does falls on both alike. *Overhead* is the
seconds of all blocks with ÷ those of all without − 1; the fifth of the pairs with the slowest blocks is left out,
whichever side was slow. Its interval is the middle 95 % over resampled pairs. Seconds are wall time and, beside it, CPU
time of the engine's thread (with one compute thread that is all there is). *Accounted* is the share of the steps' time
that the collector says it took, which its budget holds at `MAX_SHARE`; *observed* the share of the tokens that were
observed. The first pairs warm up and are not counted.
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

from benchmarks.reporting import REPOSITORY, environment, finish, table
from expert_store.store import Store
from extractor.checkpoint import Checkpoint
from extractor.prepare import prepare
from extractor.selection import SelectionRequest
from router.ledger import UsageLedger
from server.engine.batch import Batch
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.sequence import Sequence
from server.engine.statistics import MAX_SHARE, OnlineStatistics, collect_from, empty_statistics
from server.engine.statistics_file import StatisticsFile
from server.model.assembly import load_model
from server.model.runner import Runner

TEXTS = ["Once upon a time there was a", "The capital of France is", "Der Hund ist groß und", "def main():"]
WARMUP_PAIRS = 3
LEFT_OUT = 0.2


@dataclass(frozen=True)
class Block:
    """Seconds of one block: wall, and CPU of this thread."""

    wall: float
    cpu: float


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "models" / "tiny-moe")
    parser.add_argument("--rounds", type=int, default=120, help="pairs of blocks for each number of rows")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a block")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        prepare(Checkpoint.open(options.checkpoint), store, SelectionRequest()).run()
        model = load_model(
            Store.open(store),
            device=torch.device("cpu"),
            dtype=getattr(torch, options.dtype),
            num_slots=options.slots,
        )
        for rows in options.rows:
            runner = Runner(model, max_rows=rows, max_tokens=(WARMUP_PAIRS + options.rounds) * 2 * options.tokens + 64)
            file = StatisticsFile(Path(folder) / f"statistics-{rows}", empty_statistics(model.store.manifest), 60.0)
            results.append(_measure(runner, collect_from(runner, file), rows, options.rounds, options.tokens))
    columns = ["rows", "ms a step without", "with", "overhead, wall", "CPU", "accounted", "observed"]
    print(table(columns, [_row(result) for result in results]))
    finish(
        "online_statistics",
        {
            "environment": environment(),
            "checkpoint": options.checkpoint.name,
            "dtype": options.dtype,
            "slots": options.slots,
            "block_steps": options.tokens,
            "budget": MAX_SHARE,
            "results": results,
        },
        save=options.save,
    )


def _measure(runner: Runner, collector: OnlineStatistics, rows: int, rounds: int, tokens: int) -> dict[str, Any]:
    pairs: list[tuple[Block, Block]] = []
    order = random.Random(0)
    ledger = UsageLedger(runner.model.num_layers, runner.model.cache.num_experts, "benchmark")
    for pair in range(WARMUP_PAIRS + rounds):
        blocks: dict[bool, Block] = {}
        for is_collecting in order.sample([True, False], 2):
            blocks[is_collecting] = _block(runner, ledger, collector if is_collecting else None, rows, tokens)
        if pair >= WARMUP_PAIRS:
            pairs.append((blocks[False], blocks[True]))
    num_tokens = (WARMUP_PAIRS + rounds) * tokens * rows
    return {
        "rows": rows,
        "pairs": rounds,
        "step_ms_without": 1e3 * float(np.median([without.wall for without, _ in pairs])) / tokens,
        "step_ms_with": 1e3 * float(np.median([with_.wall for _, with_ in pairs])) / tokens,
        "overhead_wall": _overhead([(without.wall, with_.wall) for without, with_ in pairs]),
        "overhead_cpu": _overhead([(without.cpu, with_.cpu) for without, with_ in pairs]),
        "accounted_share": collector.spent_seconds / collector.served_seconds,
        "observed_share": collector.num_observed_tokens / num_tokens,
    }


def _block(runner: Runner, ledger: UsageLedger, collector: OnlineStatistics | None, rows: int, tokens: int) -> Block:
    """One block from fresh prompts; the prompts' own steps are not timed."""
    if runner.model.observer is not None:
        runner.model.observer.is_on = False
    batch = Batch(runner, ledger, 256)
    params = SamplingParams(max_new_tokens=tokens + 8, ignore_eos=True)
    for row in range(rows):
        ids = tuple(runner.model.tokenizer(TEXTS[row % len(TEXTS)]).input_ids)
        batch.admit(Sequence(GenerationRequest(f"row-{row}", ids, params), lambda event: None, lambda sequence: None))
        batch.step()
    batch.collector = collector
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(tokens):
        batch.step()
    block = Block(time.perf_counter() - wall, time.thread_time() - cpu)
    batch.cancel({f"row-{row}" for row in range(rows)})
    return block


def _overhead(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Of (without, with): the ratio of their sums less 1, and its middle 95 % over resampled pairs."""
    values = np.array(pairs)
    slower = values.max(axis=1)
    values = values[slower <= np.quantile(slower, 1 - LEFT_OUT)]
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
        percent(result["overhead_wall"]),
        percent(result["overhead_cpu"]),
        f"{result['accounted_share']:.2%}",
        f"{result['observed_share']:.1%}",
    ]


if __name__ == "__main__":
    main()
