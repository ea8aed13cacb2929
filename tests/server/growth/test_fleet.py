"""Growth for several stores: what others have is worth less, budgets hold, and sums are those of all stores."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.growth.fleet import ELSEWHERE, FleetPlan, together, total
from server.growth.status import GrowthStatus, StoreDemand

LAYERS, EXPERTS = 2, 6
STATUS = GrowthStatus("idle", 0, 0, None, 1, 0, 0, 100, 2, 200, 400)


def _store(*held: int, demand: dict[int, float] | None = None, budget: int | None = None) -> StoreDemand:
    """A store of deep experts of one id in every layer, each of 100 bytes; its demand is by id, 1 for the others."""
    mass = np.ones((LAYERS, EXPERTS))
    for expert, wanted in (demand or {}).items():
        mass[:, expert] = wanted
    available = np.isin(np.arange(EXPERTS), held)[None].repeat(LAYERS, 0)
    status = replace(STATUS, held_bytes=100 * len(held), budget_bytes=None if budget is None else 100 * budget)
    return StoreDemand(available, mass, np.ones_like(mass), {at: (at,) * LAYERS for at in held}, 100, status)


def test_stores_with_the_same_demand_get_different_experts() -> None:
    demand = {2: 9.0, 3: 8.0, 4: 7.9}
    plan = FleetPlan({"a": _store(0, 1, demand=demand), "b": _store(0, 1, demand=demand)})
    found = plan.candidates(3)
    assert [(one.store, one.candidate.experts[0]) for one in found] == [("a", 2), ("a", 3), ("a", 4)]
    assert [one.num_elsewhere for one in found] == [0, 0, 0]
    plan = FleetPlan({"a": _store(0, 1, demand=demand, budget=3), "b": _store(0, 1, demand=demand, budget=3)})
    assert [(one.store, one.candidate.experts[0]) for one in plan.candidates(9)] == [("a", 2), ("b", 3)]


def test_an_expert_that_is_elsewhere_is_a_copy_only_where_it_is_wanted_much_more() -> None:
    with_it = _store(0, 2)
    for wanted, expected in ((0.9 / ELSEWHERE, 1), (1.1 / ELSEWHERE, 2)):
        plan = FleetPlan({"a": with_it, "b": _store(0, demand={2: wanted})})
        (best,) = plan.candidates(1, ["b"])
        assert best.candidate.experts == (expected,) * LAYERS
        assert best.num_elsewhere == (LAYERS if expected == 2 else 0)


def test_a_full_store_replaces_what_is_worth_little_beside_what_it_lacks() -> None:
    full = _store(0, 1, demand={0: 5.0, 2: 9.0}, budget=2)
    missing, index = FleetPlan({"a": full}).replacement("a") or pytest.fail("nothing is replaced")
    assert (missing.candidate.experts, index) == ((2, 2), 1)
    assert FleetPlan({"a": _store(0, 1, demand={2: 1.9}, budget=2)}).replacement("a") is None, "not twice as much"
    assert FleetPlan({"a": _store(0, 1, demand={2: 9.0}, budget=3)}).replacement("a") is None, "there is room"
    copies = {"a": _store(0, 1, demand={2: 1.9}, budget=2), "b": _store(1)}
    assert FleetPlan(copies).replacement("a") is not None, "a copy is worth less"


@settings(max_examples=40, deadline=None)
@given(
    held=st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=1, max_size=4),
    budget=st.integers(0, EXPERTS) | st.none(),
    seed=st.integers(0, 9),
)
def test_a_plan_keeps_to_budgets_and_gives_no_store_what_it_has(
    held: list[set[int]], budget: int | None, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    stores = {
        str(at): replace(_store(*one, budget=budget), demand_mass=draw.random((LAYERS, EXPERTS)))
        for at, one in enumerate(held)
    }
    plan = FleetPlan(stores)
    possible = plan.num_possible
    found = plan.candidates(100)
    assert len(found) == possible
    for name, store in stores.items():
        added = [one.candidate.experts for one in found if one.store == name]
        has = store.available.copy()
        for experts in added:
            assert not has[np.arange(LAYERS), experts].any()
            has[np.arange(LAYERS), experts] = True
        assert store.room is None or len(added) <= store.room
    assert plan.candidates(100) == []


def test_the_readers_of_a_store_add_up() -> None:
    first, second = _store(0, demand={1: 3.0}), _store(0, demand={2: 5.0})
    found = together({"b": second, "a": first})
    assert found.replicas == ("a", "b")
    assert found.demand.demand_mass[0].tolist() == [2.0, 4.0, 6.0, 2.0, 2.0, 2.0]
    assert found.demand.deep_experts == first.deep_experts


def test_the_sums_of_several_stores() -> None:
    busy = replace(STATUS, state="growing", error="DiskFullError", done_bytes=5)
    summed = total([STATUS, busy])
    assert (summed.state, summed.error, summed.done_bytes, summed.held_bytes) == ("growing", "DiskFullError", 5, 400)
    assert summed.budget_bytes == 800
    assert total([STATUS, replace(STATUS, budget_bytes=None)]).budget_bytes is None


def test_stores_of_different_models_have_no_common_plan() -> None:
    other = replace(_store(0), available=np.zeros((1, EXPERTS), dtype=np.bool_))
    with pytest.raises(ValueError, match="one checkpoint"):
        FleetPlan({"a": _store(0), "b": other})
