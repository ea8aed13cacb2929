"""Time of a front for statistics and choices, by the number of replicas, with full statistics of every replica.

- *taken in*: time to take the statistics of one replica in; *index*: to arrange those of all, at most once a second;
- *choice*: mean time of a choice, half of them by a known key and half by words. All are seconds of one core.

    python -m benchmarks.service.choices [--save]
"""

from __future__ import annotations

import argparse
import pickle
import random
import time
from typing import Any

import numpy as np

from benchmarks.harness.reporting import environment, finish, table
from server.cluster.choice import Fleet
from server.cluster.likeness import WORD_BUCKETS, Likeness
from server.cluster.statistics import MAX_PREFIXES, MAX_TOPICS, SKETCH_EXPERTS, TopicLedger

SIZES = (4, 64, 256, 1000)
NUM_KEYS = 500
"""Applications and users whose requests the replicas have seen."""


def full_statistics(draw: np.random.Generator, taken_at: float) -> dict[str, Any]:
    """What a replica sends when all of its tables are full."""
    ledger = TopicLedger(SKETCH_EXPERTS)
    blocks = MAX_PREFIXES // MAX_TOPICS + 1
    for key in draw.choice(NUM_KEYS, MAX_TOPICS, replace=False):
        beginning = tuple(draw.integers(0, 2**63, blocks).tolist())
        likeness = Likeness(beginning, (int(key),), draw.random(WORD_BUCKETS) < 0.2)
        ledger.add(ledger.begin(likeness), draw.random(SKETCH_EXPERTS) ** 4, 100)
    return ledger.statistics(taken_at, 3, *draw.random((2, SKETCH_EXPERTS)) < 0.5).to_wire()


def measured(num_replicas: int, num_choices: int = 200) -> dict[str, float]:
    """The times for one number of replicas."""
    draw, fleet = np.random.default_rng(0), Fleet()
    sent = [full_statistics(draw, 0.0) for _ in range(num_replicas)]
    started = time.thread_time()
    for at, wire in enumerate(sent):
        fleet.update(str(at), wire)
    taken_in = (time.thread_time() - started) / num_replicas
    requests = [
        Likeness(tuple(range(10)), (at % NUM_KEYS,) if at % 2 else (), draw.random(WORD_BUCKETS) < 0.2)
        for at in range(num_choices)
    ]
    started = time.thread_time()
    fleet.likely_demand(requests[1], 1.0)
    index = time.thread_time() - started
    loads = {str(at): float(at % 7) for at in range(num_replicas)}
    chooser = random.Random(0)
    started = time.thread_time()
    for request in requests:
        fleet.ranked(request, loads, 1.5, chooser)
    choice = (time.thread_time() - started) / num_choices
    return {
        "taken_in_seconds": taken_in,
        "index_seconds": index,
        "choice_seconds": choice,
        "statistics_bytes": float(np.mean([len(pickle.dumps(wire)) for wire in sent])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/choices.json")
    arguments = parser.parse_args()
    sizes = {str(size): measured(size) for size in SIZES}
    columns = ("taken_in_seconds", "index_seconds", "choice_seconds")
    rows = [(size, *(1e3 * row[name] for name in columns), row["statistics_bytes"]) for size, row in sizes.items()]
    print(table(("replicas", "taken in ms", "index ms", "choice ms", "bytes of one"), rows))
    finish("choices", {"benchmark": "choices", **environment(), "sizes": sizes}, save=arguments.save)


if __name__ == "__main__":
    main()
