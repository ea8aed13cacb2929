"""Quality over kept share: compares ways to choose experts at several sizes, each domain under its own mask.

Invariant: a choice sees calibration statistics alone, never the text that it is measured on; the caller keeps both
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.planning.criteria import ranking, score
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens
from server.quality.text_loss import TextResult, evaluate_text, geometric_mean

Texts = Mapping[str, Sequence[Tokens]]
Masks = Mapping[str, ExpertMask]


@dataclass(frozen=True)
class MaskResult:
    """The quality under one way to choose, at one size.

    Attributes:
        name: of the way to choose.
        kept: experts of every layer.
        results: of each domain.
        ratios: perplexity ÷ unmasked perplexity of each domain.
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


@dataclass(frozen=True)
class Comparison:
    """Measures masks on the same texts.

    Attributes:
        model: that the texts run through.
        texts: packed sequences of each domain.
        unmasked: their results without a mask.
    """

    model: SelectiveModel
    texts: Texts
    unmasked: Mapping[str, TextResult]

    def measure(self, name: str, kept: int, masks: Masks | ExpertMask) -> MaskResult:
        """Evaluate each domain under its mask, or all under one."""
        results = {
            domain: evaluate_text(self.model, tokens, masks if isinstance(masks, ExpertMask) else masks[domain])
            for domain, tokens in self.texts.items()
        }
        return self.relate(name, kept, results)

    def relate(self, name: str, kept: int, results: Mapping[str, TextResult]) -> MaskResult:
        """Relate results that were measured elsewhere to the unmasked ones."""
        ratios = {domain: float(np.exp(one.loss - self.unmasked[domain].loss)) for domain, one in results.items()}
        return MaskResult(name, kept, results, ratios)

    def compare_criteria(
        self,
        statistics: ExpertStatistics,
        criteria: Sequence[str],
        counts: Sequence[int],
        seeds: Sequence[int],
        notify: Callable[[str], None] = lambda text: None,
    ) -> list[MaskResult]:
        """Each criterion at each count, for each domain; and one random choice for all domains for each seed."""
        found: list[MaskResult] = []
        for count in counts:
            ways: dict[str, Masks | ExpertMask] = {
                criterion: masks_per_domain(statistics, list(self.texts), criterion, count) for criterion in criteria
            }
            ways |= {f"random {seed}": allow_best(score(statistics, "random", seed=seed), count) for seed in seeds}
            for name, masks in ways.items():
                found.append(self.measure(name, count, masks))
                notify(f"{name} {count}: {found[-1].mean_ratio:.3f}")
        return found
