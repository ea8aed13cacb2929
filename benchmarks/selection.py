"""How much quality is left of the experts that are kept: criteria, alignments, pools, and the price of a deficit.

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
- *questions*: answered exactly, greedily, `planned`: under the mask of the kind of the same name, `pool`: under the
  pool that each prompt chooses with the prior; and the efficiency metrics.

    python -m benchmarks.selection [--checkpoint DIR]... [--texts PATH...] [--questions FILE...] [--parallel]
                                   [--save NAME]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import REPOSITORY, environment, finish, table
from expert_store.store import Store
from extractor.checkpoint import Checkpoint
from extractor.criteria import normalised, score
from extractor.planning import PlanRequest, allowed_by, make_plan
from extractor.planning_alignment import align
from extractor.prepare import prepare
from extractor.price import Price
from extractor.selection import SelectionRequest
from extractor.statistics import ExpertStatistics
from router.mask import ExpertMask

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
CRITERIA = ("reap-sum", "reap", "gate-mass", "frequency", "ean", "man", "easy", "coverage", "aimer", "index")
ALIGNMENTS = ("index", "rank", "chain", "profile", "tiers", "coverage")
SHARES = (0.5, 0.25, 0.125)
PARTS = ("criteria", "columns", "pools", "price", "depth", "questions")


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
    parser.add_argument("--parallel", action="store_true", help="checkpoints side by side, a process each")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    checkpoints = arguments.checkpoint or [REPOSITORY / "models" / "tiny-moe"]
    result: dict[str, Any] = {"environment": environment(arguments.device), "checkpoints": {}}
    if arguments.parallel:
        with ProcessPoolExecutor(len(checkpoints), get_context("spawn")) as pool:
            found = list(pool.map(run, checkpoints, [arguments] * len(checkpoints)))
    else:
        found = [run(checkpoint, arguments) for checkpoint in checkpoints]
    for checkpoint, one in zip(checkpoints, found, strict=True):
        result["checkpoints"][checkpoint.name] = one
    finish(arguments.save or "selection", result, save=arguments.save is not None)


def run(checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything for one checkpoint."""
    import torch

    from server.calibrate import CalibrateOptions, calibrate
    from server.calibrate_texts import find_domains
    from server.evaluate import evaluate_text, tokenised
    from server.model.assembly import load_model, resolve_device

    with tempfile.TemporaryDirectory(prefix="deepfew-selection-") as folder:
        prepare(Checkpoint.open(checkpoint), folder, SelectionRequest()).run()
        model = load_model(Store.open(folder), device=resolve_device(arguments.device), dtype=torch.float32)
        domains = find_domains(arguments.texts)
        started = time.monotonic()
        options = CalibrateOptions(half="even", price_tokens=16384 if "price" in arguments.parts else 0)
        statistics = calibrate(model, domains, options)
        print(f"\n# {checkpoint.name}\ncalibrated in {time.monotonic() - started:.0f} s")
        texts = tokenised(model, domains, CalibrateOptions(half="odd", max_tokens=arguments.tokens))
        unmasked = {name: evaluate_text(model, tokens) for name, tokens in texts.items()}
        bench = _Bench(model, statistics, texts, unmasked, arguments)
        result: dict[str, Any] = {
            "calibration_tokens": {n: int(t) for n, t in zip(statistics.domains, statistics.num_tokens, strict=True)},
            "unmasked_loss": {name: round(one.loss, 4) for name, one in unmasked.items()},
        }
        for part in arguments.parts:
            result[part] = getattr(bench, part)()
        model.close()
    return result


