"""Masks for single requests: named profiles, and pools chosen from a request's own router mass.

A *profile* is a mask that was made beforehand, from a plan. A *pool* is `count` experts of every layer chosen while the
request runs: from what its tokens wanted so far (recent ones count more), helped by a prior over the domains that were
calibrated, and chosen anew every few tokens as the text goes on. The router sees every expert's score, so demand is
known for experts that the mask hides. Invariant: a pool depends on its own request's tokens alone, so a request in a
batch gets the mask that it would get alone. Source of the idea: document pools (Ai2's EMO, 2605.06663).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from extractor.planning.plan import Plan, read_plan
from router.errors import MaskError
from router.mask import ExpertMask
from server.errors import ServerError
from server.masks.usage_prior import UsagePrior

Float = npt.NDArray[np.float64]
MAX_PROFILES = 256
_PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProfileError(ServerError):
    """A profile that does not exist, or that does not fit the model."""


@dataclass(frozen=True)
class PoolOptions:
    """How pools are chosen.

    Attributes:
        refresh_tokens: tokens between two choices.
        half_life_tokens: after which what a token wanted counts half.
        prior_tokens: how many tokens' worth of mass the prior weighs.
        sharpness: of the prior's choice among domains.
    """

    refresh_tokens: int = 32
    half_life_tokens: float = 64.0
    prior_tokens: float = 40.0
    sharpness: float = 20.0


class PromptPool:
    """The pool of one request.

    Args:
        count: experts of every layer.
        num_layers, num_experts: L and E.
        prior: None chooses from the request's own mass alone.
    """

    def __init__(
        self,
        count: int,
        num_layers: int,
        num_experts: int,
        prior: UsagePrior | None = None,
        options: PoolOptions | None = None,
    ) -> None:
        if not 1 <= count <= num_experts:
            raise ProfileError(f"a pool of {count} experts, wanted 1 to {num_experts}")
        self.count = count
        self.options = options or PoolOptions()
        self._prior = prior
        self._mass = np.zeros((num_layers, num_experts))
        self._unchosen_tokens = 0

    @property
    def is_due(self) -> bool:
        """Whether enough tokens were seen since the last choice."""
        return self._unchosen_tokens >= self.options.refresh_tokens

    def see(self, index: npt.NDArray[np.integer], weight: npt.NDArray[np.floating]) -> None:
        """Take in what tokens wanted: the unmasked choice [L, T, K], in order; ids ≥ E fall away."""
        num_layers, num_tokens, _ = index.shape
        num_experts = self._mass.shape[1]
        age = np.arange(num_tokens - 1, -1, -1)
        decay = 0.5 ** (age / self.options.half_life_tokens)
        flat = np.minimum(index, num_experts) + (np.arange(num_layers) * (num_experts + 1))[:, None, None]
        values = (weight * decay[None, :, None]).astype(np.float64)
        added = np.bincount(flat.ravel(), weights=values.ravel(), minlength=num_layers * (num_experts + 1))
        self._mass *= 0.5 ** (num_tokens / self.options.half_life_tokens)
        self._mass += added.reshape(num_layers, num_experts + 1)[:, :num_experts]
        self._unchosen_tokens += num_tokens

    def choose(self, available: ExpertMask | None = None) -> ExpertMask:
        """The `count` experts of every layer that are wanted most now, of those that are available.

        Where fewer are available in a layer, these are the pool; None is all of the model.
        """
        wanted = self._mass
        if self._prior is not None:
            per_token = self.options.prior_tokens
            wanted = wanted + per_token * self._prior.shares(self._mass, self.options.sharpness)
        if available is not None:
            wanted = np.where(available.allowed, wanted, -np.inf)
        chosen = np.argsort(-wanted, axis=1, kind="stable")[:, : self.count]
        allowed = np.zeros(self._mass.shape, dtype=np.bool_)
        np.put_along_axis(allowed, chosen, True, axis=1)
        self._unchosen_tokens = 0
        return ExpertMask(allowed if available is None else allowed & available.allowed)


def mask_of_plan(plan: Plan, num_layers: int, num_experts: int) -> ExpertMask:
    """The experts that a plan's deep experts consist of.

    Raises:
        ProfileError: the plan is for another shape.
    """
    if (plan.num_layers, plan.num_experts) != (num_layers, num_experts):
        raise ProfileError(
            f"the plan is for {plan.num_layers} layers of {plan.num_experts} experts, the model has {num_layers} of "
            f"{num_experts}: make a plan for this checkpoint"
        )
    columns = np.array([deep.experts for deep in plan.deep_experts])
    allowed = np.zeros((num_layers, num_experts), dtype=np.bool_)
    allowed[np.arange(num_layers)[None, :], columns] = True
    return ExpertMask(allowed)


def profile_files(text: str) -> list[Path]:
    """Plan files from a list such as ``code.json,plans/``: a folder stands for the files in it that end in .json.

    Raises:
        ProfileError: something that does not exist.
    """
    files: list[Path] = []
    for part in (Path(part.strip()) for part in text.split(",") if part.strip()):
        if not part.exists():
            raise ProfileError(
                f"profiles: {part} does not exist; name plan files, or folders of them, joined by commas"
            )
        files += sorted(part.glob("*.json")) if part.is_dir() else [part]
    return files


def load_profiles(files: Iterable[Path], available: ExpertMask) -> Mapping[str, ExpertMask]:
    """Named masks from plan files; the name is the file's. What of them is not available may become so later.

    Raises:
        ProfileError: a plan for another shape, a name that is none or is there twice, or too many.
        SelectionError: no plan. MaskError: nothing of a layer is available.
    """
    profiles: dict[str, ExpertMask] = {}
    num_layers, num_experts = available.allowed.shape
    for file in files:
        if not _PROFILE_NAME.fullmatch(file.stem):
            raise ProfileError(
                f"{file}: a profile's name has 1 to 64 letters, digits, '.', '_' and '-': rename the file"
            )
        if file.stem in profiles:
            raise ProfileError(f"two profiles are called {file.stem!r}: rename {file}")
        if len(profiles) >= MAX_PROFILES:
            raise ProfileError(f"there are more than {MAX_PROFILES} profiles: leave some out")
        mask = mask_of_plan(read_plan(file), num_layers, num_experts)
        try:
            mask & available
        except MaskError as error:
            raise MaskError(f"the profile {file}: {error}") from error
        profiles[file.stem] = mask
    return profiles


def find_profile(profiles: Mapping[str, ExpertMask], name: str) -> ExpertMask:
    """The profile of that name. Raises `ProfileError`."""
    if name not in profiles:
        raise ProfileError(f"there is no such profile: this server has {', '.join(sorted(profiles)) or 'none'}")
    return profiles[name]


class FixedMasking:
    """A request's mask that stays: a profile, called `name`."""

    def __init__(self, mask: ExpertMask, name: str = "") -> None:
        self.mask: ExpertMask | None = mask
        self.name = name

    def observe(self, demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]) -> None:
        """Nothing changes."""


