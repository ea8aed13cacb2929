"""The price of a mask: measures how much loss a deficit brings, and checks how well that predicts other text.

A price is measured on a domain's first sequences, masked to the domain's own best experts and to wrong ones. Invariant:
a check compares losses of the same tokens of the same text, with and without the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from extractor.planning.criteria import DEFAULT_CRITERION
from extractor.statistics.price import Price, determination
from extractor.statistics.statistics import ExpertStatistics, PricePoint
from router.mask import ExpertMask
from server.masks.domain_prior import DomainPrior
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens
from server.quality.comparison import MaskResult, masks_per_domain
from server.quality.text_loss import TextResult, evaluate_text

PRICE_SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
"""Shares of the experts at which the price is measured."""
PRICE_CRITERIA = (DEFAULT_CRITERION, "coverage")
"""Two ways to choose, so that the curves do not depend on one."""
WRONG_SHARES = (0.5, 1.0)
"""Shares of the smallest mask that are exchanged at random. Text served under a mask made for another kind misses more
than its own best experts ever do, so the price is measured there too."""
EXPECTATIONS = {
    "r_squared": "expected",
    "r_squared_of_unknown_kind": "expected_of_unknown_kind",
    "r_squared_by_routing": "expected_by_routing",
    "r_squared_of_new_kind": "expected_of_new_kind",
}


def with_wrong_experts(mask: ExpertMask, share: float) -> ExpertMask:
    """The mask with a share of every layer's experts, at least one, exchanged for others at random (seeded)."""
    generator = np.random.default_rng(0)
    allowed = mask.allowed.copy()
    for layer in allowed:
        inside, outside = np.flatnonzero(layer), np.flatnonzero(~layer)
        count = min(max(1, round(share * len(inside))), len(outside))
        layer[generator.choice(inside, count, replace=False)] = False
        layer[generator.choice(outside, count, replace=False)] = True
    return ExpertMask(allowed)


def measure_price(
    model: SelectiveModel, statistics: ExpertStatistics, domain: str, sequences: Sequence[Tokens]
) -> list[PricePoint]:
    """Deficit and change of loss of a domain's sequences under masks of several sizes."""
    masks = []
    for share in PRICE_SHARES:
        count = max(1, round(share * statistics.num_experts))
        for criterion in PRICE_CRITERIA:
            masks.append((share, masks_per_domain(statistics, [domain], criterion, count)[domain]))
    return price_points(model, domain, sequences, masks)


def price_points(
    model: SelectiveModel,
    domain: str,
    sequences: Sequence[Tokens],
    masks: Sequence[tuple[float, ExpertMask]],
    adapter: str | None = None,
) -> list[PricePoint]:
    """Deficit and change of loss of a domain's sequences under each mask, and under the last one with wrong experts.

    The sequences are two parts, taken in turns, so that the curves of one part can be tried on the other.

    Args:
        masks: each with its share of the experts.
        adapter: that the masked runs have.
    """
    parts = [part for part in (sequences[::2], sequences[1::2]) if part]
    unmasked = [evaluate_text(model, part).loss for part in parts]
    share, smallest = masks[-1]
    tried = [(share, mask, False) for share, mask in masks]
    tried += [(share, with_wrong_experts(smallest, wrong), True) for wrong in WRONG_SHARES]
    points = []
    for share, mask, is_wrong in tried:
        for number, part in enumerate(parts):
            one = evaluate_text(model, part, mask, adapter)
            change = one.loss - unmasked[number]
            per_layer = tuple(round(deficit, 6) for deficit in one.deficit_per_layer)
            points.append(
                PricePoint(domain, one.deficit, change, one.num_tokens, share, number, per_layer, is_wrong=is_wrong)
            )
    return points


@dataclass(frozen=True)
class PriceCheck:
    """R² of the expected change of loss against the measured one.

    Attributes:
        r_squared: over domains and sizes, where the domain is known.
        r_squared_of_unknown_kind: where it is not known, by one curve for all domains.
        r_squared_by_routing: where it is not known, by the curves of the domains that route alike.
        r_squared_of_new_kind: the same without the text's own domain, as if nothing of its kind had been calibrated.
        points: of every domain and size.
    """

    r_squared: float
    r_squared_of_unknown_kind: float
    r_squared_by_routing: float
    r_squared_of_new_kind: float
    points: list[dict[str, Any]]

    @classmethod
    def of(cls, points: list[dict[str, Any]]) -> PriceCheck:
        """From points with expected and measured changes; R² is NaN for fewer than two."""
        actual = [point["actual"] for point in points]
        found = {
            name: round(determination(actual, [point[key] for point in points]), 4) if len(points) > 1 else math.nan
            for name, key in EXPECTATIONS.items()
        }
        return cls(**found, points=points)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data; NaN becomes null."""
        return {key: None if value != value else value for key, value in asdict(self).items()}


def check_price(
    statistics: ExpertStatistics, measured: Sequence[MaskResult], unmasked: Mapping[str, TextResult]
) -> PriceCheck:
    """Compare the loss that calibration expects for each measured deficit with the loss that was measured."""
    price, prior = Price.of(statistics.price), DomainPrior.of(statistics)
    points: list[dict[str, Any]] = []
    if price is None:
        return PriceCheck.of(points)
    for mask in measured:
        for domain, result in mask.results.items():
            likeness = {} if result.demand is None else prior.kinds(result.demand)
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
                    "kept": mask.kept,
                    "deficit": round(result.deficit, 5),
                    "actual": round(result.loss - unmasked[domain].loss, 5),
                    **{key: round(loss.nats, 5) for key, loss in expected.items()},
                }
            )
    return PriceCheck.of(points)