class _Bench:
    def __init__(
        self,
        model: Any,
        statistics: ExpertStatistics,
        texts: Mapping[str, list[list[int]]],
        unmasked: Mapping[str, Any],
        arguments: argparse.Namespace,
    ) -> None:
        self.model, self.statistics, self.texts, self.unmasked = model, statistics, texts, unmasked
        self.arguments = arguments
        self.names = list(texts)
        self.counts = [max(1, round(share * statistics.num_experts)) for share in SHARES]
        self._coverage: list[Any] = []

    def _measure(self, name: str, kept: int, masks: Mapping[str, ExpertMask] | ExpertMask) -> Any:
        from server.evaluate_sweep import measure

        return measure(self.model, self.texts, self.unmasked, name, kept, masks)

    def criteria(self) -> list[dict[str, Any]]:
        """Each criterion for each kind, controls, and one choice for all."""
        from server.evaluate_sweep import allow_best, sweep_criteria

        seeds = range(self.arguments.seeds)
        sweeps = sweep_criteria(self.model, self.statistics, self.texts, self.unmasked, CRITERIA, self.counts, seeds)
        self._coverage = [sweep for sweep in sweeps if sweep.name == "coverage"]
        parts = [normalised(score(self.statistics, "reap-sum", [name])) for name in self.names]
        together = np.mean(parts, axis=0)
        sweeps += [self._measure("together", count, allow_best(together, count)) for count in self.counts]
        self._print("criterion", sweeps)
        return [sweep.to_json() for sweep in sweeps]

    def columns(self) -> list[dict[str, Any]]:
        """Whole deep experts of one alignment, and those that a plan forms for one kind."""
        from server.evaluate_sweep import masks_of_columns

        parts = [normalised(score(self.statistics, "gate-mass", [name])) for name in self.names]
        sweeps = []
        for kind in ALIGNMENTS:
            columns = align(self.statistics, kind, np.mean(parts, axis=0), self.names)
            for count in self.counts:
                masks = masks_of_columns(self.statistics, self.names, columns, count)
                sweeps.append(self._measure(kind, count, masks))
        for count in self.counts:
            planned = {}
            for name in self.names:
                plan = make_plan(self.statistics, PlanRequest(count, criterion="coverage", domains=(name,)))
                chosen = np.array([deep.experts for deep in plan.deep_experts])
                planned[name] = ExpertMask(allowed_by(chosen, self.statistics.num_experts))
            sweeps.append(self._measure("plan", count, planned))
        self._print("alignment", sweeps)
        return [sweep.to_json() for sweep in sweeps]

    def pools(self) -> list[dict[str, Any]]:
        """Pools chosen from the prompt."""
        from server.evaluate_pool import evaluate_pools
        from server.profiles import PoolOptions, PromptPool
        from server.usage_prior import UsagePrior

        shape = (self.statistics.num_layers, self.statistics.num_experts)
        prior = UsagePrior.of(self.statistics)
        results = []
        for count in self.counts:
            whole_prompt = PoolOptions(half_life_tokens=1e9)
            ways = {
                "static": (partial(PromptPool, count, *shape, None, whole_prompt), False),
                "static with prior": (partial(PromptPool, count, *shape, prior, whole_prompt), False),
                "followed without prior": (partial(PromptPool, count, *shape), True),
                "followed": (partial(PromptPool, count, *shape, prior), True),
            }
            for name, (make, refresh) in ways.items():
                one = evaluate_pools(self.model, self.texts, make, refresh=refresh)
                worst = max(one.ratios, key=lambda kind: one.ratios[kind])
                results.append(
                    {
                        "name": name,
                        "kept": count,
                        "mean_ratio": round(one.mean_ratio, 4),
                        "worst": [worst, round(one.ratios[worst], 4)],
                        "deficit": round(one.deficit, 4),
                        "fetched": round(one.fetched_per_refresh, 3),
                    }
                )
        rows = [
            [
                one["name"],
                one["kept"],
                f"{one['mean_ratio']:.4f}",
                *one["worst"],
                one["deficit"],
                one["fetched"],
            ]
            for one in results
        ]
        columns = ["pool", "kept", "mean ratio", "worst kind", "its ratio", "deficit", "fetched a layer and refresh"]
        print("\n" + table(columns, rows), flush=True)
        return results

    def price(self) -> dict[str, Any]:
        """How well the expected loss held, over kinds and sizes."""
        from server.evaluate_sweep import check_price, masks_per_domain

        coverage = self._coverage or [
            self._measure("coverage", count, masks_per_domain(self.statistics, self.names, "coverage", count))
            for count in self.counts
        ]
        check = check_price(self.statistics, coverage, self.unmasked)
        fit = Price.of(self.statistics.price)
        assert fit is not None
        assert fit.fit is not None
        print(
            f"\nprice of a deficit: R² {check.r_squared:.3f} over {len(check.points)} kinds and sizes, "
            f"{check.r_squared_of_unknown_kind:.3f} where the kind is not told; by calibration {fit.fit.r_squared:.3f}"
        )
        return {"calibrated_fit": fit.to_json()["fit"], **check.to_json()}

    def depth(self) -> list[dict[str, Any]]:
        """k experts of every layer against all experts of few layers, at (almost) equal bytes."""
        from server.evaluate_sweep import masks_per_domain

        num_layers, num_experts = self.statistics.num_layers, self.statistics.num_experts
        sweeps = []
        for share in SHARES:
            count, num_whole = max(1, round(share * num_experts)), round(share * num_layers)
            if num_whole < 1:
                continue
            sweeps.append(
                self._measure("depth", count, masks_per_domain(self.statistics, self.names, "gate-mass", count))
            )
            single = masks_per_domain(self.statistics, self.names, "gate-mass", 1)
            places: dict[str, Sequence[int]] = {
                "first": range(num_whole),
                "last": range(num_layers - num_whole, num_layers),
            }
            places["spread"] = [math.floor((at + 0.5) * num_layers / num_whole) for at in range(num_whole)]
            for where, layers in places.items():
                whole = np.zeros((num_layers, num_experts), dtype=np.bool_)
                whole[list(layers)] = True
                masks = {name: ExpertMask.of(mask.allowed | whole) for name, mask in single.items()}
                sweeps.append(self._measure(f"breadth, {where} layers", count, masks))
        self._print("depth or breadth", sweeps)
        return [sweep.to_json() for sweep in sweeps]

    def questions(self) -> list[dict[str, Any]]:
        """Questions answered under the mask of their kind, and under pools; and the efficiency metrics."""
        from server.evaluate_metrics import configuration_entropy, efficiency, parameters
        from server.evaluate_questions import answered, read_questions
        from server.evaluate_sweep import masks_per_domain
        from server.model.runner import Runner
        from server.profiles import PoolMasking, PromptPool
        from server.usage_prior import UsagePrior

        runner = Runner(self.model, max_rows=16, max_tokens=256)
        prior = UsagePrior.of(self.statistics)
        shape = (self.statistics.num_layers, self.statistics.num_experts)
        results = []
        for path in self.arguments.questions:
            asked = read_questions(path)
            if asked.name not in self.names:
                continue
            entropy = configuration_entropy(self.statistics.total("picks", [asked.name]))
            for count in (self.statistics.num_experts, *self.counts):
                mask = masks_per_domain(self.statistics, [asked.name], "coverage", count)[asked.name]

                def pool(num_prompt_tokens: int, count: int = count) -> PoolMasking:
                    return PoolMasking(PromptPool(count, *shape, prior), num_prompt_tokens)

                ways = {"planned": answered(runner, asked.questions, mask)}
                if count < self.statistics.num_experts:
                    ways["pool"] = answered(runner, asked.questions, masking=pool)
                for way, accuracy in ways.items():
                    metrics = efficiency(accuracy, asked.chance, parameters(self.model, mask)).to_json()
                    head = {"name": asked.name, "way": way, "kept": count, "num_questions": len(asked.questions)}
                    results.append({**head, "ces": entropy.round(4).tolist(), **metrics})
        columns = ["accuracy", "activation_ratio", "p3", "p2f", "mer", "r3", "saa"]
        rows = [[one["name"], one["way"], one["kept"], *(float(one[column]) for column in columns)] for one in results]
        print("\n" + table(["questions", "way", "kept", *columns], rows), flush=True)
        return results

    def _print(self, title: str, sweeps: Sequence[Any]) -> None:
        rows = []
        for sweep in sweeps:
            one = sweep.to_json()
            rows.append(
                [one["name"], one["kept"], f"{one['mean_ratio']:.4f}", one["worst"][0], one["worst"][1], one["deficit"]]
            )
        print("\n" + table([title, "kept", "mean ratio", "worst kind", "its ratio", "deficit"], rows), flush=True)


if __name__ == "__main__":
    main()
