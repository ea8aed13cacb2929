"""The masks that an adapter is trained for: one mask, or pools of a range of sizes.

Invariant: a drawn mask depends on the demand of its own text and on the random numbers given, not on the student, so a
step can be repeated. Pools are chosen on the device, which nothing waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.mask import ExpertMask

Demand = npt.NDArray[np.float64]
"""Router mass of each expert in the whole model, [L, E]."""


@dataclass(frozen=True)
class Draw:
    """The random choices for a text.

    Attributes:
        share: of the experts that its pool has.
        mixture: weight of its own demand in the choice of the pool; that of its domain has the rest.
        start: share of the text that runs before its mask begins.
    """

    share: float
    mixture: float
    start: float


@dataclass(frozen=True)
class Target:
    """The masks of an adapter; the fields are those of `expert_store.adapter.Adapter`.

    Attributes:
        mask: the only mask; None for pools.
        shares: least and largest share of the experts in a pool; None for one mask.
        late: share of the texts under pools that begin without a mask, as the prompts of requests do.
        skew: sizes of pools are evenly spread over the logarithm if it is 1, and small ones come more often above 1.
    """

    mask: ExpertMask | None = None
    shares: tuple[float, float] | None = None
    late: float = 0.2
    skew: float = 1.6

    @property
    def kept(self) -> list[list[int]] | None:
        """The experts of each MoE layer that the mask has; None for pools."""
        return None if self.mask is None else [np.flatnonzero(layer).tolist() for layer in self.mask.allowed]

    def draw(self, random: np.random.Generator) -> Draw:
        """The random choices for a text."""
        if self.mask is not None:
            return Draw(0.0, 0.0, 0.0)
        assert self.shares is not None
        low, high = self.shares
        share = low * (high / low) ** (random.uniform() ** self.skew)
        starts_late = random.uniform() < self.late
        return Draw(share, random.uniform(), random.uniform(0.0, 0.75) if starts_late else 0.0)

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


def drawn_pools(own: Tensor, domain: Tensor, counts: Tensor, mixture: Tensor) -> Tensor:
    """The pools of B texts, bool [L, B, E]: the experts with the most demand by a mixture of two.

    Args:
        own, domain: demand of each text and of its domain, [L, B, E].
        counts: experts of each pool, [B].
        mixture: weight of `own`, [B].
    """
    own, domain = (one / one.sum(dim=-1, keepdim=True).clamp(min=1e-20) for one in (own, domain))
    mixed = torch.lerp(domain, own, mixture[None, :, None].to(own.dtype))
    order = mixed.argsort(dim=-1, descending=True, stable=True)
    among = torch.arange(own.shape[-1], device=own.device) < counts[:, None]  # [B, E]
    return torch.zeros_like(mixed, dtype=torch.bool).scatter(-1, order, among.expand_as(order))
