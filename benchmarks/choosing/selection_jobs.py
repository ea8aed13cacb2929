"""The jobs of `choosing.selection`, each in a process that keeps the models it has loaded.

Invariant: a job's result depends on its setup, part and item alone, so any number of processes give the same result.
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
import torch
import transformers

from benchmarks.choosing.bootstrap import changes_by_document, interval
from benchmarks.choosing.pools import evaluate_pools
from expert_store.store import Store
from extractor.planning.criteria import normalised, score
from extractor.planning.forming import align, ranked_deep_experts
from extractor.planning.planner import PlanRequest, allowed_by, make_plan
from extractor.statistics.file import read_statistics
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.masks.domain_prior import DomainPrior
from server.masks.masking import FixedMasking, PoolMasking
from server.masks.pools import PoolOptions, PromptPool
from server.masks.profiles import mask_of_plan
from server.model.host.assembly import HostModel, load_model, resolve_device
from server.model.host.runner import HostRunner
from server.model.runner import RunnerOptions
from server.quality.batches import token_sequences
from server.quality.calibration import CalibrationOptions, calibrate
from server.quality.comparison import Comparison, allow_best, masks_per_domain
from server.quality.efficiency_metrics import Parameters, configuration_entropy
from server.quality.price import check_price
from server.quality.questions import MakeMasking, read_questions, share_answered
from server.quality.text_loss import TextResult, evaluate_text
from server.quality.texts import TextOptions, find_domains

CRITERIA = ("reap-sum", "reap", "gate-mass", "frequency", "ean", "man", "easy", "coverage", "aimer", "index")
ALIGNMENTS = ("coverage", "tiers", "profile", "chain", "rank", "index", "plan")
SHARES = (0.5, 0.25, 0.125)
WHOLE_PROMPT = PoolOptions(half_life_tokens=1e9)
POOLS: dict[str, tuple[bool, bool, PoolOptions]] = {
    "static": (False, False, WHOLE_PROMPT),
    "static with prior": (True, False, WHOLE_PROMPT),
    "followed without prior": (False, True, PoolOptions()),
    "followed": (True, True, PoolOptions()),
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
    """The input of all jobs of one checkpoint.

    Attributes:
        folder: with the store, and the results of calibration.
        texts, questions: files.
        device: to run on.
        tokens: held out of a kind.
        seeds: of the random control.
        parts: to measure.
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

    @property
    def held_out(self) -> TextOptions:
        """The text that is measured."""
        return TextOptions(half="odd", max_tokens=self.tokens)


def measure_domain(setup: Setup, number: int) -> tuple[ExpertStatistics, dict[str, TextResult]]:
    """Calibrate on the even documents of one domain, and measure its odd ones unmasked."""
    model = _model(setup)
    domain = find_domains(setup.texts)[number]
    price_tokens = PRICE_TOKENS if {"price", "columns"} & set(setup.parts) else 0
    options = CalibrationOptions(TextOptions(half="even"), price_tokens=price_tokens, with_weights=number == 0)
    statistics = calibrate(model, [domain], options)
    return statistics, {domain.name: evaluate_text(model, token_sequences(model, domain, setup.held_out))}


def items_of(setup: Setup, part: str) -> Sequence[Any]:
    """One item for each job of a part: shares, alignments, or files of questions each with a share."""
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
    rows: list[dict[str, Any]] = getattr(_selection(setup), part)(item)
    return rows


@lru_cache
def _model(setup: Setup) -> HostModel:
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(max(1, min(torch.get_num_threads(), 2)))
    return load_model(
        Store.open(setup.folder / "store"), RunnerOptions(device=resolve_device(setup.device), dtype=torch.float32)
    )


@lru_cache
def _selection(setup: Setup) -> _Selection:
    return _Selection(setup)


