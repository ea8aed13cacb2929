"""The choice of a replica for a request: who holds its beginning and its experts, and is not busier than the others.

Invariant: all knowledge comes from the replicas' statistics and the choices of the last seconds, so a router can be
replaced at any time. A replica over the bound of load is chosen only where all are. Sources: power of two choices
(Mitzenmacher 2001), consistent hashing with bounded loads (Mirrokni and others 2018).
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from server.cluster.likeness import WORD_BUCKETS, Likeness
from server.cluster.statistics import MAX_PREFIXES, ReplicaStatistics, Topic, Weights


@dataclass(frozen=True)
class ChoiceOptions:
    """Weights of a choice; `benchmarks/affinity.py` measures what they do.

    Attributes:
        block: worth of each block of the beginning that a replica holds.
        held: worth of holding all experts that the request is likely to want.
        available: worth of being able to serve all of them, which is not computing without some of them.
        wanted: worth of having been wanted for the same experts before, which lasts longer than what is held.
        load: cost of a load that is over the least one by the mean load and one request.
        imbalance: a replica over `imbalance` times the mean load and one request is not chosen.
        patience_blocks: of a beginning that a replica holds, for which its load may be over that bound by one request,
            by `MAX_PATIENCE` at most: computing a long history again costs more than waiting for a request.
        max_age_seconds: statistics older than this say nothing about experts and beginnings.
    """

    block: float = 0.25
    held: float = 2.0
    wanted: float = 2.0
    available: float = 16.0
    load: float = 0.5
    imbalance: float = 1.25
    patience_blocks: float = 8.0
    max_age_seconds: float = 15.0


DEFAULT_OPTIONS = ChoiceOptions()
MAX_PATIENCE = 2.0
MIN_MORE = 1e-3
"""From this share of the likely demand on, a replica may serve more of it than another; less is rounding."""
MIN_TOPIC_TOKENS = 16.0
"""A topic with fewer tokens says nothing about its requests."""
MIN_WORD_LIKENESS = 0.25
NUM_LIKEST = 8
INDEX_SECONDS = 1.0
"""Statistics are indexed anew at most this often."""


class Candidate(NamedTuple):
    """A replica to try, and why.

    Attributes:
        blocks: of the request's beginning that it holds.
        held: share of the likely experts' mass that is in its slots; of the average replica where that is not known.
    """

    replica: str
    blocks: int
    held: float


class Fleet:
    """The last statistics of every replica, and what was sent there since. `update`, `keep` and `sent` change it; not
    thread-safe."""

    def __init__(self, options: ChoiceOptions = DEFAULT_OPTIONS) -> None:
        self.options = options
        self._known: dict[str, ReplicaStatistics] = {}
        self._sent: dict[str, OrderedDict[int, float]] = defaultdict(OrderedDict)
        self._index = _Index({})
        self._indexed_at = -math.inf
        self._is_changed = False

    def update(self, replica: str, wire: Mapping[str, Any]) -> ReplicaStatistics | None:
        """Take what a replica sent, if it is newer than what is known; returns its last statistics, if there are any.

        Args:
            wire: from `ReplicaStatistics.to_wire`, or empty.
        """
        known = self._known.get(replica)
        if known is None or known.taken_at < wire.get("taken_at", -math.inf):
            statistics = ReplicaStatistics.from_wire(wire)
            if statistics is not None:
                self._known[replica] = known = statistics
                self._is_changed = True
                sent = self._sent[replica]
                while sent and next(iter(sent.values())) < statistics.taken_at:  # the statistics have them
                    sent.popitem(last=False)
        return known

    def sent(self, replica: str, likeness: Likeness, now: float) -> None:
        """Count a request that was sent to a replica: until its next statistics nobody else says that it holds the
        beginning. A turn that comes back sooner than they do finds its replica so."""
        sent = self._sent[replica]
        for block in likeness.beginning:
            sent[block] = now
            sent.move_to_end(block)
        while len(sent) > MAX_PREFIXES:
            sent.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all other replicas."""
        for gone in self._sent.keys() - set(replicas):
            del self._sent[gone]
        for gone in self._known.keys() - set(replicas):
            del self._known[gone]
            self._is_changed = True

    def likely_demand(self, likeness: Likeness, now: float) -> Weights | None:
        """The share of router mass [N] that the request is likely to demand of each expert; None if nobody knows."""
        return self._current(now).topics.likely(likeness)

    def ranked(
        self, likeness: Likeness, loads: Mapping[str, float], now: float, draw: random.Random
    ) -> list[Candidate]:
        """The replicas to try, best first, at most two.

        Args:
            loads: requests that each replica runs or has waiting; only these replicas are candidates.
            now: seconds on the clock of `ReplicaStatistics.taken_at`.
            draw: of the two replicas whose less busy one is taken where nothing else is known, and between equals.
        """
        names = list(loads)
        index, options = self._current(now), self.options
        load = np.array([loads[name] for name in names], dtype=np.float64)
        is_fresh = np.array(
            [now - index.taken_at.get(name, -math.inf) <= options.max_age_seconds for name in names], bool
        )
        reported = (index.prefixes(name) if fresh else frozenset() for name, fresh in zip(names, is_fresh, strict=True))
        blocks = np.array(
            [
                _num_first(likeness.beginning, of_one, self._sent.get(name, {}))
                for name, of_one in zip(names, reported, strict=True)
            ]
        )
        # A replica of which nothing is known now counts as an average one: at 0, all would go to the few known ones.
        held, wanted, available = (
            np.where(is_fresh, of_all, of_all[is_fresh].mean() if is_fresh.any() else 0.0)
            for of_all in index.overlaps(names, index.topics.likely(likeness))
        )
        worth = options.block * blocks + options.held * held + options.wanted * wanted
        more = available - available.min(initial=1.0)
        worth += options.available * np.where(more > MIN_MORE, more, 0.0)
        mean = float(load.mean()) if names else 0.0
        patience = np.minimum(blocks / options.patience_blocks, MAX_PATIENCE)
        may = load <= np.maximum(options.imbalance * mean + 1.0 + patience, float(load.min(initial=math.inf)))
        if worth[may].any():
            score = np.where(may, worth - options.load * (load - load.min()) / (mean + 1.0), -math.inf)
            chosen = sorted(range(len(names)), key=lambda at: (-score[at], draw.random()))[:2]
        else:
            chosen = sorted(draw.sample(range(len(names)), min(2, len(names))), key=lambda at: load[at])
        return [Candidate(names[at], int(blocks[at]), float(held[at])) for at in chosen]

    def _current(self, now: float) -> _Index:
        if self._is_changed and not 0 <= now - self._indexed_at < INDEX_SECONDS:
            self._index, self._indexed_at, self._is_changed = _Index(self._known), now, False
        return self._index


