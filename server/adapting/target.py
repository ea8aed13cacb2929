"""The masks that an adapter is trained for: one mask, or pools of a range of sizes.

Invariant: a drawn mask depends on the demand of its own text and on the random numbers given, not on the student, so a
step can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask

Demand = npt.NDArray[np.float64]
"""Router mass of each expert in the whole model, [L, E]."""


@dataclass(frozen=True)
class Target:
    """The masks of an adapter; the fields are those of `expert_store.adapter.Adapter`.

    Attributes:
        mask: the only mask; None for pools.
        shares: least and largest share of the experts in a pool; None for one mask.
    """

    mask: ExpertMask | None = None
    shares: tuple[float, float] | None = None

    def draw_start(self, random: np.random.Generator) -> float:
        """The share of a text that runs before its mask begins.

        Half of the texts under pools begin without a mask, as the prompts of requests do.
        """
        if self.mask is not None or random.uniform() < 0.5:
            return 0.0
        return float(random.uniform(0.0, 0.75))

    def draw(self, random: np.random.Generator, own: Demand, domain: Demand) -> ExpertMask:
        """A mask for a text whose demand is `own` in a domain with the demand `domain`.

        A pool has a random size, and its experts are the most wanted ones by a random mixture of both demands.
        """
        if self.mask is not None:
            return self.mask
        assert self.shares is not None
        low, high = self.shares
        share = float(np.exp(random.uniform(np.log(low), np.log(high))))
        mixture = random.uniform()
        return most_wanted(mixture * _normalised(own) + (1 - mixture) * _normalised(domain), share)

    def measured(self, domain: Demand) -> list[tuple[float, ExpertMask]]:
        """Masks for measuring text of a domain, each with its share of the experts, the largest first."""
        if self.mask is not None:
            return [(float(self.mask.allowed.mean()), self.mask)]
        assert self.shares is not None
        low, high = self.shares
        shares = [low * 2**power for power in range(8) if low * 2**power < min(high, 0.999)]
        return [(share, most_wanted(domain, share)) for share in reversed(shares)]


def most_wanted(demand: Demand, share: float) -> ExpertMask:
    """The share of every layer's experts with the most demand, at least one."""
    count = max(1, round(share * demand.shape[1]))
    allowed = np.zeros(demand.shape, dtype=np.bool_)
    np.put_along_axis(allowed, np.argsort(-demand, axis=1, kind="stable")[:, :count], True, axis=1)
    return ExpertMask(allowed)


def _normalised(demand: Demand) -> Demand:
    total = demand.sum(axis=1, keepdims=True)
    return demand / np.where(total == 0, 1.0, total)