class _Selection:
    """The parts of the benchmark, a method each that takes one item and returns its rows."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.model = setup, _model(setup)
        self.statistics = read_statistics(setup.statistics)
        unmasked = pickle.loads(setup.unmasked.read_bytes())  # our own, of a minute ago
        self.comparison = Comparison(self.model, self._texts(setup.held_out), unmasked)
        self.names = list(self.comparison.texts)

    def _texts(self, options: TextOptions) -> dict[str, list[list[int]]]:
        domains = find_domains(self.setup.texts)
        return {domain.name: token_sequences(self.model, domain, options) for domain in domains}

    def _count(self, share: float) -> int:
        return max(1, round(share * self.statistics.num_experts))

    def _masks(self, criterion: str, count: int) -> Mapping[str, ExpertMask]:
        return masks_per_domain(self.statistics, self.names, criterion, count)

    def _make_pool(self, count: int, *, has_prior: bool = True, options: PoolOptions | None = None) -> PromptPool:
        prior = DomainPrior.of(self.statistics) if has_prior else None
        shape = (self.statistics.num_layers, self.statistics.num_experts)
        return PromptPool(count, *shape, prior, options or PoolOptions())

    def criteria(self, share: float) -> list[dict[str, Any]]:
        """Each criterion for each kind, controls, and one choice for all."""
        count = self._count(share)
        found = self.comparison.compare_criteria(self.statistics, CRITERIA, [count], range(self.setup.seeds))
        parts = [normalised(score(self.statistics, "reap-sum", [name])) for name in self.names]
        found.append(self.comparison.measure("together", count, allow_best(np.mean(parts, axis=0), count)))
        return [one.to_json() for one in found]

    def columns(self, kind: str) -> list[dict[str, Any]]:
        """Whole deep experts of one alignment, or those that a plan forms for one kind."""
        counts = [self._count(share) for share in SHARES]
        masks = [self._planned(count) for count in counts] if kind == "plan" else self._aligned(kind, counts)
        return [self.comparison.measure(kind, count, own).to_json() for count, own in zip(counts, masks, strict=True)]

    def _planned(self, count: int) -> dict[str, ExpertMask]:
        shape = (self.statistics.num_layers, self.statistics.num_experts)
        requests = {name: PlanRequest(count, criterion="coverage", domains=(name,)) for name in self.names}
        return {name: mask_of_plan(make_plan(self.statistics, request), *shape) for name, request in requests.items()}

    def _aligned(self, kind: str, counts: Sequence[int]) -> list[dict[str, ExpertMask]]:
        """For each count, each domain's best deep experts of one alignment."""
        parts = [normalised(score(self.statistics, "gate-mass", [name])) for name in self.names]
        deep_experts = align(self.statistics, kind, np.mean(parts, axis=0), self.names)
        ranked = {name: ranked_deep_experts(self.statistics, deep_experts, [name]) for name in self.names}
        num_experts = self.statistics.num_experts
        return [
            {name: ExpertMask(allowed_by(deep_experts[order[:count]], num_experts)) for name, order in ranked.items()}
            for count in counts
        ]

    def pools(self, item: tuple[float, str]) -> list[dict[str, Any]]:
        """Pools chosen from the prompt."""
        share, name = item
        count = self._count(share)
        has_prior, refresh, options = POOLS[name]
        make_pool = partial(self._make_pool, count, has_prior=has_prior, options=options)
        one = evaluate_pools(self.model, self.comparison.texts, make_pool, refresh=refresh)
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
        """R² of the expected loss against the measured one, over kinds and sizes."""
        counts = [self._count(share) for share in SHARES]
        measured = [self.comparison.measure("coverage", count, self._masks("coverage", count)) for count in counts]
        price = Price.of(self.statistics.price)
        assert price is not None
        assert price.fit is not None
        calibrated = price.to_json()["fit"]
        check = check_price(self.statistics, measured, self.comparison.unmasked).to_json()
        return [{"calibrated_fit": calibrated, "calibrated_r_squared": calibrated["r_squared"], **check}]

    def depth(self, share: float) -> list[dict[str, Any]]:
        """k experts of every layer against all experts of few layers, at (almost) equal bytes."""
        num_layers, num_experts = self.statistics.num_layers, self.statistics.num_experts
        count, num_whole = self._count(share), round(share * num_layers)
        if num_whole < 1:
            return []
        found = [self.comparison.measure("depth", count, self._masks("gate-mass", count))]
        single = self._masks("gate-mass", 1)
        places: dict[str, Sequence[int]] = {
            "first": range(num_whole),
            "last": range(num_layers - num_whole, num_layers),
            "spread": [math.floor((at + 0.5) * num_layers / num_whole) for at in range(num_whole)],
        }
        for where, layers in places.items():
            whole = np.zeros((num_layers, num_experts), dtype=np.bool_)
            whole[list(layers)] = True
            masks = {name: ExpertMask.of(mask.allowed | whole) for name, mask in single.items()}
            found.append(self.comparison.measure(f"breadth, {where} layers", count, masks))
        return [one.to_json() for one in found]

    def interval(self, share: float) -> list[dict[str, Any]]:
        """The range over other held-out documents: of as many tokens as are measured, and of all there are."""
        count = self._count(share)
        masks = self._masks("coverage", count)
        rows = []
        for text, texts in (("measured", self.comparison.texts), ("all", self._texts(TextOptions(half="odd")))):
            changes = {name: changes_by_document(self.model, own, masks[name]) for name, own in texts.items()}
            rows.append({"name": "coverage", "kept": count, "text": text, **interval(changes)})
        return rows

    def questions(self, item: tuple[Path, float]) -> list[dict[str, Any]]:
        """Questions answered under the mask of their kind, and under pools; and the efficiency metrics."""
        path, share = item
        asked, count = read_questions(path), self._count(share)
        if asked.name not in self.names:
            return []
        runner = HostRunner(self.model, max_rows=QUESTION_ROWS, max_tokens=256)
        entropy = configuration_entropy(self.statistics.total("picks", [asked.name])).round(4).tolist()
        mask = self._masks("coverage", count)[asked.name]
        ways: dict[str, MakeMasking] = {"planned": lambda num_prompt_tokens: FixedMasking(mask)}
        if count < self.statistics.num_experts:
            ways["pool"] = lambda num_prompt_tokens: PoolMasking(self._make_pool(count), num_prompt_tokens)
        rows = []
        for prefix in PREFIXES:
            for way, make_masking in ways.items():
                accuracy = share_answered(runner, asked.questions, make_masking, prefix)
                head = {"name": asked.name, "prefix": prefix, "way": way, "kept": count, "ces": entropy}
                metrics = Parameters.of(self.model, mask).efficiency(accuracy, asked.chance)
                rows.append({**head, "num_questions": len(asked.questions), **metrics})
        return rows
