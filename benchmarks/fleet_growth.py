"""The deficit of a fleet whose replicas grow stores of their own: growth decided for the fleet, beside each for itself.

Each replica begins with the deep experts that all kinds of text together want most. In every round requests of kinds
of text, by Zipf's law, go to replicas by `server.cluster.choice`, from the statistics of the round before; then the
stores grow by one deep expert each, until the budget is full, and afterwards replace. Routing is recorded
(`benchmarks/data`); the likely demand of a request is that of its kind so far.

- *deficit*: share of the demanded router mass that the chosen replicas' stores lacked, in the last third of the rounds;
- *copies*: mean number of replicas that have an expert which any has;
- *covered*: share of all experts that any replica has.

    python -m benchmarks.fleet_growth [--traces FILE ...] [--replicas 4] [--save]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.affinity import Kinds, read_kinds
from benchmarks.harness.reporting import REPOSITORY, environment, finish, table
from server.cluster.choice import ChoiceOptions, Fleet
from server.cluster.likeness import WORD_BUCKETS, Likeness
from server.cluster.statistics import TopicLedger, sketch_layers
from server.growth.fleet import FleetPlan, StoreDemand
from server.growth.status import GrowthStatus

START, BUDGET = 8, 24
ROUNDS, REQUESTS, TOKENS = 60, 40, 64
"""Rounds; requests of each replica in a round; tokens of a request."""
DECAY = 0.5
NO_WORDS = np.zeros(WORD_BUCKETS, dtype=np.bool_)
POLICIES: dict[str, tuple[bool, float, float]] = {
    "any replica, own demand": (False, 1.0, 0.0),
    "choice by what is available, own demand": (False, 1.0, ChoiceOptions().available),
    **{f"fleet, {worth:g} for copies": (True, worth, ChoiceOptions().available) for worth in (0.0, 0.1, 0.25, 0.5)},
}
"""Growth for the fleet; worth of an expert that is elsewhere; weight of availability in the choice."""


class Stores:
    """The stores of all replicas, and the recent demand of each."""

    def __init__(self, kinds: Kinds, num_replicas: int) -> None:
        _, self.num_layers, _ = kinds.experts.shape
        shape = (self.num_layers, kinds.num_experts)
        everyone = demand_of(kinds, np.arange(len(kinds.experts)))
        first = np.argsort(-everyone, axis=1)[:, :START]
        self.held = [{at: tuple(first[:, at].tolist()) for at in range(START)} for _ in range(num_replicas)]
        self.demand = np.zeros((num_replicas, *shape))
        self.shape, self.next_index = shape, START

    def available(self, at: int) -> npt.NDArray[np.bool_]:
        found = np.zeros(self.shape, dtype=np.bool_)
        for experts in self.held[at].values():
            found[np.arange(self.num_layers), experts] = True
        return found

    def state(self, at: int) -> StoreDemand:
        held = len(self.held[at])
        status = GrowthStatus("idle", 0, 0, None, 0, 0, 0, 0, held, held, BUDGET)
        return StoreDemand(self.available(at), self.demand[at], np.ones(self.shape), self.held[at], 1, status)

    def grow(self, is_for_fleet: bool, elsewhere: float) -> None:
        """Add a deep expert to each store, or replace one; in turn, so that a store knows what those before it got."""
        for at in range(len(self.held)):
            names = range(len(self.held)) if is_for_fleet else [at]
            plan = FleetPlan(
                {str(one): replace(self.state(one), status=self._full(one, at)) for one in names}, elsewhere
            )
            replaced = plan.replacement(str(at)) if len(self.held[at]) >= BUDGET else None
            if replaced is not None:
                del self.held[at][replaced[1]]
            chosen = [replaced[0]] if replaced else plan.candidates(1)
            for one in chosen:
                self.held[at][self.next_index] = one.candidate.experts
                self.next_index += 1

    def _full(self, one: int, growing: int) -> GrowthStatus:
        """Only the growing store has room."""
        status = self.state(one).status
        return status if one == growing else replace(status, budget_bytes=0)


def demand_of(kinds: Kinds, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """[L, E], picks of the tokens."""
    picks = kinds.experts[tokens].astype(np.int64) + np.arange(kinds.experts.shape[1])[None, :, None] * 64
    found = np.bincount(picks.ravel(), minlength=kinds.experts.shape[1] * kinds.num_experts)
    return found.reshape(kinds.experts.shape[1], kinds.num_experts).astype(np.float64)


def simulate(kinds: Kinds, num_replicas: int, policy: str, seed: int = 0) -> dict[str, float]:
    """The figures of one policy."""
    is_for_fleet, elsewhere, weight = POLICIES[policy]
    draw = random.Random(seed)
    stores, router = Stores(kinds, num_replicas), Fleet(ChoiceOptions(held=0.0, wanted=0.0, available=weight))
    layers = sketch_layers(*stores.shape)
    ledgers = [TopicLedger(len(layers) * kinds.num_experts) for _ in range(num_replicas)]
    weights = [1.0 / (rank + 1) for rank in range(len(kinds.start))]
    missed = wanted = 0.0
    for number in range(ROUNDS):
        now, loads = 10.0 * number, dict.fromkeys(map(str, range(num_replicas)), 0.0)
        have = [stores.available(at) for at in range(num_replicas)]
        for at, ledger in enumerate(ledgers):
            sketch = have[at][layers].ravel()
            router.update(str(at), ledger.statistics(now, 0, sketch, sketch).to_wire())
        stores.demand *= DECAY
        for _ in range(REQUESTS * num_replicas):
            kind = draw.choices(range(len(weights)), weights)[0]
            likeness = Likeness((), (kind + 1,), NO_WORDS)
            at = int(router.ranked(likeness, loads, now, draw)[0].replica)
            loads[str(at)] += 1  # of this round: the bound of load spreads all of it
            mass = demand_of(kinds, kinds.tokens(kind, draw.randrange(int(kinds.length[kind])), TOKENS))
            stores.demand[at] += mass
            ledgers[at].add(ledgers[at].begin(likeness), mass[layers].ravel(), TOKENS)
            if number >= ROUNDS * 2 // 3:
                missed += float(mass[~have[at]].sum())
                wanted += float(mass.sum())
        stores.grow(is_for_fleet, elsewhere)
    held = np.sum([stores.available(at) for at in range(num_replicas)], axis=0)
    return {"deficit": missed / wanted, "copies": float(held[held > 0].mean()), "covered": float((held > 0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = REPOSITORY / "benchmarks" / "data" / "routing-deepseek-v2-lite.npz"
    parser.add_argument("--traces", type=Path, nargs="+", default=[bundled], help="recorded routing")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fleet_growth.json")
    arguments = parser.parse_args()
    kinds = read_kinds(arguments.traces)
    sizes: dict[str, dict[str, Any]] = {}
    for num_replicas in arguments.replicas:
        by_policy = sizes[str(num_replicas)] = {}
        for policy in POLICIES:
            found = [simulate(kinds, num_replicas, policy, seed) for seed in range(arguments.seeds)]
            by_policy[policy] = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        rows = [(policy, *figures.values()) for policy, figures in by_policy.items()]
        print(f"\n{num_replicas} replicas, {BUDGET} of {kinds.num_experts} deep experts each")
        print(table(("growth", "deficit", "copies", "covered"), rows), flush=True)
    result = {
        "benchmark": "fleet_growth", **environment(), "traces": [path.name for path in arguments.traces],
        "num_kinds": len(kinds.start), "start": START, "budget": BUDGET, "rounds": ROUNDS, "replicas": sizes,
    }  # fmt: skip
    finish("fleet_growth", result, save=arguments.save)


if __name__ == "__main__":
    main()