class _Index:
    """The statistics of all replicas at one moment, arranged for a choice."""

    def __init__(self, known: Mapping[str, ReplicaStatistics]) -> None:
        self.taken_at = {name: statistics.taken_at for name, statistics in known.items()}
        self._prefixes = {name: frozenset(statistics.prefixes) for name, statistics in known.items()}
        newest = max(known.values(), key=lambda statistics: statistics.taken_at, default=None)
        # A fleet serves one model; only while it is replaced by another do some statistics have another shape.
        shape = () if newest is None else newest.held.shape
        alike = {name: statistics for name, statistics in known.items() if statistics.held.shape == shape}
        self._row = {name: at for at, name in enumerate(alike)}
        self._held = np.array([statistics.held for statistics in alike.values()], dtype=np.float32)
        self._available = np.array([statistics.available for statistics in alike.values()], dtype=np.float32)
        self._wanted = unit(np.array([_all_demand(statistics) for statistics in alike.values()], dtype=np.float32))
        self._has_served = np.asarray(self._wanted.any(axis=-1), dtype=np.bool_)
        self.topics = _Topics([topic for statistics in alike.values() for topic in statistics.topics])

    def prefixes(self, name: str) -> frozenset[int]:
        """The hashes of the beginnings that a replica holds."""
        return self._prefixes.get(name, frozenset())

    def overlaps(self, names: Sequence[str], likely: Weights | None) -> tuple[Weights, Weights, Weights]:
        """Of each name `Candidate.held`, the likeness of the likely demand to that of its requests, 0 to 1, and the
        share of the likely demand that it may serve.

        The first two of a name that has served nothing, or is unknown, are at least the mean of those that have served.
        All are 0 where nothing is known.
        """
        held, wanted, available = np.zeros((3, len(names)), dtype=np.float32)
        if likely is not None:
            places = [at for at, name in enumerate(names) if name in self._row]
            rows = [self._row[names[at]] for at in places]
            held[places] = (self._held @ likely)[rows]
            wanted[places] = (self._wanted @ unit(likely))[rows]
            available[places] = (self._available @ likely)[rows]
            # Else, while no load sends requests to one that has served nothing, all kinds of text would stay with the
            # first replica that served any.
            has_served = np.zeros(len(names), dtype=np.bool_)
            has_served[places] = self._has_served[rows]
            if has_served.any():
                for of_all in (held, wanted):
                    of_all[~has_served] = np.maximum(of_all[~has_served], of_all[has_served].mean())
        return held, wanted, available


