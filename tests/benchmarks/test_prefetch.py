"""The simulated step, its caches, and the predictors that are fitted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu.prefetch import Cache, Machine, from_choices, guessed_at_random, paged, recalls, ridge

SIMPLE = Machine(
    front=3.0, middle=2.0, down=1.0, rest=0.0, layers=4, predict=0.0, bus=1.0, span=10.0, in_flight=0.0
)  # fmt: skip


def test_a_step_without_misses_takes_its_layers():
    assert SIMPLE.step([[], [], []]) == pytest.approx(3 * 6.0)


def test_a_miss_hides_what_is_computed_meanwhile():
    assert SIMPLE.step([[], [7]]) == pytest.approx(6.0 + 3.0 + 10.0 + 1.0)


def test_a_right_guess_saves_the_idle_time_of_the_bus():
    # From layer 0's router on the bus is idle for middle + down + front.
    assert SIMPLE.step([[], [7]], [[], [7]]) == pytest.approx(20.0 - 6.0)


def test_a_guess_waits_for_what_the_layer_itself_misses():
    # Idle only for down + front after the fetch.
    assert SIMPLE.step([[3], [7]], [[], [7]]) == pytest.approx(2 * (3.0 + 10.0 + 1.0) - 4.0)


def test_a_wrong_guess_costs_what_is_in_flight_and_no_more():
    machine = replace(SIMPLE, in_flight=0.5)
    assert machine.step([[], [7]], [[], [6]]) == pytest.approx(20.0 + 0.5)
    assert machine.step([[], []], [[], [6]]) == pytest.approx(12.0)


def test_guesses_two_layers_early_go_on_where_they_were_left():
    near, far = [[], [], [7]], [[], [], [7]]
    assert SIMPLE.step([[], [], [7]], near) == pytest.approx(12.0 + 14.0 - 6.0)
    assert SIMPLE.step([[], [], [7]], near, far) == pytest.approx(12.0 + 3.0 + 2.0 + 1.0)


def test_guesses_that_are_known_late_have_less_time():
    assert replace(SIMPLE, late=True).step([[], [7]], [[], [7]]) == pytest.approx(20.0 - 3.0)


@pytest.mark.parametrize(("policy", "victim"), [("lru", 1), ("lfu", 2)])
def test_cache_evicts_by_its_policy_and_never_what_is_wanted(policy, victim):
    cache = Cache(3, policy)
    for wanted in ([0, 1], [1], [0, 2], [0]):
        cache.take(wanted)
    assert cache.take([5, 0]) == [5]
    assert set(cache.last_use) == {0, 1, 2, 5} - {victim}


def test_perfect_guesses_are_found_and_none_that_are_always_wrong():
    random = np.random.default_rng(0)
    choice = np.stack([random.permutation(16)[:3] for _ in range(100 * 4)]).reshape(100, 4, 3)
    for right, wanted in ((1.0, 1.0), (0.0, 0.0)):
        row = paged(choice, (guessed_at_random(choice, 16, right, seed=1),), 6, "lru", SIMPLE, skip=10)
        assert row["found"] == wanted
        assert row["precision"] == wanted
    half = recalls(guessed_at_random(choice, 16, 0.5, seed=1), choice)["recall"]
    assert half == pytest.approx(0.5, abs=0.05)


def test_what_follows_is_learned_from_choices():
    random = np.random.default_rng(0)
    first = np.stack([random.permutation(16)[:3] for _ in range(400)])
    choice = np.stack([first, (first + 5) % 16], axis=1)
    scores = from_choices(choice[:300], choice[300:], 16)
    assert recalls(scores["follows"], choice[300:])["recall"] > 0.95
    assert recalls(scores["popular"], choice[300:])["recall"] < 0.5


def test_ridge_recovers_a_linear_map():
    random = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(200, 8, generator=random), torch.randn(8, 5, generator=random)
    torch.testing.assert_close(ridge(x, x @ wanted, strength=1e-6), wanted, rtol=1e-3, atol=1e-3)
