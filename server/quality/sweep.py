"""Quality over kept share: every criterion and control at several sizes, each domain masked to what was chosen for it.

Invariant: a choice sees calibration statistics alone, never the text that it is measured on; the caller keeps both
apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.planning.alignment import Columns
from extractor.planning.columns import ranked_columns
from extractor.planning.criteria import ranking, score
from extractor.planning.planner import allowed_by
from extractor.statistics.price import Price, determination
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.masks.usage_prior import UsagePrior
from server.model.runner import SelectiveModel
from server.quality.evaluate import TextResult, evaluate_text, geometric_mean

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


def masks_per_domain(statistics: ExpertStatistics, domains: Sequence[str], criterion: str, count: int) -> Masks:
    """For each domain its own best experts, chosen freely in every layer."""
    return {name: allow_best(score(statistics, criterion, [name]), count) for name in domains}


def masks_of_columns(statistics: ExpertStatistics, domains: Sequence[str], columns: Columns, count: int) -> Masks:
    """For each domain its own best deep experts of one fixed alignment [E, L]."""
    best = {name: columns[ranked_columns(statistics, columns, [name])[:count]] for name in domains}
    return {name: ExpertMask(allowed_by(chosen, statistics.num_experts)) for name, chosen in best.items()}


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


EXPECTATIONS = {
    "r_squared": "expected",
    "r_squared_of_unknown_kind": "expected_of_unknown_kind",
    "r_squared_by_routing": "expected_by_routing",
    "r_squared_of_new_kind": "expected_of_new_kind",
}


@dataclass(frozen=True)
class PriceCheck:
    """How well the expected change of loss held.

    Attributes:
        r_squared: over domains and sizes, of R² each; r_squared_of_unknown_kind: where the domain is not told, by one
            curve; r_squared_by_routing: where it is not told, by the curves of the domains that route alike;
            r_squared_of_new_kind: the same without the text's own domain, as if nothing of its kind was calibrated.
        points: of every domain and size.
    """

    r_squared: float
    r_squared_of_unknown_kind: float
    r_squared_by_routing: float
    r_squared_of_new_kind: float
    points: list[dict[str, Any]]

    @classmethod
    def of(cls, points: list[dict[str, Any]]) -> PriceCheck:
        """From points with what was expected and what was measured; R² is NaN for fewer than two."""
        actual = [point["actual"] for point in points]
        found = {
            name: round(determination(actual, [point[key] for point in points]), 4) if len(points) > 1 else math.nan
            for name, key in EXPECTATIONS.items()
        }
        return cls(**found, points=points)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data; what is not a number is null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def check_price(
    statistics: ExpertStatistics, sweeps: Sequence[SweepResult], unmasked: Mapping[str, TextResult]
) -> PriceCheck:
    """Compare the loss that calibration expects for each measured deficit with the loss that was measured."""
    price, prior = Price.of(statistics.price), UsagePrior.of(statistics)
    points: list[dict[str, Any]] = []
    for sweep in sweeps if price is not None else ():
        for domain, result in sweep.results.items():
            assert price is not None
            likeness: dict[str, float] = {}
            if result.demand is not None:
                likeness = prior.kinds(result.demand)
            others = {name: weight for name, weight in likeness.items() if name != domain}
            expected = {
                "expected": price.expected_loss(result.deficit, domain),
                "expected_of_unknown_kind": price.expected_loss(result.deficit),
                "expected_by_routing": price.expected_loss(result.deficit, likeness=likeness),
                "expected_of_new_kind": price.expected_loss(result.deficit, likeness=others),
            }
            points.append(
                {
                    "domain": domain,
                    "kept": sweep.kept,
                    "deficit": round(result.deficit, 5),
                    "actual": round(result.loss - unmasked[domain].loss, 5),
                    **{key: round(loss.nats, 5) for key, loss in expected.items()},
                }
            )
    return PriceCheck.of(points)


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
