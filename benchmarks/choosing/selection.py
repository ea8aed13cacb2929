"""Quality under masks: criteria, alignments, pools, and the price of a deficit.

What is measured, in words:
- *ratio*: perplexity under a mask ÷ perplexity without one, on the same held-out tokens; *mean ratio* is the geometric
  mean over the kinds of text. Even documents of every file calibrate, odd ones are measured, packed into 512 tokens.
- *criteria*: every kind masked to the experts chosen for it, freely in each layer; random (several seeds) and index are
  controls, `together` is one reap-sum choice for all kinds.
- *columns*: every kind masked to its best deep experts of one alignment that was made for all kinds; `plan` forms the
  deep experts from the kind's own free choice.
- *pools*: the first 128 tokens of a sequence run whole; what follows is masked to experts chosen from them (`static`:
  once, from their router mass; `followed`: with the prior, and anew every 32 tokens; `fetched`: experts of a layer that
  were new in the pool each time).
- *price*: loss expected from the measured deficit by the calibrated curves, against the loss measured: R² over kinds
  and sizes, for the criterion coverage.
- *depth*: k experts of every layer against all experts of few layers (one of each other layer), at equal bytes.
- *interval*: of the mean ratio under coverage, 95 % of bootstrap draws over the held-out documents.
- *questions*: answered exactly, greedily, bare and after a prefix; `planned`: under the mask of the kind of the same
  name, `pool`: under the pool that each prompt chooses with the prior; and the efficiency metrics.

Each part is cut into jobs, of one checkpoint and one size or alignment each, which --workers processes share out.

    python -m benchmarks.choosing.selection [--checkpoint DIR]... [--texts PATH...] [--questions FILE...] [--workers N]
                                   [--save NAME]
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.choosing.selection_jobs import PARTS, Setup, items_of, measure_domain, measure_item
from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table, write_result
from extractor.statistics.file import write_statistics
from extractor.statistics.statistics import merge_all

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
COLUMNS = {
    "criteria": ("name", "kept", "mean_ratio", "worst", "deficit"),
    "columns": ("name", "kept", "mean_ratio", "worst", "deficit"),
    "pools": ("name", "kept", "mean_ratio", "worst", "deficit", "fetched"),
    "price": (
        "r_squared",
        "r_squared_of_unknown_kind",
        "r_squared_by_routing",
        "r_squared_of_new_kind",
        "calibrated_r_squared",
    ),
    "depth": ("name", "kept", "mean_ratio", "worst", "deficit"),
    "interval": ("name", "kept", "text", "mean_ratio", "low", "high", "num_tokens", "num_documents"),
    "questions": ("name", "prefix", "way", "kept", "accuracy", "activation_ratio", "p3", "p2f", "mer", "r3", "saa"),
}
Submit = Callable[..., Callable[[], Any]]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", type=Path, help="default: the bundled one")
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in DATA.glob("*.txt")))
    parser.add_argument("--questions", nargs="+", type=Path, default=sorted(DATA.glob("questions/*.jsonl")))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens of a kind")
    parser.add_argument("--seeds", type=int, default=3, help="of the random control")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with models of its own")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    checkpoints = arguments.checkpoint or [BUNDLED]
    result: dict[str, Any] = {"environment": environment(arguments.device), "checkpoints": {}}
    with tempfile.TemporaryDirectory(prefix="deepfew-selection-") as folder, _workers(arguments.workers) as submit:
        setups = [_setup(checkpoint, Path(folder) / str(at), arguments) for at, checkpoint in enumerate(checkpoints)]
        waiting = [_calibrate(setup, submit) for setup in setups]
        measured = [_measure(setup, wait(), submit) for setup, wait in zip(setups, waiting, strict=True)]
        for checkpoint, wait in zip(checkpoints, measured, strict=True):
            result["checkpoints"][checkpoint.name] = wait()
            _print(checkpoint.name, result["checkpoints"][checkpoint.name])
            if arguments.save is not None:
                write_result(arguments.save, result)  # what there is, should the next checkpoint be cut off
    finish(arguments.save or "selection", result, save=arguments.save is not None)


@contextmanager
def _workers(count: int) -> Iterator[Submit]:
    """Runs functions in `count` processes; with one, in this one, when the result is asked for."""
    if count == 1:
        yield lambda function, *values: lambda: function(*values)
        return
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:

        def submit(function: Callable[..., Any], *values: Any) -> Callable[[], Any]:
            future: Future[Any] = pool.submit(function, *values)
            return future.result

        yield submit


def _setup(checkpoint: Path, folder: Path, arguments: argparse.Namespace) -> Setup:
    make_store(checkpoint, folder / "store")
    return Setup(
        folder=folder,
        texts=tuple(arguments.texts),
        questions=tuple(arguments.questions),
        device=arguments.device,
        tokens=arguments.tokens,
        seeds=arguments.seeds,
        parts=tuple(arguments.parts),
    )


def _calibrate(setup: Setup, submit: Submit) -> Callable[[], dict[str, Any]]:
    """Statistics and unmasked losses of all domains, a job each, left in the setup's folder for the other jobs."""
    jobs = [submit(measure_domain, setup, at) for at in range(len(setup.texts))]

    def wait() -> dict[str, Any]:
        started = time.monotonic()
        found = [job() for job in jobs]
        statistics = merge_all(one for one, _ in found)
        unmasked = {name: result for _, results in found for name, result in results.items()}
        write_statistics(setup.statistics, statistics)
        setup.unmasked.write_bytes(pickle.dumps(unmasked))
        print(f"{setup.folder.name}: calibrated after {time.monotonic() - started:.0f} s", flush=True)
        counts = dict(zip(statistics.domains, statistics.num_tokens.tolist(), strict=True))
        return {
            "calibration_tokens": counts,
            "unmasked_loss": {name: round(one.loss, 4) for name, one in unmasked.items()},
        }

    return wait


def _measure(setup: Setup, result: dict[str, Any], submit: Submit) -> Callable[[], dict[str, Any]]:
    """All parts, a job for each of their items; rows come in the order of the items."""
    jobs = [(part, submit(measure_item, setup, part, item)) for part in setup.parts for item in items_of(setup, part)]

    def wait() -> dict[str, Any]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for part, job in jobs:
            rows.setdefault(part, []).extend(job())
        return result | {part: found[0] if part == "price" else found for part, found in rows.items()}

    return wait


def _print(name: str, result: dict[str, Any]) -> None:
    for part, columns in COLUMNS.items():
        if part in result:
            rows: Sequence[dict[str, Any]] = [result[part]] if part == "price" else result[part]
            print(f"\n# {name}: {part}\n" + table(columns, [[row[column] for column in columns] for row in rows]))
    print(flush=True)


if __name__ == "__main__":
    main()
