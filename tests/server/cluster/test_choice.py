"""The choice of a replica: bounded load, then the beginning and the experts; two choices where nothing is known."""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cluster.choice import Candidate, ChoiceOptions, Fleet
from server.cluster.likeness import Likeness, words_of
from server.cluster.statistics import ReplicaStatistics, Topic

NUM = 8
NONE = Likeness((), (), words_of(""))


def _statistics(
    *,
    held: tuple[int, ...] = (),
    available: Sequence[int] = range(NUM),
    topics: tuple[Topic, ...] = (),
    prefixes: tuple[int, ...] = (),
    taken_at: float = 0.0,
) -> ReplicaStatistics:
    return ReplicaStatistics(
        taken_at, 0, np.isin(np.arange(NUM), held), np.isin(np.arange(NUM), available), topics, prefixes
    )


def _topic(key: int, experts: tuple[int, ...], words: str = "") -> Topic:
    demand = np.isin(np.arange(NUM), experts).astype(np.float32)
    return Topic(key, words_of(words), demand / demand.sum(), 100.0)


def _fleet(**replicas: ReplicaStatistics) -> Fleet:
    fleet = Fleet()
    for name, statistics in replicas.items():
        fleet.update(name, statistics.to_wire())
    return fleet


def _ranked(fleet: Fleet, likeness: Likeness, now: float = 1.0, **loads: float) -> list[Candidate]:
    return fleet.ranked(likeness, loads, now, random.Random(0))


def test_the_replica_that_holds_the_beginning_is_first() -> None:
    fleet = _fleet(a=_statistics(), b=_statistics(prefixes=(1, 2, 3)), c=_statistics(prefixes=(1,)))
    first, second = _ranked(fleet, Likeness((1, 2, 3, 4), (), words_of("")), a=0, b=0, c=0)
    assert (first.replica, first.blocks) == ("b", 3)
    assert (second.replica, second.blocks) == ("c", 1)


def test_a_beginning_counts_only_without_a_gap() -> None:
    fleet = _fleet(a=_statistics(prefixes=(2, 3, 4)), b=_statistics(prefixes=(1,)))
    assert _ranked(fleet, Likeness((1, 2, 3, 4), (), words_of("")), a=0, b=0)[0].replica == "b"


def test_the_replica_that_holds_the_likely_experts_is_first_whoever_learned_them() -> None:
    learned = _topic(7, (0, 1))
    fleet = _fleet(a=_statistics(held=(4, 5), topics=(learned,)), b=_statistics(held=(0, 1)), c=_statistics())
    options = ChoiceOptions(wanted=0.0)
    fleet.options = options
    first = _ranked(fleet, Likeness((), (7,), words_of("")), a=0, b=0, c=0)[0]
    assert (first.replica, first.held) == ("b", pytest.approx(1.0))


def test_the_most_telling_key_says_what_is_likely() -> None:
    fleet = _fleet(a=_statistics(topics=(_topic(1, (0,)), _topic(2, (5,)))))
    for keys, expert in (((1, 2), 0), ((2, 1), 5), ((9, 2), 5)):
        likely = fleet.likely_demand(Likeness((), keys, words_of("")), 1.0)
        assert likely is not None
        assert likely.argmax() == expert
    assert fleet.likely_demand(NONE, 1.0) is None


def test_words_say_what_is_likely_where_no_key_is_known() -> None:
    sea, sums = "ship sea harbour sail the of", "plus minus seven twelve the of"
    fleet = _fleet(a=_statistics(topics=(_topic(1, (0,), sea), _topic(2, (5,), sums))))
    likely = fleet.likely_demand(Likeness((), (), words_of("the ship at sea")), 1.0)
    assert likely is not None
    assert likely.argmax() == 0
    assert fleet.likely_demand(Likeness((), (), words_of("entirely other things")), 1.0) is None


@given(
    loads=st.lists(st.integers(0, 50), min_size=2, max_size=12),
    holders=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 100),
)
def test_no_replica_over_the_bound_is_chosen(loads: list[int], holders: set[int], seed: int) -> None:
    names = [str(at) for at in range(len(loads))]
    fleet = _fleet(**{name: _statistics(prefixes=(1,) if int(name) in holders else ()) for name in names})
    by_name = {name: float(load) for name, load in zip(names, loads, strict=True)}
    likeness = Likeness((1,), (), words_of(""))
    ranked = fleet.ranked(likeness, by_name, 1.0, random.Random(seed))
    assert ranked == fleet.ranked(likeness, by_name, 1.0, random.Random(seed))
    bound = 1.25 * sum(loads) / len(loads) + 1
    warm = [name for name in names if int(name) in holders and by_name[name] <= bound]
    if warm:
        assert by_name[ranked[0].replica] <= bound
        assert ranked[0].replica in warm or by_name[ranked[0].replica] < min(by_name[name] for name in warm)


def test_late_statistics_leave_two_choices() -> None:
    fleet = _fleet(a=_statistics(prefixes=(1, 2, 3, 4)), b=_statistics(), c=_statistics())
    likeness = Likeness((1, 2, 3, 4), (), words_of(""))
    loads = {"a": 3.0, "b": 1.0, "c": 2.0}
    draw = random.Random(0)
    assert all(fleet.ranked(likeness, loads, 1.0, draw)[0].replica == "a" for _ in range(20))
    late = Counter(fleet.ranked(likeness, loads, 60.0, draw)[0].replica for _ in range(300))
    assert late["a"] == 0  # the busiest of three is never the less busy of two
    assert late["b"] > late["c"] > 0


