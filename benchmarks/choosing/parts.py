"""The parts of `choosing.selection`: one job each, in a process that keeps the models it has loaded.

Invariant: a job's outcome depends on its setup, part and item alone, so any number of processes give the same result.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.choosing.interval import changes_by_document, interval
from expert_store.store import Store
from extractor.planning.columns import align
from extractor.planning.criteria import normalised, score
from extractor.planning.planner import PlanRequest, allowed_by, make_plan
from extractor.statistics.file import read_statistics
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask

CRITERIA = ("reap-sum", "reap", "gate-mass", "frequency", "ean", "man", "easy", "coverage", "aimer", "index")
ALIGNMENTS = ("coverage", "tiers", "profile", "chain", "rank", "index", "plan")
SHARES = (0.5, 0.25, 0.125)
WHOLE_PROMPT: dict[str, Any] = {"half_life_tokens": 1e9}
POOLS: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "static": (False, False, WHOLE_PROMPT),
    "static with prior": (True, False, WHOLE_PROMPT),
    "followed without prior": (False, True, {}),
    "followed": (True, True, {}),
}
"""Whether a pool has the prior, whether it is chosen anew, and its options."""
PARTS = ("columns", "pools", "criteria", "price", "depth", "questions", "interval")
"""The longest first, so that workers end together."""
PRICE_TOKENS = 16384
QUESTION_ROWS = 32
PREFIXES = ("", "<|endoftext|>")
"""Questions are asked bare, and as documents begin in training."""


@dataclass(frozen=True)
class Setup:
    """What all jobs of one checkpoint share.

    Attributes:
        folder: with the store, and what calibration left there.
        texts, questions: files; device: to run on; tokens: held out of a kind; seeds: of the random control.
        parts: that are measured.
    """

    folder: Path
    texts: tuple[str, ...]
    questions: tuple[Path, ...]
    device: str
    tokens: int
    seeds: int
    parts: tuple[str, ...]

    @property
    def statistics(self) -> Path:
        """The calibration of all domains."""
        return self.folder / "statistics.safetensors"

    @property
    def unmasked(self) -> Path:
        """Unmasked results of all domains."""
        return self.folder / "unmasked.pickle"


def measure_domain(setup: Setup, number: int) -> tuple[ExpertStatistics, dict[str, Any]]:
    """Calibrate on the even documents of one domain, and what its odd ones cost unmasked."""
    from server.quality.calibrate import CalibrateOptions, calibrate
    from server.quality.evaluate import evaluate_text, tokenised
    from server.quality.texts import find_domains

    model = _model(setup)
    domain = find_domains(setup.texts)[number]
    price_tokens = PRICE_TOKENS if {"price", "columns"} & set(setup.parts) else 0
    options = CalibrateOptions(half="even", price_tokens=price_tokens, with_weights=number == 0)
    statistics = calibrate(model, [domain], options)
    texts = tokenised(model, [domain], CalibrateOptions(half="odd", max_tokens=setup.tokens))
    return statistics, {name: evaluate_text(model, tokens) for name, tokens in texts.items()}


def items_of(setup: Setup, part: str) -> Sequence[Any]:
    """What a part's jobs are: shares, alignments, or files of questions each with a share."""
    if part == "columns":
        return ALIGNMENTS
    if part == "price":
        return [None]
    if part == "pools":
        return [(share, name) for share in SHARES for name in POOLS]
    if part == "questions":
        return [(file, share) for file in setup.questions for share in (1.0, *SHARES)]
    return SHARES


def measure_item(setup: Setup, part: str, item: Any) -> list[dict[str, Any]]:
    """The rows of one job."""
    rows: list[dict[str, Any]] = getattr(_bench(setup), part)(item)
    return rows


@lru_cache
def _model(setup: Setup) -> Any:
    import torch
    import transformers

    from server.model.host.assembly import load_model, resolve_device

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, min(torch.get_num_threads(), 2)))
    return load_model(Store.open(setup.folder / "store"), device=resolve_device(setup.device), dtype=torch.float32)


