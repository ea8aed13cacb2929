"""The deficit of a fleet whose replicas grow stores of their own: growth decided for the fleet, beside each for itself.

Each replica begins with the deep experts that all kinds of text together want most. In every round requests of kinds
of text, by Zipf's law, go to replicas by `server.cluster.choice`, from the statistics of the round before; then the
stores grow by one deep expert each, until the budget is full, and afterwards replace. Routing is recorded
(`benchmarks/data`); the likely demand of a request is that of its kind so far.

- *deficit*: share of the demanded router mass that the chosen replicas' stores lacked, in the last third of the rounds;
- *copies*: mean number of replicas that have an expert which any has;
- *covered*: share of all experts that any replica has.

    python -m benchmarks.fleet_growth [--traces FILE ...] [--replicas 4] [--start 6] [--budget 16] [--save]
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
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from server.cluster.choice import ChoiceOptions, Fleet
from server.cluster.likeness import WORD_BUCKETS, Likeness
from server.cluster.statistics import TopicLedger, sketch_layers
from server.growth.fleet import FleetPlan, StoreDemand
from server.growth.status import GrowthStatus

ROUNDS, REQUESTS, TOKENS = 60, 25, 64
"""Rounds; requests of each replica in a round; tokens of a request."""
DECAY = 0.5
NO_WORDS = np.zeros(WORD_BUCKETS, dtype=np.bool_)
USUAL = ChoiceOptions(held=0.0)  # slots are not simulated
POLICIES: dict[str, tuple[ChoiceOptions, float | None]] = {
    "each for itself, choice by load": (replace(USUAL, wanted=0.0, available=0.0), None),
    "each for itself": (USUAL, None),
    **{f"fleet, {worth:g} for copies": (USUAL, worth) for worth in (0.9, 0.75, 0.5, 0.25)},
}
"""The choice of a replica; worth of an expert that is elsewhere, None where each store is planned alone."""


class Stores:
    """The stores of all replicas, and the recent demand of each."""

    def __init__(self, kinds: Kinds, num_replicas: int, start: int, budget: int) -> None:
        _, self.num_layers, _ = kinds.experts.shape
        shape = (self.num_layers, kinds.num_experts)
        everyone = demand_of(kinds, np.arange(len(kinds.experts)))
        first = np.argsort(-everyone, axis=1)[:, :start]
        self.held = [{at: tuple(first[:, at].tolist()) for at in range(start)} for _ in range(num_replicas)]
        self.demand = np.zeros((num_replicas, *shape))
        self.shape, self.next_index, self.budget = shape, start, budget

    def available(self, at: int) -> npt.NDArray[np.bool_]:
        found = np.zeros(self.shape, dtype=np.bool_)
        for experts in self.held[at].values():
            found[np.arange(self.num_layers), experts] = True
        return found

    def state(self, at: int) -> StoreDemand:
        held = len(self.held[at])
        status = GrowthStatus("idle", 0, 0, None, 0, 0, 0, 0, held, held, self.budget)
        return StoreDemand(self.available(at), self.demand[at], np.ones(self.shape), self.held[at], 1, status)

    def grow(self, elsewhere: float | None) -> None:
        """Add a deep expert to each store, or replace one; in turn, so that a store knows what those before it got."""
        for at in range(len(self.held)):
            names = [at] if elsewhere is None else range(len(self.held))
            plan = FleetPlan(
                {str(one): replace(self.state(one), status=self._full(one, at)) for one in names}, elsewhere
            )
            replaced = plan.replacement(str(at)) if len(self.held[at]) >= self.budget else None
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
    picks = kinds.experts[tokens].astype(np.int64)
    picks += (np.arange(kinds.experts.shape[1]) * kinds.num_experts)[None, :, None]
    found = np.bincount(picks.ravel(), minlength=kinds.experts.shape[1] * kinds.num_experts)
    return found.reshape(kinds.experts.shape[1], kinds.num_experts).astype(np.float64)


def recorded() -> Kinds:
    """The routing of the bundled checkpoint on the texts of `benchmarks/data/selection`, a kind for each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    traces = []
    for path in sorted((REPOSITORY / "benchmarks" / "data" / "selection").glob("*.txt")):
        ids = tokenizer(path.read_text(), verbose=False)["input_ids"][:2048]
        parts = []
        for start in range(0, len(ids), 256):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : start + 256]]), output_router_logits=True).router_logits
            parts.append(
                torch.stack([of_layer.topk(model.config.num_experts_per_tok).indices for of_layer in logits], 1)
            )
        traces.append(torch.cat(parts).numpy().astype(np.uint8))
    return Kinds.of(traces, model.config.num_experts)


def simulate(kinds: Kinds, num_replicas: int, policy: str, seed: int, start: int, budget: int) -> dict[str, float]:
    """The figures of one policy."""
    options, elsewhere = POLICIES[policy]
    draw = random.Random(seed)
    stores, router = Stores(kinds, num_replicas, start, budget), Fleet(options)
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
        stores.grow(elsewhere)
    held = np.sum([stores.available(at) for at in range(num_replicas)], axis=0)
    return {"deficit": missed / wanted, "copies": float(held[held > 0].mean()), "covered": float((held > 0).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, nargs="+", help="recorded routing; else that of the bundled checkpoint")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--start", type=int, default=6, help="deep experts of each store at first")
    parser.add_argument("--budget", type=int, default=16, help="deep experts of each store at most")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fleet_growth.json")
    arguments = parser.parse_args()
    start, budget = arguments.start, arguments.budget
    kinds = read_kinds(arguments.traces) if arguments.traces else recorded()
    sizes: dict[str, dict[str, Any]] = {}
    for num_replicas in arguments.replicas:
        by_policy = sizes[str(num_replicas)] = {}
        for policy in POLICIES:
            found = [simulate(kinds, num_replicas, policy, seed, start, budget) for seed in range(arguments.seeds)]
            by_policy[policy] = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        rows = [(policy, *figures.values()) for policy, figures in by_policy.items()]
        print(f"\n{num_replicas} replicas, {budget} of {kinds.num_experts} deep experts each")
        print(table(("growth", "deficit", "copies", "covered"), rows), flush=True)
    traces = [path.name for path in arguments.traces or [BUNDLED]]
    result = {
        "benchmark": "fleet_growth", **environment(), "traces": traces, "num_kinds": len(kinds.start), "start": start,
        "budget": budget, "rounds": ROUNDS, "seeds": arguments.seeds, "replicas": sizes,
    }  # fmt: skip
    finish("fleet_growth", result, save=arguments.save)


if __name__ == "__main__":
    main()
