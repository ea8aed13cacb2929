"""Plans within a budget of bytes: does `plan --budget` choose the best of its alternatives?

What is measured, in words:
- *budget*: bytes of a store, as a share of the checkpoint's experts in 16 bits, beside the trunk.
- *alternatives*: as many experts as fit in each encoding; the first is chosen (`extractor.planning.budget`).
- *own*: a plan for each kind of text alone, measured on that kind; *all*: one plan for all kinds.
- *expected*: perplexity ratio by calibration on the even documents; *measured*: on the odd ones, 16 bits and all
  experts = 1; both are geometric means over the kinds.
Experts are those of real stores in each encoding, masked to the plan, on the path that the CPU serves with.

    python -m benchmarks.choosing.budgets [--checkpoint DIR]... [--texts PATH...] [--tokens N] [--save NAME]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from expert_store.store import Store
from extractor.encoding.names import ExpertsDtype
from extractor.planning.budget import Alternative, plans_within
from extractor.planning.planner import PlanRequest, allowed_by
from router.mask import ExpertMask
from server.model.host.assembly import HostModel, load_model
from server.model.runner import RunnerOptions
from server.quality.batches import token_sequences
from server.quality.calibration import CalibrationOptions, calibrate
from server.quality.text_loss import evaluate_text
from server.quality.texts import TextOptions, find_domains

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
ENCODINGS: tuple[ExpertsDtype, ...] = ("int4", "int8")
SHARES = (0.25, 0.45, 0.65)
COLUMNS = ("budget", "plan", "encoding", "kept", "bytes", "expected", "measured", "chosen")


@contextmanager
def opened(checkpoint: Path, folder: Path, experts_dtype: ExpertsDtype | None) -> Iterator[HostModel]:
    """The whole model with its experts in an encoding."""
    path = folder / (experts_dtype or "shipped")
    if not path.exists():
        make_store(checkpoint, path, experts_dtype=experts_dtype)
    model = load_model(Store.open(path), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    try:
        yield model
    finally:
        model.close()


def measured(checkpoint: Path, folder: Path, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    """The rows of one checkpoint."""
    domains = find_domains(texts)
    options = CalibrationOptions(TextOptions(half="even", max_tokens=tokens), tokens, False, ENCODINGS)
    with opened(checkpoint, folder, None) as model:
        statistics = calibrate(model, domains, options, encoded=lambda name: opened(checkpoint, folder, name))
        odd = TextOptions(half="odd", max_tokens=tokens)
        held_out = {one.name: token_sequences(model, one, odd) for one in domains}
        whole = {name: evaluate_text(model, sequences).loss for name, sequences in held_out.items()}
    scopes = [(name,) for name in held_out] + [tuple(held_out)]
    work: list[tuple[float, tuple[str, ...], int, Alternative]] = []
    for share in SHARES:
        budget = statistics.trunk_bytes + round(share * statistics.num_experts * statistics.expert_bytes)
        for scope in scopes:
            request = PlanRequest(count=1, criterion="coverage", domains=scope)
            alternatives = plans_within(statistics, request, budget)
            work += [(share, scope, rank, one) for rank, one in enumerate(alternatives)]
    changes: dict[tuple[float, str, str], list[tuple[float, float, int, int, bool]]] = {}
    for name in (None, *ENCODINGS):
        with opened(checkpoint, folder, name) as model:
            for share, scope, rank, one in (item for item in work if item[3].plan.experts_dtype == name):
                experts = np.array([deep.experts for deep in one.plan.deep_experts])
                mask = ExpertMask.of(allowed_by(experts, statistics.num_experts))
                change = np.mean([evaluate_text(model, held_out[kind], mask).loss - whole[kind] for kind in scope])
                key = (share, "own" if len(scope) == 1 else "all", one.name)
                row = (one.loss_change or 0.0, float(change), len(one.plan.deep_experts), one.num_bytes, rank == 0)
                changes.setdefault(key, []).append(row)
    rows = []
    for (share, plan, encoding), found in sorted(changes.items()):
        expected, actual, kept, num_bytes, chosen = (np.mean(part) for part in zip(*found, strict=True))
        rows.append(
            {
                "budget": share,
                "plan": plan,
                "encoding": encoding,
                "kept": int(kept),
                "bytes": int(num_bytes),
                "expected": round(math.exp(expected), 4),
                "measured": round(math.exp(actual), 4),
                "chosen": f"{chosen:.0%}",
            }
        )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", type=Path, help="default: the bundled one")
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in DATA.glob("*.txt")))
    parser.add_argument("--tokens", type=int, default=2048, help="of a kind, to calibrate and to measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    result: dict[str, Any] = {"environment": environment(), "tokens_of_a_kind": arguments.tokens, "checkpoints": {}}
    for checkpoint in arguments.checkpoint or [BUNDLED]:
        with tempfile.TemporaryDirectory(prefix="deepfew-budgets-") as folder:
            rows = measured(checkpoint, Path(folder), arguments.texts, arguments.tokens)
        result["checkpoints"][checkpoint.name] = rows
        print(f"\n# {checkpoint.name}\n" + table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows]))
    finish(arguments.save or "budgets", result, save=arguments.save is not None)


if __name__ == "__main__":
    main()