@lru_cache
def _bench(setup: Setup) -> _Bench:
    return _Bench(setup, _model(setup))


class _Bench:
    def __init__(self, setup: Setup, model: Any) -> None:
        from server.quality.calibrate import CalibrateOptions
        from server.quality.evaluate import tokenised
        from server.quality.texts import find_domains

        self.setup, self.model = setup, model
        self.statistics = read_statistics(setup.statistics)
        self.unmasked: Mapping[str, Any] = pickle.loads(setup.unmasked.read_bytes())  # our own, of a minute ago
        options = CalibrateOptions(half="odd", max_tokens=setup.tokens)
        self.texts = tokenised(model, find_domains(setup.texts), options)
        self.names = list(self.texts)

    def _count(self, share: float) -> int:
        return max(1, round(share * self.statistics.num_experts))

    def _measure(self, name: str, kept: int, masks: Mapping[str, ExpertMask] | ExpertMask) -> Any:
        from server.quality.sweep import measure

        return measure(self.model, self.texts, self.unmasked, name, kept, masks)

    def criteria(self, share: float) -> list[dict[str, Any]]:
        """Each criterion for each kind, controls, and one choice for all."""
        from server.quality.sweep import allow_best, sweep_criteria

        count, seeds = self._count(share), range(self.setup.seeds)
        sweeps = sweep_criteria(self.model, self.statistics, self.texts, self.unmasked, CRITERIA, [count], seeds)
        parts = [normalised(score(self.statistics, "reap-sum", [name])) for name in self.names]
        sweeps.append(self._measure("together", count, allow_best(np.mean(parts, axis=0), count)))
        return [sweep.to_json() for sweep in sweeps]

    def columns(self, kind: str) -> list[dict[str, Any]]:
        """Whole deep experts of one alignment, or those that a plan forms for one kind."""
        from server.quality.sweep import masks_of_columns

        counts = [self._count(share) for share in SHARES]
        if kind == "plan":
            return [self._measure(kind, count, self._planned(count)).to_json() for count in counts]
        parts = [normalised(score(self.statistics, "gate-mass", [name])) for name in self.names]
        columns = align(self.statistics, kind, np.mean(parts, axis=0), self.names)
        masks = [masks_of_columns(self.statistics, self.names, columns, count) for count in counts]
        return [self._measure(kind, count, own).to_json() for count, own in zip(counts, masks, strict=True)]

    def _planned(self, count: int) -> dict[str, ExpertMask]:
        planned = {}
        for name in self.names:
            plan = make_plan(self.statistics, PlanRequest(count, criterion="coverage", domains=(name,)))
            chosen = np.array([deep.experts for deep in plan.deep_experts])
            planned[name] = ExpertMask(allowed_by(chosen, self.statistics.num_experts))
        return planned

    def pools(self, item: tuple[float, str]) -> list[dict[str, Any]]:
        """Pools chosen from the prompt."""
        from server.masks.profiles import PoolOptions, PromptPool
        from server.masks.usage_prior import UsagePrior
        from server.quality.pool import evaluate_pools

        share, name = item
        count, shape = self._count(share), (self.statistics.num_layers, self.statistics.num_experts)
        has_prior, refresh, options = POOLS[name]
        prior = UsagePrior.of(self.statistics) if has_prior else None
        make = partial(PromptPool, count, *shape, prior, PoolOptions(**options))
        one = evaluate_pools(self.model, self.texts, make, refresh=refresh)
        worst = max(one.ratios, key=lambda kind: one.ratios[kind])
        row = {
            "name": name,
            "kept": count,
            "mean_ratio": round(one.mean_ratio, 4),
            "worst": [worst, round(one.ratios[worst], 4)],
            "deficit": round(one.deficit, 4),
            "fetched": round(one.fetched_per_refresh, 3),
        }
        return [row]

    def price(self, _: None) -> list[dict[str, Any]]:
        """How well the expected loss held, over kinds and sizes."""
        from server.quality.sweep import check_price, masks_per_domain

        sweeps = []
        for count in (self._count(share) for share in SHARES):
            masks = masks_per_domain(self.statistics, self.names, "coverage", count)
            sweeps.append(self._measure("coverage", count, masks))
        fit = Price.of(self.statistics.price)
        assert fit is not None
        assert fit.fit is not None
        calibrated = fit.to_json()["fit"]
        check = check_price(self.statistics, sweeps, self.unmasked).to_json()
        return [{"calibrated_fit": calibrated, "calibrated_r_squared": calibrated["r_squared"], **check}]

    def depth(self, share: float) -> list[dict[str, Any]]:
        """k experts of every layer against all experts of few layers, at (almost) equal bytes."""
        from server.quality.sweep import masks_per_domain

        num_layers, num_experts = self.statistics.num_layers, self.statistics.num_experts
        count, num_whole = self._count(share), round(share * num_layers)
        if num_whole < 1:
            return []
        sweeps = [self._measure("depth", count, masks_per_domain(self.statistics, self.names, "gate-mass", count))]
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
        return [sweep.to_json() for sweep in sweeps]

    def interval(self, share: float) -> list[dict[str, Any]]:
        """What other held-out documents might have given, of as many tokens as are measured and of all there are."""
        from server.quality.calibrate import CalibrateOptions
        from server.quality.evaluate import tokenised
        from server.quality.sweep import masks_per_domain
        from server.quality.texts import find_domains

        count = self._count(share)
        masks = masks_per_domain(self.statistics, self.names, "coverage", count)
        everything = tokenised(self.model, find_domains(self.setup.texts), CalibrateOptions(half="odd"))
        rows = []
        for what, texts in (("measured", self.texts), ("all", everything)):
            changes = {name: changes_by_document(self.model, own, masks[name]) for name, own in texts.items()}
            rows.append({"name": "coverage", "kept": count, "text": what, **interval(changes)})
        return rows

    def questions(self, item: tuple[Path, float]) -> list[dict[str, Any]]:
        """Questions answered under the mask of their kind, and under pools; and the efficiency metrics."""
        from server.masks.profiles import PoolMasking, PromptPool
        from server.masks.usage_prior import UsagePrior
        from server.model.host.runner import HostRunner
        from server.quality.efficiency import configuration_entropy, efficiency, parameters
        from server.quality.questions import answered, read_questions
        from server.quality.sweep import masks_per_domain

        path, share = item
        asked, count = read_questions(path), self._count(share)
        if asked.name not in self.names:
            return []
        runner = HostRunner(self.model, max_rows=QUESTION_ROWS, max_tokens=256)
        prior = UsagePrior.of(self.statistics)
        shape = (self.statistics.num_layers, self.statistics.num_experts)
        entropy = configuration_entropy(self.statistics.total("picks", [asked.name])).round(4).tolist()
        mask = masks_per_domain(self.statistics, [asked.name], "coverage", count)[asked.name]

        def pool(num_prompt_tokens: int) -> PoolMasking:
            return PoolMasking(PromptPool(count, *shape, prior), num_prompt_tokens)

        rows = []
        for prefix in PREFIXES:
            ways = {"planned": answered(runner, asked.questions, mask, prefix=prefix)}
            if count < self.statistics.num_experts:
                ways["pool"] = answered(runner, asked.questions, masking=pool, prefix=prefix)
            for way, accuracy in ways.items():
                head = {"name": asked.name, "prefix": prefix, "way": way, "kept": count, "ces": entropy}
                metrics = efficiency(accuracy, asked.chance, parameters(self.model, mask)).to_json()
                rows.append({**head, "num_questions": len(asked.questions), **metrics})
        return rows
