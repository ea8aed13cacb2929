"""Pools: experts chosen from a request's own router mass while it runs.

A *pool* is `count` experts of every layer: those that the request's tokens demanded most so far (recent tokens count
more), helped by a prior over the calibrated domains, and chosen anew every few tokens. The router scores every expert,
so demand is known for experts that the mask hides. Invariant: a pool depends on its own request's tokens alone, so a
request in a batch gets the pool that it would get alone. Source of the idea: document pools (Ai2's EMO, 2605.06663).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.ledger import sum_by_expert
from router.mask import ExpertMask
from server.masks.domain_prior import DomainPrior
from server.masks.profiles import ProfileError


@dataclass(frozen=True)
class PoolOptions:
    """Options of the choice of pools.

    Attributes:
        refresh_tokens: tokens between two choices.
        half_life_tokens: after so many tokens, a token's demand counts half.
        prior_tokens: the prior counts as much as the demand of so many tokens.
        sharpness: of the prior's choice among domains.
    """

    refresh_tokens: int = 32
    half_life_tokens: float = 64.0
    prior_tokens: float = 40.0
    sharpness: float = 20.0


DEFAULT_POOL_OPTIONS = PoolOptions()


class PromptPool:
    """The pool of one request.

    Args:
        count: experts of every layer.
        num_layers, num_experts: L and E.
        prior: None chooses from the request's own mass alone.

    Raises:
        ProfileError: `count` is not from 1 to E.
    """

    def __init__(
        self,
        count: int,
        num_layers: int,
        num_experts: int,
        prior: DomainPrior | None = None,
        options: PoolOptions = DEFAULT_POOL_OPTIONS,
    ) -> None:
        if not 1 <= count <= num_experts:
            raise ProfileError(f"a pool of {count} experts, wanted 1 to {num_experts}")
        self.count = count
        self.options = options
        self._prior = prior
        self._mass = np.zeros((num_layers, num_experts))
        self._unchosen_tokens = 0

    @property
    def is_due(self) -> bool:
        """Whether enough tokens were seen since the last choice."""
        return self._unchosen_tokens >= self.options.refresh_tokens

    def see(self, index: npt.NDArray[np.integer], weight: npt.NDArray[np.floating]) -> None:
        """Add the demand of tokens: the unmasked choice [L, T, K], in order; ids ≥ E are left out."""
        num_tokens = index.shape[1]
        age = np.arange(num_tokens - 1, -1, -1)
        decay = 0.5 ** (age / self.options.half_life_tokens)
        self._mass *= 0.5 ** (num_tokens / self.options.half_life_tokens)
        self._mass += sum_by_expert(index, weight * decay[None, :, None], self._mass.shape[1])
        self._unchosen_tokens += num_tokens

    def choose(self, available: ExpertMask | None = None) -> ExpertMask:
        """The `count` experts of every layer with the most demand now, of those that are available.

        A layer with fewer available experts has all of these in the pool. `available` None is all of the model.
        """
        demand = self._mass
        if self._prior is not None:
            per_token = self.options.prior_tokens
            demand = demand + per_token * self._prior.shares(self._mass, self.options.sharpness)
        if available is not None:
            demand = np.where(available.allowed, demand, -np.inf)
        chosen = np.argsort(-demand, axis=1, kind="stable")[:, : self.count]
        allowed = np.zeros(self._mass.shape, dtype=np.bool_)
        np.put_along_axis(allowed, chosen, True, axis=1)
        self._unchosen_tokens = 0
        return ExpertMask(allowed if available is None else allowed & available.allowed)
