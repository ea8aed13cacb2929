"""The demand of the calibrated domains, as a prior: for pools while a request is short, and to tell a text's kind.

Invariant: a request's own tokens choose among the domains; other requests have no influence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from extractor.statistics.statistics import ExpertStatistics

Float = npt.NDArray[np.float64]
SHARE_FLOOR = 1e-3
"""Added to a domain's shares before the logarithm: an expert that a domain never used is rare, not impossible."""
KIND_SHARPNESS = 5.0
"""Sharpness of the choice among domains where it prices text of unknown kind; docs/selection.md has its accuracy."""


class DomainPrior:
    """Shares of the experts in each calibrated domain, weighted by how well a text fits the domain.

    Args:
        shares: float64 [D, L, E], each expert's share of its layer's mass in each domain.
        domains: their names, D of them.
    """

    def __init__(self, shares: Float, domains: Sequence[str]) -> None:
        if len(domains) != len(shares):
            raise ValueError(f"{len(domains)} names for the shares of {len(shares)} domains: one for each")
        self._shares = shares
        self._domains = tuple(domains)
        self._logs = np.log(shares + SHARE_FLOOR)

    @classmethod
    def of(cls, statistics: ExpertStatistics) -> DomainPrior:
        """From the domains of calibration statistics."""
        return cls(np.stack([statistics.demand_shares(name) for name in statistics.domains]), statistics.domains)

    def shares(self, seen: Float, sharpness: float) -> Float:
        """Expected shares [L, E] of a text whose mass so far is `seen` [L, E]."""
        return np.asarray(np.tensordot(self.likeness(seen, sharpness), self._shares, axes=1))

    def likeness(self, seen: Float, sharpness: float) -> Float:
        """Weights of the domains, float64 [D] with sum 1: high where a text of mass `seen` [L, E] fits well."""
        sums = seen.sum(axis=1, keepdims=True)
        own = np.divide(seen, sums, out=np.zeros_like(seen), where=sums > 0)
        fit = sharpness * np.tensordot(self._logs, own, axes=2)  # [D]
        weights = np.exp(fit - fit.max())
        return np.asarray(weights / weights.sum())

    def kinds(self, seen: Float) -> dict[str, float]:
        """Weights of the domains by name, for `Price.expected_loss`, for a text whose mass is `seen` [L, E]."""
        return dict(zip(self._domains, self.likeness(seen, KIND_SHARPNESS).tolist(), strict=True))
