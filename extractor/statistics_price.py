"""The price of a mask: the change of loss that a deficit is expected to bring, from calibration.

The same deficit costs very different amounts on different kinds of text (reciting facts survives what prose does not),
so there is one curve a domain: through no cost at no deficit, never falling (isotonic regression), linear between the
measured points, and cubic beyond the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression  # type: ignore[import-untyped]

from extractor.statistics import PricePoint

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PriceCurve:
    """Expected change of loss as a function of the deficit.

    Attributes:
        deficits, loss_changes: float64 [P], both rising from 0.
    """

    deficits: Float
    loss_changes: Float

    def __call__(self, deficit: float) -> float:
        """Expected change of loss, nats a token, at a deficit in [0, 1]."""
        last = float(self.deficits[-1])
        if deficit <= last or last == 0.0:
            return float(np.interp(deficit, self.deficits, self.loss_changes))
        return float(self.loss_changes[-1]) * (deficit / last) ** 3


def price_curve(points: Sequence[PricePoint], domain: str | None = None) -> PriceCurve | None:
    """The curve of a domain, or of all text together; None where nothing was measured under a mask."""
    chosen = [point for point in points if domain is None or point.domain == domain]
    if not chosen:
        return None
    chosen.sort(key=lambda point: point.deficit)
    deficits = np.array([0.0, *(point.deficit for point in chosen)])
    changes = np.array([0.0, *(max(point.loss_change, 0.0) for point in chosen)])
    weights = np.array([1.0, *(max(point.num_tokens, 1) for point in chosen)])
    weights[0] = weights.sum()
    return PriceCurve(deficits, np.asarray(isotonic_regression(changes, weights=weights).x))


def determination(actual: Sequence[float], predicted: Sequence[float]) -> float:
    """R²: the share of the actual values' variance that the predictions explain; 1 is perfect, 0 is the mean's."""
    y, p = np.asarray(actual, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    spread = float(np.square(y - y.mean()).sum())
    return 1.0 - float(np.square(y - p).sum()) / spread if spread > 0 else float("nan")
