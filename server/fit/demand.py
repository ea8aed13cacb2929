"""Hit rates of slots from the popularity of experts.

Each layer's experts have shares of the tokens that choose them. If steps drew them independently, an LRU cache would
have the hit rate that Che's approximation gives (Che, Tung & Wang 2002); real tokens also repeat the choices of those
just before, which `repeats` adds. The popularity is that of the store's usage.json, or the recorded one of
`popularity.json`, which `benchmarks/fit.py --popularity` measures on the recorded routing in `benchmarks/data`.
Invariant: shares are in [0, 1] and add up to top-k in every layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]
_LEAST, _MOST = 1e-9, 1.0 - 1e-9


@dataclass(frozen=True)
class Demand:
    """Shares [L, E] of the tokens that choose each expert; `source` says in words where they come from."""

    shares: Shares
    repeats: float
    source: str

    def distinct(self, num_rows: int) -> float:
        """Distinct experts that a step of so many rows needs in a layer, mean over all layers."""
        return float(self._step(num_rows).sum(axis=1).mean())

    def hit_rate(self, num_slots: float, num_rows: int = 1) -> float:
        """Share of the distinct experts of a step that are in slots, with so many slots in each layer, by LRU."""
        step = self._step(num_rows)
        if num_slots >= step.shape[1]:
            return 1.0
        independent = _che(step, num_slots)
        served = float((step * independent).sum() / step.sum())
        # Rows together need more slots than one: those that have no room for the step's own experts repeat nothing.
        room = min(1.0, num_slots / self.distinct(num_rows))
        return served + (1.0 - served) * self.repeats * room

    def _step(self, num_rows: int) -> Shares:
        """Shares of the steps of so many rows that need each expert."""
        return np.asarray(1.0 - (1.0 - self.shares.clip(_LEAST, _MOST)) ** num_rows)


def _che(step: Shares, num_slots: float) -> Shares:
    """[L, E], the probability that an expert is in a slot: that it was needed within the characteristic time, in which
    a layer's steps need as many distinct experts as it has slots."""
    low, high = np.full(len(step), -6.0), np.full(len(step), 12.0)  # of its logarithm to base 10
    logs = np.log1p(-step.clip(_LEAST, _MOST))
    for _ in range(60):
        middle = (low + high) / 2
        filled = -np.expm1(logs * (10.0**middle)[:, None])
        more = filled.sum(axis=1) < num_slots
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return np.asarray(-np.expm1(logs * (10.0**low)[:, None]))


def of_counts(counts: npt.NDArray[np.int64], top_k: int, source: str) -> Demand:
    """The demand of counts [L, E] of a usage ledger; a layer without counts has the default popularity."""
    default = recorded(counts.shape[0], counts.shape[1], top_k)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, _capped(counts / np.maximum(total, 1), top_k), default.shares)
    return Demand(shares, default.repeats, source)


def recorded(num_layers: int, num_experts: int, top_k: int) -> Demand:
    """The popularity of the recorded routing, stretched over so many experts by rank."""
    record = _record()
    profile = np.asarray(record["popularity"], dtype=np.float64)
    own = (np.arange(len(profile)) + 0.5) / len(profile)
    at = (np.arange(num_experts) + 0.5) / num_experts
    shares = np.interp(at, own, profile)
    layer = _capped(shares[None] / shares.sum(), top_k)
    return Demand(np.repeat(layer, num_layers, axis=0), float(record["repeats"]), str(record["source"]))


def _capped(shares: Shares, top_k: int) -> Shares:
    """Shares [L, E] that add up to 1 scaled to add up to top-k, none above 1: an expert serves a token once."""
    scaled = shares * top_k
    for _ in range(shares.shape[1]):
        full = scaled >= 1.0
        free = np.where(full, 0.0, scaled)
        room = top_k - full.sum(axis=1, keepdims=True)
        wanted = free.sum(axis=1, keepdims=True)
        grown = np.where(full, 1.0, free * np.divide(room, wanted, out=np.ones_like(wanted), where=wanted > 0))
        if np.allclose(grown, scaled):
            break
        scaled = grown
    return np.asarray(scaled.clip(0.0, 1.0))


@cache
def _record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(files("server.fit").joinpath("popularity.json").read_text())
    return record
