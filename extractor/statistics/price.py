"""The price of a mask: the change of loss that a deficit is expected to cause, measured by calibration.

    price = Price.of(statistics.price)
    price.expected_loss(0.18, "code").ratio      # of perplexity
    price.expected_loss(response.deficit)        # of text whose kind is unknown, with its range over the known kinds

The cost of one deficit differs strongly between kinds of text, so each domain has a curve of its own. Invariant: a
curve starts at cost 0 for deficit 0 and never falls. For text of an unknown domain, the expectation is one curve
through all measurements, with the range over the domains as its uncertainty. If the text's routing is known, the mean
of the curves of the domains with similar routing is more accurate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from extractor.statistics.statistics import PricePoint, StatisticsError

Float = npt.NDArray[np.float64]

WARN_PERPLEXITY_RATIO = 1.1
"""Expected perplexity ÷ unmasked perplexity from which commands warn, by default."""
MAX_RATIO_LOG = 50.0
"""A ratio of perplexity is reported as at most e to this power."""


@dataclass(frozen=True)
class ExpectedLoss:
    """The expected cost of a deficit.

    Attributes:
        nats: change of loss, nats a token; never negative.
        low, high: costs in the cheapest and the most expensive possible domain; both are `nats` if the domain is known.
        is_measured: whether calibration measured deficits this large; beyond them a cost is a guess, mostly too low.
        basis: the source of the cost: the curve of the text's own "domain", the curves of domains with similar
            "routing", or the curve through "all" measurements.
    """

    nats: float
    low: float
    high: float
    is_measured: bool = True
    basis: Literal["domain", "routing", "all"] = "all"

    @property
    def ratio(self) -> float:
        """Perplexity ÷ unmasked perplexity."""
        return math.exp(min(self.nats, MAX_RATIO_LOG))

    def describe(self) -> str:
        """As text: nats and the ratio of perplexity, with the range if there is one."""
        text = f"{self.nats:+.3f} nats a token (perplexity × {self.ratio:.3f})"
        return text if self.low == self.high else f"{text}, {self.low:+.3f} to {self.high:+.3f} by kind of text"


@dataclass(frozen=True)
class PriceCurve:
    """Expected change of loss as a function of the deficit.

    Attributes:
        deficits, loss_changes: float64 [P], both rising from 0.
    """

    deficits: Float
    loss_changes: Float

    @property
    def last_deficit(self) -> float:
        """The largest measured deficit."""
        return float(self.deficits[-1])

    def __call__(self, deficit: float) -> float:
        """Expected change of loss, nats a token, at a deficit in [0, 1]; linear between points, cubic past the last."""
        last = self.last_deficit
        if deficit <= last or last == 0.0:
            return float(np.interp(deficit, self.deficits, self.loss_changes))
        return float(self.loss_changes[-1]) * (deficit / last) ** 3

    def to_json(self) -> list[list[float]]:
        """Pairs of deficit and change of loss, rounded."""
        return [[round(float(x), 5), round(float(y), 5)] for x, y in zip(self.deficits, self.loss_changes, strict=True)]


@dataclass(frozen=True)
class PriceFit:
    """The accuracy of the curves on text that they were not fitted on.

    Attributes:
        r_squared: share of the variance of the measured changes that the curves explain.
        mean_error: mean absolute difference, nats a token.
        num_points: measurements compared.
    """

    r_squared: float
    mean_error: float
    num_points: int


@dataclass(frozen=True)
class Price:
    """The curves of one checkpoint.

    Attributes:
        curves: one for each domain; at least one.
        overall: the curve through the measurements of all domains together.
        fit: accuracy of the curves; None if calibration measured each mask on one part of the text alone.
    """

    curves: Mapping[str, PriceCurve]
    overall: PriceCurve
    fit: PriceFit | None = None

    @classmethod
    def of(cls, points: Sequence[PricePoint]) -> Price | None:
        """Fit the curves to measurements; None if there are none."""
        return cls(_curves(points), _curve(points), _fit(points)) if points else None

    def expected_loss(
        self,
        deficit: float | Sequence[float],
        domain: str | None = None,
        likeness: Mapping[str, float] | None = None,
    ) -> ExpectedLoss:
        """The expected cost of a deficit.

        Args:
            deficit: missing share of the router mass, 0 to 1: overall, or of each layer.
            domain: kind of text; None, or a domain that was not calibrated, stands for any domain.
            likeness: domain → weight, its similarity to the text (of their routing, for instance). For an unknown
                domain, the expectation is the mean of the curves with these weights. None, or only weights of 0 for
                calibrated domains, takes the one curve through all measurements.
        """
        share = float(np.mean(deficit))
        own = None if domain is None else self.curves.get(domain)
        if own is not None:
            return ExpectedLoss(own(share), own(share), own(share), share <= own.last_deficit, "domain")
        weights = {name: weight for name, weight in (likeness or {}).items() if weight > 0 and name in self.curves}
        if weights:
            nats = sum(weight * self.curves[name](share) for name, weight in weights.items()) / sum(weights.values())
        else:
            nats = self.overall(share)
        values = [nats, *(curve(share) for curve in self.curves.values())]
        basis: Literal["routing", "all"] = "routing" if weights else "all"
        return ExpectedLoss(nats, min(values), max(values), share <= self.overall.last_deficit, basis)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, rounded; plans and manifests contain it."""
        curves = {name: one.to_json() for name, one in self.curves.items()}
        fit = None
        if self.fit is not None:
            fit = {
                "r_squared": round(self.fit.r_squared, 4),
                "mean_error": round(self.fit.mean_error, 5),
                "num_points": self.fit.num_points,
            }
        return {"curves": curves, "overall": self.overall.to_json(), "fit": fit}

    @classmethod
    def from_json(cls, document: Any) -> Price:
        """Read the output of `to_json`. Raises `StatisticsError` for anything else."""
        try:
            curves = {str(name): _checked_curve(points) for name, points in document["curves"].items()}
            overall = _checked_curve(document["overall"])
            fit = document.get("fit")
            found = None
            if fit is not None:
                found = PriceFit(float(fit["r_squared"]), float(fit["mean_error"]), int(fit["num_points"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StatisticsError(f"the price is damaged ({error!r}): calibrate and plan again") from error
        if not curves:
            raise StatisticsError("the price has no curve: calibrate with --price and plan again")
        return cls(curves, overall, found)


def determination(actual: Sequence[float], predicted: Sequence[float]) -> float:
    """R²: the share of the actual values' variance that the predictions explain; 1 is exact, the mean gives 0."""
    y, p = np.asarray(actual, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    spread = float(np.square(y - y.mean()).sum())
    return 1.0 - float(np.square(y - p).sum()) / spread if spread > 0 else float("nan")


def _curves(points: Sequence[PricePoint]) -> dict[str, PriceCurve]:
    by_domain: dict[str, list[PricePoint]] = {}
    for point in points:
        by_domain.setdefault(point.domain, []).append(point)
    return {name: _curve(own) for name, own in by_domain.items()}


def _curve(points: Sequence[PricePoint]) -> PriceCurve:
    """Isotonic regression through cost 0 at deficit 0.

    Beyond the largest deficit of the right masks, the curve continues through the costs of the wrong ones. It rises
    quadratically up to the first of them, as the measured cost does when more and more experts are exchanged.
    """
    right = _isotonic([point for point in points if not point.is_wrong])
    last, cost = right.last_deficit, float(right.loss_changes[-1])
    wrong = _isotonic([point for point in points if point.is_wrong])
    beyond = (wrong.deficits > last) & (wrong.loss_changes > cost)
    if not beyond.any():
        return right
    deficits, changes = wrong.deficits[beyond], wrong.loss_changes[beyond]
    steps = np.array([0.25, 0.5, 0.75])
    return PriceCurve(
        np.concatenate([right.deficits, last + steps * (deficits[0] - last), deficits]),
        np.concatenate([right.loss_changes, cost + steps**2 * (changes[0] - cost), changes]),
    )


def _isotonic(points: Sequence[PricePoint]) -> PriceCurve:
    from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]  # slow; a server reads finished curves

    chosen = sorted(points, key=lambda point: point.deficit)
    deficits = np.array([0.0, *(point.deficit for point in chosen)])
    changes = np.array([0.0, *(max(point.loss_change, 0.0) for point in chosen)])
    weights = np.array([1.0, *(max(point.num_tokens, 1) for point in chosen)])
    weights[0] = weights.sum()
    return PriceCurve(deficits, np.asarray(isotonic_regression(changes, weights=weights).x))


def _fit(points: Sequence[PricePoint]) -> PriceFit | None:
    """Cross-validate: predict the points of each part of the text by curves fitted to the other parts."""
    points = [point for point in points if not point.is_wrong]
    actual: list[float] = []
    predicted: list[float] = []
    for part in sorted({point.part for point in points}):
        curves = _curves([point for point in points if point.part != part])
        for point in points:
            if point.part == part and point.domain in curves:
                actual.append(point.loss_change)
                predicted.append(curves[point.domain](point.deficit))
    if len(actual) < 2:
        return None
    errors = np.abs(np.subtract(actual, predicted))
    return PriceFit(determination(actual, predicted), float(errors.mean()), len(actual))


def _checked_curve(points: Any) -> PriceCurve:
    table = np.asarray(points, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 2 or not len(table) or not np.isfinite(table).all():
        raise ValueError(f"a curve of shape {table.shape}, wanted pairs of deficit and change of loss")
    if (np.diff(table, axis=0) < 0).any() or (table[0] < 0).any():
        raise ValueError("a curve that falls")
    return PriceCurve(table[:, 0], table[:, 1])
