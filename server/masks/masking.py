"""The masking of single requests: a profile that stays, or a pool that follows the request's text.

Invariant: a request's masking belongs to that request alone, so a request in a batch gets the mask that it would get
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.masks.domain_prior import DomainPrior
from server.masks.pools import DEFAULT_POOL_OPTIONS, PoolOptions, PromptPool
from server.masks.profiles import ProfileError, find_profile


class FixedMasking:
    """One mask for the whole request: a profile called `name`."""

    def __init__(self, mask: ExpertMask, name: str = "") -> None:
        self.mask: ExpertMask | None = mask
        self.name = name

    def observe(self, demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]) -> None:
        """The mask does not change."""


class PoolMasking:
    """No mask for the request's prompt, then the request's pool.

    Args:
        pool: of this request alone.
        num_prompt_tokens: the pool is first chosen after so many tokens.
        available: returns the experts that may be in the pool now, a new object after each change; None is all of the
            model.
    """

    def __init__(
        self, pool: PromptPool, num_prompt_tokens: int, available: Callable[[], ExpertMask] | None = None
    ) -> None:
        self._mask: ExpertMask | None = None
        self._pool = pool
        self._num_unseen = num_prompt_tokens
        self._available = available
        self._chosen_from: ExpertMask | None = None

    @property
    def mask(self) -> ExpertMask | None:
        """The pool; chosen anew after a change of what is available, so that it holds no expert that left."""
        if self._mask is not None and self._available is not None and self._available() is not self._chosen_from:
            self._choose()
        return self._mask

    def observe(self, demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]) -> None:
        """Add a step's demand [L, T, K]; chooses at the end of the prompt, and again when the pool is due."""
        self._pool.see(demand_index, demand_weight)
        if self._num_unseen > 0:
            self._num_unseen -= demand_index.shape[1]
            if self._num_unseen > 0:
                return
        elif not self._pool.is_due:
            return
        self._choose()

    def _choose(self) -> None:
        self._chosen_from = None if self._available is None else self._available()
        chosen = self._pool.choose(self._chosen_from)
        if self._mask is None or not np.array_equal(chosen.allowed, self._mask.allowed):
            self._mask = chosen


@dataclass(frozen=True)
class RequestMasks:
    """The masks that a server's requests may ask for: its profiles, and pools with its prior.

    Attributes:
        profiles: by name.
        num_layers, num_experts: L and E.
        prior: for pools; None chooses from a request's own mass alone.
        options: of pools.
        available: returns the experts that the server serves now, a new object after each change; None is all of the
            model.
    """

    profiles: Mapping[str, ExpertMask]
    num_layers: int
    num_experts: int
    prior: DomainPrior | None = None
    options: PoolOptions = DEFAULT_POOL_OPTIONS
    available: Callable[[], ExpertMask] | None = None

    def masking(
        self,
        num_prompt_tokens: int,
        *,
        profile: str | None = None,
        pool: int | float | None = None,
        may_fetch: bool = False,
    ) -> FixedMasking | PoolMasking | None:
        """The masking of one request, for that request alone; None if it asks for none.

        Args:
            profile: name of a profile.
            pool: experts of every layer, or a share of them as a float up to 1.
            may_fetch: the request may have experts that are not available, so its pool may hold them.

        Raises:
            ProfileError: both are given, the profile does not exist, or the pool is too small or too large.
        """
        if profile is not None and pool is not None:
            raise ProfileError("profile and pool contradict each other: give one of them")
        if profile is not None:
            return FixedMasking(find_profile(self.profiles, profile), profile)
        if pool is None:
            return None
        if isinstance(pool, bool) or (isinstance(pool, float) and not 0 < pool <= 1):
            raise ProfileError(f"pool is {pool}, wanted a number of experts or a share from 0 to 1")
        count = max(1, round(pool * self.num_experts)) if isinstance(pool, float) else pool
        chosen = PromptPool(count, self.num_layers, self.num_experts, self.prior, self.options)
        return PoolMasking(chosen, num_prompt_tokens, None if may_fetch else self.available)


def masking_label(masking: object) -> tuple[str, str]:
    """For metrics: the kind of a request's masking (none, pool or profile), and the name of its profile or ""."""
    if isinstance(masking, FixedMasking):
        return "profile", masking.name
    return ("pool", "") if isinstance(masking, PoolMasking) else ("none", "")
