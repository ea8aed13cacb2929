"""What a store that may grow says of itself; plain data, so that routes and metrics read it without loading torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from expert_store.manifest import DeepExpert
from server.growth.ranking import Candidate

GrowthState = Literal["idle", "growing", "adopting", "shrinking", "reloading"]


@dataclass(frozen=True)
class GrowthStatus:
    """What the store is going through, and what it went through since the server started.

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
    """What was given up; `freed_bytes` is None while the files have to stay because somebody else reads the store."""

    removed: tuple[DeepExpert, ...]
    freed_bytes: int | None


@dataclass(frozen=True)
class Reloaded:
    """What the store on disk had more and less than what was served."""

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
