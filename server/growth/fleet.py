"""Growth decided for several stores of one checkpoint at once, so that they get different experts instead of copies.

Requests go to the store that has what they want (`server.cluster.choice`). So an expert that another store has already
is worth less here: the requests that want it can go there. Invariants: a plan gives no store an expert that it has, and
no store more deep experts than its budget holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from server.growth.status import REPLACE_FACTOR, Candidate, GrowthStatus, StoreDemand

ELSEWHERE = 0.75
"""Worth of an expert that another store has, relative to one that none has. `benchmarks/fleet_growth.py` measures it:
with less, stores differ more, and requests miss more."""
_SUMS = (
    "done_bytes", "total_bytes", "num_growths", "num_failures", "num_shrinks", "grown_bytes", "num_deep_experts",
    "held_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class FleetStore:
    """A store and the replicas that read it, by name; the first of them changes it."""

    replicas: tuple[str, ...]
    demand: StoreDemand


def together(readers: Mapping[str, StoreDemand]) -> FleetStore:
    """One store as all of its readers see it: their demand is added; the rest is that of the first by name."""
    names = sorted(readers)
    demand_mass = np.sum([readers[name].demand_mass for name in names], axis=0)
    return FleetStore(tuple(names), replace(readers[names[0]], demand_mass=demand_mass))


def total(statuses: Sequence[GrowthStatus]) -> GrowthStatus:
    """The sums of several stores; the first state that is not idle and the first error; a budget if all have one."""
    sums = {name: sum(getattr(one, name) for one in statuses) for name in _SUMS}
    budgets = [one.budget_bytes for one in statuses if one.budget_bytes is not None]
    return GrowthStatus(
        state=next((one.state for one in statuses if one.state != "idle"), "idle"),
        error=next((one.error for one in statuses if one.error is not None), None),
        budget_bytes=sum(budgets) if len(budgets) == len(statuses) else None,
        **sums,
    )


@dataclass(frozen=True)
class FleetCandidate:
    """A deep expert for one of the stores; `num_elsewhere` of its layers' experts are in other stores."""

    store: str
    candidate: Candidate
    num_elsewhere: int


class FleetPlan:
    """The stores of a fleet, as they would be after what was planned so far.

    Args:
        stores: by name, all of one checkpoint.
        elsewhere: worth of an expert that another store has, relative to one that none has.

    Raises:
        ValueError: the stores differ in layers or experts.
    """

    def __init__(self, stores: Mapping[str, StoreDemand], elsewhere: float = ELSEWHERE) -> None:
        shapes = {one.available.shape for one in stores.values()}
        if len(shapes) != 1:
            raise ValueError(
                f"stores of one fleet have shapes {sorted(shapes)}, wanted one: they are of one checkpoint"
            )
        self._stores, self._factor = stores, elsewhere
        self._available = {name: one.available.copy() for name, one in stores.items()}
        self._room = {name: one.room for name, one in stores.items()}
        self._layers = np.arange(len(next(iter(self._available.values()))))

    @property
    def num_possible(self) -> int:
        """Deep experts that the stores lack and have room for."""
        missing = {name: int((~available).sum(axis=1).min()) for name, available in self._available.items()}
        rooms = {name: missing[name] if room is None else room for name, room in self._room.items()}
        return sum(min(count, rooms[name]) for name, count in missing.items())

    def candidates(self, count: int, only: Collection[str] | None = None) -> list[FleetCandidate]:
        """Up to `count` deep experts to add to the stores of `only` (None: all), best first; each counts as added for
        those after it."""
        planned: list[FleetCandidate] = []
        names = [name for name in self._stores if only is None or name in only]
        while len(planned) < count and (found := [one for name in names if (one := self._best(name))]):
            best = max(found, key=lambda one: one.candidate.score)  # of equals the first store's
            self._available[best.store][self._layers, best.candidate.experts] = True
            room = self._room[best.store]
            self._room[best.store] = None if room is None else room - 1
            planned.append(best)
        return planned

    def least(self, name: str) -> list[tuple[float, int]]:
        """The indices of a store's deep experts, each behind its score as if it were a candidate, lowest first."""
        store, worth = self._stores[name], self._worth(name)
        num_bytes = max(store.num_bytes, 1)
        scored = [
            (float(worth[self._layers, experts].sum()) / num_bytes, index)
            for index, experts in store.deep_experts.items()
        ]
        return sorted(scored, key=lambda one: (one[0], -one[1]))

    def replacement(self, name: str) -> tuple[FleetCandidate, int] | None:
        """The best missing deep expert of a store without room, and the index of the one that it replaces; None if
        none may."""
        store, missing = self._stores[name], self._best(name, is_bounded=False)
        if store.room != 0 or missing is None or not store.deep_experts:
            return None
        score, worst = self.least(name)[0]
        return (missing, worst) if score * REPLACE_FACTOR < missing.candidate.score else None

    def _elsewhere(self, name: str) -> npt.NDArray[np.bool_]:
        others = [available for other, available in self._available.items() if other != name]
        return np.any(others, axis=0) if others else np.zeros_like(self._available[name])

    def _worth(self, name: str) -> npt.NDArray[np.float64]:
        """Of every expert in this store, [L, E]."""
        store = self._stores[name]
        worth: npt.NDArray[np.float64] = store.demand_mass * store.norms
        return worth * np.where(self._elsewhere(name), self._factor, 1.0)

    def _best(self, name: str, *, is_bounded: bool = True) -> FleetCandidate | None:
        store, available = self._stores[name], self._available[name]
        if (is_bounded and self._room[name] == 0) or available.all(axis=1).any():
            return None
        worth = np.where(available, -np.inf, self._worth(name))
        experts = worth.argmax(axis=1)
        demanded = max(float(store.demand_mass.sum()), np.finfo(np.float64).tiny)
        candidate = Candidate(
            experts=tuple(int(expert) for expert in experts),
            score=float(worth[self._layers, experts].sum()) / max(store.num_bytes, 1),
            missing_share=float(store.demand_mass[self._layers, experts].sum()) / demanded,
            num_bytes=store.num_bytes,
        )
        return FleetCandidate(name, candidate, int(self._elsewhere(name)[self._layers, experts].sum()))