class PoolMasking:
    """A request whose prompt runs whole and whose rest is masked to its pool.

    Args:
        pool: of this request alone.
        num_prompt_tokens: after which the pool is chosen.
        available: what may be in it now, a new object whenever that changes; None is all of the model.
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
        """The pool; chosen anew where what is available has changed since, so that nothing of it is gone."""
        if self._mask is not None and self._available is not None and self._available() is not self._chosen_from:
            self._choose()
        return self._mask

    def observe(self, demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]) -> None:
        """Take in a step's demand [L, T, K]; chooses at the end of the prompt, and again when enough came since."""
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
    """What a server offers requests: its profiles, and pools with its prior.

    Attributes:
        profiles: by name.
        num_layers, num_experts: L and E.
        prior: for pools; None chooses from a request's own mass alone.
        options: of pools.
        available: what the server serves now, a new object whenever that changes; None is all of the model.
    """

    profiles: Mapping[str, ExpertMask]
    num_layers: int
    num_experts: int
    prior: UsagePrior | None = None
    options: PoolOptions = PoolOptions()
    available: Callable[[], ExpertMask] | None = None

    def masking(
        self,
        num_prompt_tokens: int,
        *,
        profile: str | None = None,
        pool: int | float | None = None,
        may_fetch: bool = False,
    ) -> FixedMasking | PoolMasking | None:
        """The masking of one request, for that request alone; None where it asks for none.

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
    """For metrics: how a request is masked (none, pool or profile), and the name of its profile or nothing."""
    if isinstance(masking, FixedMasking):
        return "profile", masking.name
    return ("pool", "") if isinstance(masking, PoolMasking) else ("none", "")
