"""Growth of a cluster's stores by themselves: what a look begins, and what it leaves."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from server.cluster.growth import FleetGrower
from server.growth.fleet import FleetStore
from server.growth.status import GrowthError, GrowthStatus, StoreDemand
from server.settings.schema import GrowthSettings

STATUS = GrowthStatus("idle", 0, 0, None, 0, 0, 0, 0, 2, 200, 400)


def _store(wanted: int, *, budget: int | None = 400, state: str = "idle") -> FleetStore:
    """The deep experts 0 and 1 of six, each of 100 bytes; it wants the expert `wanted` of its two layers most."""
    available = np.isin(np.arange(6), [0, 1])[None].repeat(2, 0)
    mass = np.ones((2, 6))
    mass[:, wanted] = 20.0
    status = replace(STATUS, budget_bytes=budget, state=state)  # type: ignore[arg-type]
    demand = StoreDemand(available, mass, np.ones_like(mass), {0: (0, 0), 1: (1, 1)}, 100, status)
    return FleetStore((f"replica-of-{wanted}",), demand)


class _Stores:
    def __init__(self, stores: Mapping[str, FleetStore], refusal: GrowthError | None = None) -> None:
        self.of_cluster, self.refusal = stores, refusal
        self.asked: list[tuple[str, str, object]] = []

    async def stores(self) -> Mapping[str, FleetStore]:
        return self.of_cluster

    async def grow(self, replica: str, named: Sequence[tuple[int, ...]]) -> None:
        self.asked.append(("grow", replica, list(named)))

    async def shrink(self, replica: str, index: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("shrink", replica, index))


def _look(stores: _Stores, **settings: object) -> int:
    return asyncio.run(FleetGrower(stores, GrowthSettings(**{"grow_min_share": 0.1, **settings})).look())  # type: ignore[arg-type]


def test_each_store_with_a_budget_gets_what_it_wants() -> None:
    stores = _Stores({"a": _store(2), "b": _store(3), "without": _store(4, budget=None)})
    assert _look(stores) == 2
    assert stores.asked == [("grow", "replica-of-2", [(2, 2)]), ("grow", "replica-of-3", [(3, 3)])]


@pytest.mark.parametrize(
    "stores",
    [{}, {"a": _store(2, budget=200)}, {"a": _store(0)}, {"a": _store(2), "b": _store(3, state="growing")}],
    ids=["none", "full", "has what it wants", "one changes"],
)
def test_nothing_is_begun_where_nothing_is_worth_it_or_a_change_runs(stores: Mapping[str, FleetStore]) -> None:
    made = _Stores(stores)
    assert _look(made) == 0
    assert made.asked == []


def test_a_full_store_gives_one_up_for_one_in_much_higher_demand() -> None:
    stores = _Stores({"a": _store(2, budget=200)})
    assert _look(stores, grow_replace=True) == 1
    assert stores.asked == [("shrink", "replica-of-2", 1), ("grow", "replica-of-2", [(2, 2)])]


def test_a_replica_that_may_not_give_one_up_keeps_it() -> None:
    stores = _Stores({"a": _store(2, budget=200)}, GrowthError("a profile needs it"))
    assert _look(stores, grow_replace=True) == 0
    assert stores.asked == []
