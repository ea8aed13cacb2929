"""Three ways in which OpenMP's threads wait (spin, sleep, spin for a moment), on a quiet machine and on a busy one.

Metric, in words: *tokens/s* is the decode rate that `deepfew generate STORE PROMPT --json` reports, one process for
each figure, `--tokens` greedy tokens. The ways to wait take turns, first with nothing beside them, then with `--busy`
processes that want a core each. The median over the rounds is the result; *loss* compares it with the best way of the
same column.

    python -m benchmarks.cpu.wait_policy [--rounds 5] [--busy 2] [--store DIR] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, environment, finish, table

WAYS: dict[str, dict[str, str]] = {
    "OpenMP's default (spins)": {},
    "OMP_WAIT_POLICY=PASSIVE (sleeps)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=10000 (spins for some 10 µs)": {"GOMP_SPINCOUNT": "10000"},
}
PROMPT = "Once upon a time there was a little boy named Jack. He lived in a house by the sea with his mother."


def main() -> None:
    """Measure all ways; a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--busy", type=int, default=len(os.sched_getaffinity(0)), help="processes beside, each on a core"
    )
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--store", type=Path, help="default: one of the bundled checkpoint")
    parser.add_argument("--save", action="store_true", help="write the result file that the documentation cites")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="wait-") as folder:
        store = arguments.store or make_store(BUNDLED, Path(folder) / "store")
        for beside in (0, arguments.busy):
            with busy(beside):
                for _ in range(arguments.rounds):
                    for name, variables in WAYS.items():
                        found[name, beside].append(tokens_per_second(store, arguments.tokens, variables))
                        print(f"{name}, {beside} beside: {found[name, beside][-1]:.1f}", file=sys.stderr, flush=True)
    medians = {key: statistics.median(values) for key, values in found.items()}
    best = {beside: max(medians[name, beside] for name in WAYS) for beside in (0, arguments.busy)}
    columns = ["quiet tokens/s", "loss", f"{arguments.busy} beside tokens/s", "loss "]
    rows = [[name] for name in WAYS]
    for row in rows:
        for beside in best:
            value = medians[row[0], beside]
            row += [f"{value:.1f}", f"{1 - value / best[beside]:.1%}"]
    print(table(["threads that wait", *columns], rows))
    results = [{"way": name, "beside": beside, "tokens_per_second": values} for (name, beside), values in found.items()]
    settings = {"rounds": arguments.rounds, "tokens": arguments.tokens, "load_average_before": round(load, 1)}
    finish("wait_policy", {**environment(), **settings, "results": results}, save=arguments.save)


def tokens_per_second(store: Path, tokens: int, variables: dict[str, str]) -> float:
    """Of one process with as many threads as there are cores."""
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environ = {name: value for name, value in os.environ.items() if name not in unset} | variables
    generate = [sys.executable, "-m", "server.cli", "generate", str(store), PROMPT, "--json", "--dtype", "float32"]
    command = [*generate, "--max-new-tokens", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return float(json.loads(done.stdout)["tokens_per_second"])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that never sleep, for the length of the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
