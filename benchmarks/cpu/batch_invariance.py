"""The cost of a promise: a request's tokens do not depend on what else is in the batch (`batch_invariant`).

Measured, on the bundled checkpoint with every expert in a slot, the promise on and off in turn in one process:
- *step*: seconds of processor time of one decode step of so many rows (prompts of 256 tokens), the least of the rounds;
- *cost*: the step with the promise over the step without it, less one.

    python -m benchmarks.cpu.batch_invariance [--dtypes bfloat16,float32] [--rows 1,4,8] [--rounds 5] [--save]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from expert_store.store import Store
from server.model.host.assembly import HostModel, load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, RunnerOptions

PROMPT_TOKENS, STEPS = 256, 20


@dataclass(frozen=True)
class Entry:
    """One dtype and number of rows; see the module for the measures."""

    dtype: str
    rows: int
    on_seconds: float
    off_seconds: float
    cost: float


def step_seconds(model: HostModel, num_rows: int) -> float:
    """Processor seconds of one decode step of `num_rows` rows, the mean of `STEPS` steps."""
    runner = HostRunner(model, max_rows=num_rows, max_tokens=PROMPT_TOKENS + STEPS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, model.vocab_size, (num_rows, PROMPT_TOKENS + STEPS), generator=generator)
    rows = [runner.allocate() for _ in range(num_rows)]
    for row, tokens in zip(rows, ids.tolist(), strict=True):
        runner.prefill(row, tokens[:PROMPT_TOKENS])
    start = time.process_time()
    for at in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
        runner.decode([RowStep(row, int(tokens[at])) for row, tokens in zip(rows, ids, strict=True)])
    seconds = (time.process_time() - start) / STEPS
    for row in rows:
        runner.free(row)
    return seconds


def measure(store: Path, dtype: str, sizes: list[int], rounds: int) -> list[Entry]:
    """One entry for each number of rows."""
    models = [
        load_model(
            Store.open(store),
            RunnerOptions(device=torch.device("cpu"), dtype=getattr(torch, dtype), batch_invariant=is_on),
        )
        for is_on in (True, False)
    ]
    entries: list[Entry] = []
    for size in sizes:
        best = [float("inf"), float("inf")]
        for _ in range(rounds):
            best = [min(least, step_seconds(model, size)) for least, model in zip(best, models, strict=True)]
        entries.append(Entry(dtype, size, *best, cost=best[0] / best[1] - 1))
    for model in models:
        model.close()
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--rows", default="1,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/batch_invariance.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processor time of threads that spin would be counted
    sizes = [int(text) for text in arguments.rows.split(",")]
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(BUNDLED, Path(folder) / "store")
        for dtype in arguments.dtypes.split(","):
            entries += measure(store, dtype, sizes, arguments.rounds)
    rows = [(e.dtype, e.rows, 1e3 * e.on_seconds, 1e3 * e.off_seconds, f"{e.cost:+.0%}") for e in entries]
    print(table(("dtype", "rows", "step ms, promise on", "off", "cost"), rows))
    finish(
        "batch_invariance",
        {"environment": environment(), "entries": [asdict(entry) for entry in entries]},
        save=arguments.save,
    )


if __name__ == "__main__":
    main()
