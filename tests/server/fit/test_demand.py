"""Hit rates by popularity: those of a cache that is simulated, whatever the demand and the number of rows."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fit import lru_hit_rate
from benchmarks.gpu.paging import recorded as trace_of
from benchmarks.gpu.paging import synthetic
from server.fit.demand import Demand, of_counts, recorded


def _shares(trace: np.ndarray, num_experts: int) -> np.ndarray:
    layers = range(trace.shape[1])
    return np.stack([np.bincount(trace[:, layer].ravel(), minlength=num_experts) for layer in layers]) / len(trace)


@pytest.mark.parametrize(("slots", "skew"), [(8, 0.6), (16, 0.6), (16, 1.0), (24, 0.0)])
def test_the_hit_rate_of_independent_draws_is_that_of_a_simulated_cache(slots: int, skew: float) -> None:
    trace = synthetic(1500, 2, 32, 4, skew, 0.0, seed=3)
    demand = Demand(_shares(trace, 32), 0.0, "synthetic")
    assert demand.hit_rate(slots) == pytest.approx(lru_hit_rate(trace, slots, first=100), abs=0.03)


@pytest.mark.parametrize("task", ["intent", "summary"])
@pytest.mark.parametrize("slots", [8, 16, 32, 48])
def test_the_recorded_popularity_gives_the_hit_rates_of_the_recorded_tasks(task: str, slots: int) -> None:
    trace = trace_of(task)[:, ::4]
    assert recorded(7, 64, 6).hit_rate(slots) == pytest.approx(lru_hit_rate(trace, slots), abs=0.05)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (128, 8), (256, 8), (4, 4)])
def test_the_recorded_popularity_fits_models_of_every_size(num_experts: int, top_k: int) -> None:
    demand = recorded(3, num_experts, top_k)
    assert demand.shares.shape == (3, num_experts)
    assert demand.shares.sum(axis=1) == pytest.approx(top_k)
    assert demand.shares.max() <= 1.0
    assert demand.hit_rate(num_experts) == 1.0
    assert demand.distinct(1) == pytest.approx(top_k)
    rates = [demand.hit_rate(slots) for slots in range(top_k, num_experts + 1, max(1, num_experts // 16))]
    assert rates == sorted(rates)


def test_rows_of_a_step_share_experts_and_slots() -> None:
    demand = recorded(1, 64, 6)
    rows = np.random.default_rng(0).random((4000, 8, 64)).argsort()[..., :6]  # uniform
    uniform = Demand(np.full((1, 64), 6 / 64), 0.0, "uniform")
    measured = np.mean([len(np.unique(step)) for step in rows[:500]])
    assert uniform.distinct(8) == pytest.approx(measured, rel=0.01)
    assert 6 < demand.distinct(8) < uniform.distinct(8)  # popular experts are shared more often
    assert demand.hit_rate(16, 8) < demand.hit_rate(16, 1) + 0.2
    assert demand.hit_rate(64, 8) == 1.0


def test_counts_of_a_ledger_become_shares_and_layers_without_counts_are_as_recorded() -> None:
    counts = np.array([[90, 30, 30, 30, 20], [0, 0, 0, 0, 0]])
    demand = of_counts(counts, 2, "usage.json")
    assert demand.source == "usage.json"
    assert demand.shares[0] == pytest.approx([0.9, 0.3, 0.3, 0.3, 0.2])
    assert demand.shares[1] == pytest.approx(recorded(1, 5, 2).shares[0])
