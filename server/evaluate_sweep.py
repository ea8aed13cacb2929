"""Quality over kept share: every criterion and control at several sizes, each domain masked to what was chosen for it.

Invariant: a choice sees calibration statistics alone, never the text that it is measured on; the caller keeps both
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.alignment import Columns
from extractor.criteria import ranking, score
from extractor.planning import best_columns
from extractor.price import Price, determination
from extractor.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.evaluate import TextResult, evaluate_text, geometric_mean
from server.model.assembly import SelectiveModel

Tokens = Mapping[str, Sequence[Sequence[int]]]
Masks = Mapping[str, ExpertMask]


@dataclass(frozen=True)
class SweepResult:
    """One way to choose at one size.

    Attributes:
        name: of the way; kept: experts of every layer.
        results: of each domain; ratios: perplexity ÷ unmasked perplexity of each domain.
    """

    name: str
    kept: int
    results: Mapping[str, TextResult]
    ratios: Mapping[str, float]

    @property
    def mean_ratio(self) -> float:
        """Geometric mean of the ratios over the domains."""
        return geometric_mean(list(self.ratios.values()))

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, rounded."""
        worst = max(self.ratios, key=lambda name: self.ratios[name])
        return {
            "name": self.name,
            "kept": self.kept,
            "mean_ratio": round(self.mean_ratio, 4),
            "worst": [worst, round(self.ratios[worst], 4)],
            "deficit": round(float(np.mean([one.deficit for one in self.results.values()])), 4),
            "ratios": {name: round(ratio, 4) for name, ratio in self.ratios.items()},
            "deficits": {name: round(one.deficit, 4) for name, one in self.results.items()},
        }


def allow_best(scores: npt.NDArray[np.float64], count: int) -> ExpertMask:
    """The best `count` experts of every layer by scores [L, E]."""
    allowed = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(allowed, ranking(scores)[:, :count], True, axis=1)
    return ExpertMask(allowed)


def allow_columns(columns: Columns, num_experts: int) -> ExpertMask:
    """The experts of deep experts [C, L]."""
    allowed = np.zeros((columns.shape[1], num_experts), dtype=np.bool_)
    allowed[np.arange(columns.shape[1])[None, :], columns] = True
    return ExpertMask(allowed)


def masks_per_domain(statistics: ExpertStatistics, domains: Sequence[str], criterion: str, count: int) -> Masks:
    """For each domain its own best experts, chosen freely in every layer."""
    return {name: allow_best(score(statistics, criterion, [name]), count) for name in domains}


def masks_of_columns(statistics: ExpertStatistics, domains: Sequence[str], columns: Columns, count: int) -> Masks:
    """For each domain its own best deep experts of one fixed alignment [E, L]."""
    best = {name: best_columns(columns, statistics.demand_shares(name), count) for name in domains}
    return {name: allow_columns(chosen, statistics.num_experts) for name, chosen in best.items()}


def measure(
    model: SelectiveModel,
    texts: Tokens,
    unmasked: Mapping[str, TextResult],
    name: str,
    kept: int,
    masks: Masks | ExpertMask,
) -> SweepResult:
    """Evaluate each domain under its mask (or all under one)."""
    results = {
        domain: evaluate_text(model, tokens, masks if isinstance(masks, ExpertMask) else masks[domain])
        for domain, tokens in texts.items()
    }
    ratios = {domain: float(np.exp(result.loss - unmasked[domain].loss)) for domain, result in results.items()}
    return SweepResult(name, kept, results, ratios)


@dataclass(frozen=True)
class PriceCheck:
    """How well the expected change of loss held: R² over domains and sizes, and every (domain, kept) point."""

    r_squared: float
    points: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def check_price(
    statistics: ExpertStatistics, sweeps: Sequence[SweepResult], unmasked: Mapping[str, TextResult]
) -> PriceCheck:
    """Compare the loss that calibration expects for each measured deficit with the loss that was measured."""
    points: list[dict[str, Any]] = []
    price = Price.of(statistics.price)
    if price is None:
        return PriceCheck(float("nan"), points)
    for sweep in sweeps:
        for domain, result in sweep.results.items():
            actual = result.loss - unmasked[domain].loss
            expected = price.expected_loss(result.deficit, domain).nats
            points.append(
                {
                    "domain": domain,
                    "kept": sweep.kept,
                    "deficit": round(result.deficit, 5),
                    "actual": round(actual, 5),
                    "expected": round(expected, 5),
                }
            )
    r_squared = (
        determination([p["actual"] for p in points], [p["expected"] for p in points]) if points else float("nan")
    )
    return PriceCheck(round(r_squared, 4), points)


def sweep_criteria(
    model: SelectiveModel,
    statistics: ExpertStatistics,
    texts: Tokens,
    unmasked: Mapping[str, TextResult],
    criteria: Sequence[str],
    counts: Sequence[int],
    seeds: Sequence[int],
    say: Callable[[str], None] = lambda text: None,
) -> list[SweepResult]:
    """Each criterion at each count, per domain; random once for each seed, and index."""
    made: list[SweepResult] = []
    for count in counts:
        for criterion in criteria:
            made.append(
                measure(
                    model,
                    texts,
                    unmasked,
                    criterion,
                    count,
                    masks_per_domain(statistics, list(texts), criterion, count),
                )
            )
            say(f"{criterion} {count}: {made[-1].mean_ratio:.3f}")
        for seed in seeds:
            mask = allow_best(score(statistics, "random", seed=seed), count)
            made.append(measure(model, texts, unmasked, f"random {seed}", count, mask))
            say(f"random {seed} {count}: {made[-1].mean_ratio:.3f}")
    return made
