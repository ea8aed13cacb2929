"""The status, candidates and errors of a store that may grow: plain data, read by routes and metrics without torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from expert_store.manifest import DeepExpert
from server.errors import ServerError

GrowthState = Literal["idle", "growing", "adopting", "shrinking", "reloading"]


class GrowthError(ServerError):
    """A store cannot grow or shrink as asked.

    GrowthError
      GrowthBusyError       it is growing, shrinking or reloading already
      NothingToGrowError    it has every expert, or its byte budget holds no more
      GrowthSourceError     the checkpoint that it came from is not where it was
    """


class GrowthBusyError(GrowthError):
    """One change of a store at a time."""


class NothingToGrowError(GrowthError):
    """No expert is missing that may be added."""


class GrowthSourceError(GrowthError):
    """The source checkpoint is not there."""


@dataclass(frozen=True)
class Candidate:
    """A deep expert that the store could have.

    Attributes:
        experts: of each layer.
        score: demanded mass × expected output norm ÷ byte.
        missing_share: share of all demanded mass that these experts would serve.
        num_bytes: that it would take.
    """

    experts: tuple[int, ...]
    score: float
    missing_share: float
    num_bytes: int

    @property
    def reason(self) -> str:
        """The reason to add it, in words."""
        return f"{self.missing_share:.2%} of the router mass asked for its experts and could not have them"


@dataclass(frozen=True)
class GrowthStatus:
    """The change of the store under way, and counts since the server started.

    Attributes:
        state: idle; growing (files are written); adopting (the running model takes them); shrinking, reloading.
        done_bytes, total_bytes: of the growth under way, or the last one.
        error: why the last growth failed, as the name of what went wrong; None if it did not.
        num_growths, num_failures, num_shrinks: since the server started; grown_bytes: written by growths.
        num_deep_experts, held_bytes: of the store now; budget_bytes: that the shards may take, None is without bound.
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
class Shrunk:
    """The deep experts that a store gave up; `freed_bytes` is None while another reader keeps the files."""

    removed: tuple[DeepExpert, ...]
    freed_bytes: int | None


@dataclass(frozen=True)
class Reloaded:
    """The difference of the store on disk to the one that was served."""

    num_added: int
    num_removed: int
    num_deep_experts: int


class GrowthLike(Protocol):
    """The part of `server.growth.grower.Grower` that routes and metrics use; any thread."""

    def status(self) -> GrowthStatus: ...
    def candidates(self) -> list[Candidate]: ...
    def grow(self, count: int) -> list[Candidate]: ...
    def shrink(self, indices: Collection[int] | None = None, *, count: int | None = None) -> Shrunk: ...
    def reload(self) -> Reloaded: ...
    def stop(self) -> None: ...