def test_an_unknown_replica_counts_as_an_average_one() -> None:
    topics = (_topic(1, (0, 1)),)
    fleet = _fleet(good=_statistics(held=(0, 1), topics=topics), bad=_statistics(held=(6, 7), topics=topics))
    fleet.options = ChoiceOptions(wanted=0.0, load=0.0)
    likeness = Likeness((), (1,), words_of(""))
    loads = {"good": 0.0, "bad": 0.0, "new": 0.0}
    assert [candidate.replica for candidate in _ranked(fleet, likeness, **loads)] == ["good", "new"]
    assert [candidate.held for candidate in _ranked(fleet, likeness, **loads)] == pytest.approx([1.0, 0.5])


def test_newer_statistics_replace_older_ones_and_gone_replicas_are_forgotten() -> None:
    fleet = _fleet(a=_statistics(prefixes=(1,), taken_at=5.0), b=_statistics(taken_at=5.0))
    fleet.update("a", _statistics(taken_at=4.0).to_wire())
    likeness = Likeness((1,), (), words_of(""))
    assert _ranked(fleet, likeness, 6.0, a=0, b=0)[0].blocks == 1
    fleet.update("a", _statistics(taken_at=8.0).to_wire())
    assert _ranked(fleet, likeness, 9.0, a=0, b=0)[0].blocks == 0
    fleet.update("b", _statistics(prefixes=(1,), taken_at=9.0).to_wire())
    fleet.keep(["a"])
    assert _ranked(fleet, likeness, 11.0, a=0, b=0)[0].blocks == 0


def test_a_replica_of_another_model_is_a_candidate_without_worth() -> None:
    other = ReplicaStatistics(2.0, 0, *np.ones((2, 2 * NUM), dtype=np.bool_))
    fleet = _fleet(a=_statistics(held=(0,), topics=(_topic(1, (0,)),)), b=other)
    assert {candidate.replica for candidate in _ranked(fleet, Likeness((), (1,), words_of("")), a=0, b=0)} == {
        "a",
        "b",
    }


def test_one_replica_or_none() -> None:
    assert [candidate.replica for candidate in _ranked(Fleet(), NONE, a=3)] == ["a"]
    assert _ranked(Fleet(), NONE) == []


def test_what_was_just_sent_counts_until_statistics_say_more() -> None:
    fleet = _fleet(a=_statistics(), b=_statistics())
    likeness = Likeness((1, 2, 3), (), words_of(""))
    fleet.sent("b", likeness, 1.0)
    assert _ranked(fleet, likeness, a=0, b=0)[0] == Candidate("b", 3, 0.0)
    fleet.update("b", _statistics(taken_at=2.0).to_wire())
    assert _ranked(fleet, likeness, 4.0, a=0, b=0)[0].blocks == 0
    fleet.sent("b", likeness, 5.0)
    fleet.keep(["a"])
    assert _ranked(fleet, likeness, 5.0, a=0, b=0)[0].blocks == 0


def test_the_replica_that_has_the_likely_experts_is_first_and_equal_ones_share_by_load() -> None:
    learned = _topic(7, (0, 1, 2))
    likeness = Likeness((), (7,), words_of(""))
    fleet = _fleet(a=_statistics(topics=(learned,), available=(0, 4)), b=_statistics(available=(0, 1, 2, 3)))
    fleet.options = ChoiceOptions(wanted=0.0)
    assert _ranked(fleet, likeness, a=0, b=1)[0].replica == "b"
    same = _fleet(**{name: _statistics(topics=(learned,)) for name in "abcdefgh"})
    same.options = ChoiceOptions(wanted=0.0)
    draw = random.Random(0)
    loads = dict.fromkeys("abcdefgh", 0.0)
    chosen = Counter(same.ranked(likeness, loads, 1.0, draw)[0].replica for _ in range(400))
    assert min(chosen[name] for name in loads) > 20


def test_a_long_beginning_is_worth_waiting_for_and_a_short_one_is_not() -> None:
    beginning = tuple(range(1, 17))
    for num_held, expected in ((16, "a"), (1, "b")):
        fleet = _fleet(a=_statistics(prefixes=beginning[:num_held]), b=_statistics())
        assert _ranked(fleet, Likeness(beginning, (), words_of("")), a=5.0, b=1.0)[0].replica == expected
    fleet = _fleet(a=_statistics(prefixes=beginning), b=_statistics())
    assert _ranked(fleet, Likeness(beginning, (), words_of("")), a=12.0, b=0.0)[0].replica == "b", (
        "two requests at most"
    )


def test_a_replica_that_has_served_nothing_gets_its_share_of_the_kinds() -> None:
    both = (_topic(1, (0, 1)), _topic(2, (4, 5)))
    fleet = _fleet(a=_statistics(held=(0, 1, 4), topics=both), b=_statistics())
    draw, loads = random.Random(0), {"a": 0.0, "b": 0.0}
    chosen = Counter(fleet.ranked(Likeness((), (2,), words_of("")), loads, 1.0, draw)[0].replica for _ in range(200))
    assert min(chosen["a"], chosen["b"]) > 60