class _Topics:
    """The topics of all replicas, by key and by words; topics of one key are one."""

    def __init__(self, topics: Sequence[Topic]) -> None:
        by_key: dict[int, list[Topic]] = defaultdict(list)
        for topic in topics:
            if topic.num_tokens >= MIN_TOPIC_TOKENS:
                by_key[topic.key].append(topic)
        self._row = {key: at for at, key in enumerate(by_key)}
        self._demand = [_mean_demand([topic.demand for topic in of_key], [topic.num_tokens for topic in of_key])
                        for of_key in by_key.values()]  # fmt: skip
        words = np.array([np.any([topic.words for topic in of_key], axis=0) for of_key in by_key.values()])
        words = words.reshape(-1, WORD_BUCKETS)
        # Words that most topics have tell little.
        self._telling = np.log((1.0 + len(words)) / (1.0 + words.sum(axis=0))).astype(np.float32)
        self._words = unit(words * self._telling)

    def likely(self, likeness: Likeness) -> Weights | None:
        for key in likeness.keys:
            if key in self._row:
                return self._demand[self._row[key]]
        likenesses = self._words @ unit(likeness.words * self._telling)
        likest = [int(at) for at in np.argsort(-likenesses)[:NUM_LIKEST] if likenesses[at] >= MIN_WORD_LIKENESS]
        if not likest:
            return None
        # The power leaves little to topics that are only half as like as the likest.
        return _mean_demand([self._demand[at] for at in likest], [likenesses[at] ** 4 for at in likest])


def _num_first(blocks: Sequence[int], *held: Container[int]) -> int:
    """The number of the first blocks, without a gap, that are in any of `held`."""
    count = 0
    while count < len(blocks) and any(blocks[count] in one for one in held):
        count += 1
    return count


def _mean_demand(demands: Sequence[Weights], weights: Sequence[float]) -> Weights:
    if len(demands) == 1:
        return demands[0]
    return np.average(demands, axis=0, weights=weights).astype(np.float32)


def _all_demand(statistics: ReplicaStatistics) -> Weights:
    if not statistics.topics:
        return np.zeros(len(statistics.held), dtype=np.float32)
    tokens = np.array([topic.num_tokens for topic in statistics.topics], dtype=np.float32)
    return np.asarray(tokens @ np.array([topic.demand for topic in statistics.topics]), dtype=np.float32)


def unit(rows: Weights) -> Weights:
    """Rows [..., n] divided by their lengths; zeros stay zeros."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    divided: Weights = np.divide(rows, length, out=np.zeros(rows.shape, dtype=np.float32), where=length > 0)
    return divided
