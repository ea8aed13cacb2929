"""The status, candidates and errors of a store that may grow: plain data, read by routes and metrics without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from expert_store.manifest import DeepExpert
from server.errors import ServerError

GrowthState = Literal["idle", "growing", "adopting", "shrinking", "reloading"]

REPLACE_FACTOR = 2.0
"""A missing deep expert replaces another one only if its score is more than so many times as large."""


class GrowthError(ServerError):
    """A store cannot grow or shrink as requested.

    GrowthError
      GrowthBusyError       it already grows, shrinks or reloads
      NothingToGrowError    it has every expert, or its byte budget holds no more
      GrowthSourceError     its source checkpoint is no longer at its location
    """


class GrowthBusyError(GrowthError):
    """Another change of the store runs."""


class NothingToGrowError(GrowthError):
    """There is no missing expert that may be added."""


class GrowthSourceError(GrowthError):
    """The source checkpoint does not exist."""


@dataclass(frozen=True)
class Candidate:
    """A deep expert that the store lacks and could add.

    Attributes:
        experts: the expert id of each layer.
        score: demanded mass × expected output norm ÷ bytes.
        missing_share: share of all demanded mass that these experts would serve.
        num_bytes: size of its shard.
    """

    experts: tuple[int, ...]
    score: float
    missing_share: float
    num_bytes: int

    @property
    def reason(self) -> str:
        """The reason to add it, as text."""
        return f"{self.missing_share:.2%} of the router mass asked for its experts and could not have them"


@dataclass(frozen=True)
class GrowthStatus:
    """The running change of the store, and counts since the server started.

    Attributes:
        state: idle; growing (files are written); adopting (the running model takes them); shrinking, reloading.
        done_bytes, total_bytes: progress of the running growth, or of the last one.
        error: name of the error of the last growth; None if it succeeded.
        num_growths, num_failures, num_shrinks: counts since the server started; grown_bytes: written by growths.
        num_deep_experts, held_bytes: of the store now; budget_bytes: bound on the shards' size, None has no bound.
    """

    state: GrowthState
    done_bytes: int
    total_bytes: int
    error: str | None
    num_growths: int
    num_failures: int
    num_shrinks: int
    grown_bytes: int
    num_deep_experts: int
    held_bytes: int
    budget_bytes: int | None


@dataclass(frozen=True)
class StoreDemand:
    """The experts of a store and the demand of its requests, as one of its readers saw it.

    Attributes:
        available: bool [L, E]; demand_mass: float64 [L, E], recent demand within the server's mask.
        norms: float64 [L, E], the mean size of each expert's output.
        deep_experts: the expert of each layer, by index; num_bytes: of one more deep expert.
        status: of the reader's changes of the store.
    """

    available: npt.NDArray[np.bool_]
    demand_mass: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]
    deep_experts: Mapping[int, tuple[int, ...]]
    num_bytes: int
    status: GrowthStatus

    @property
    def room(self) -> int | None:
        """Deep experts that the budget still holds; None without a budget."""
        if self.status.budget_bytes is None:
            return None
        return max(0, (self.status.budget_bytes - self.status.held_bytes) // max(self.num_bytes, 1))


@dataclass(frozen=True)
class Shrunk:
    """The deep experts that a store removed; `freed_bytes` is None while another reader keeps the files."""

    removed: tuple[DeepExpert, ...]
    freed_bytes: int | None


@dataclass(frozen=True)
class Reloaded:
    """The difference between the store on disk and the store that was served."""

    num_added: int
    num_removed: int
    num_deep_experts: int


class GrowthLike(Protocol):
    """The part of `server.growth.grower.Grower` that routes and metrics use; any thread may call it."""

    def status(self) -> GrowthStatus: ...
    def candidates(self) -> list[Candidate]: ...
    def demand(self) -> StoreDemand: ...
    def grow(self, count: int, named: Sequence[tuple[int, ...]] = ()) -> list[Candidate]: ...
    def shrink(self, indices: Collection[int] | None = None, *, count: int | None = None) -> Shrunk: ...
    def reload(self) -> Reloaded: ...
    def stop(self) -> None: ...
