"""Fetched bytes and latency of many replicas, by the way in which a router chooses one: a simulation.

Conversations of several kinds come in, by Zipf's law, and the favourite kinds change. A turn is a part of a recorded
text, whose tokens want the experts that the model chose for them. A step of a replica computes one chunk of a prompt,
whose missing experts go past the slots, and one token of each answer. It takes a base time, a time for each token of a
prompt, and the time to fetch the experts that are in no slot; the least recently used leave. A replica keeps the KV
memory of the conversations that it served last; a turn that comes to another computes its whole history again. The
choice is the one of `server.cluster.choice`, on statistics that are up to two seconds old. All is counted after a third
of the time. Each seed draws other conversations, the same for every policy; of many replicas fewer seeds do, since they
have as many turns.

- *fetched*: bytes of experts fetched, for one generated token; *hits*: share of the wanted experts that were in a slot;
- *TTFT*: from arrival to the first token; *TPOT*: mean time of each further token of an answer;
- *load*: requests that a replica runs or that wait there, over all replicas and times;
- *saves*: share of the fetched bytes of two choices with the same seed: the median of the seeds, the least and the
  most.

*agents* has a bound too: *alone*, every conversation in a replica of its own. `--faults` simulates statistics that are
a minute late and a replica that is slow by ten.

    python -m benchmarks.affinity [--traces FILE ...] [--replicas 4 16] [--scenarios profiles] [--seeds 4] [--save]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import pickle
import random
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness.reporting import REPOSITORY, environment, finish, table
from server.cluster.choice import DEFAULT_OPTIONS, ChoiceOptions, Fleet
from server.cluster.likeness import WORD_BUCKETS, Likeness
from server.cluster.statistics import TopicLedger, sketch_layers

POLICIES: tuple[str, ...] = ("random", "round robin", "two choices", "prefix", "affinity")
BLOCK_TOKENS = 64
EMPTY, PREFILL, DECODE = 0, 1, 2
NO_WORDS = np.zeros(WORD_BUCKETS, dtype=np.bool_)


@dataclass(frozen=True)
class Kinds:
    """Recorded routing of several kinds of text, one after the other.

    Attributes:
        experts: uint8 [T, L, K], the experts that each token wanted.
        start, length: [kinds], the tokens of each kind.
        words: for each kind bool [length / BLOCK_TOKENS, WORD_BUCKETS], the words of each block; None without a text.
    """

    experts: npt.NDArray[np.uint8]
    num_experts: int
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    words: list[npt.NDArray[np.bool_]] | None = None

    @classmethod
    def of(cls, traces: list[npt.NDArray[np.uint8]], num_experts: int, words: Any = None) -> Kinds:
        length = np.array([len(trace) for trace in traces])
        return cls(np.concatenate(traces), num_experts, np.cumsum(length) - length, length, words)

    def under_profiles(self, count: int) -> Kinds:
        """The same texts, each kind under a mask of its `count` most wanted experts of every layer.

        A pick outside the mask is replaced by one inside that the token did not want, drawn by the kind's demand.
        """
        draw = np.random.default_rng(0)
        experts = self.experts.copy()
        for start, length in zip(self.start, self.length, strict=True):
            for layer in range(experts.shape[1]):
                picks = experts[start : start + length, layer]
                demand = np.bincount(picks.ravel(), minlength=self.num_experts) + 1e-3
                mask = np.argsort(-demand)[:count]
                allowed = np.isin(picks, mask)
                # The largest of random keys, weighted by demand, are a draw without replacement (Efraimidis, Spirakis).
                keys = draw.random((length, count)) ** (1.0 / demand[mask])
                keys[(picks[:, :, None] == mask).any(axis=1)] = -1.0
                spare = mask[np.argsort(-keys, axis=1)[:, : picks.shape[1]]]
                nth = np.cumsum(~allowed, axis=1) - 1
                picks[~allowed] = np.take_along_axis(spare, np.maximum(nth, 0), axis=1)[~allowed]
        return replace(self, experts=experts)

    def tokens(self, kind: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """Indices of a kind's tokens; a text that ends begins again."""
        return np.asarray(self.start[kind] + (first + np.arange(count)) % self.length[kind])


@dataclass(frozen=True)
class Machine:
    """A replica: slots of each layer, bytes of an expert, and the times that make a step."""

    slots: int
    expert_bytes: int
    base_seconds: float
    token_seconds: float
    bytes_per_second: float
    rows: int = 8
    chunk_tokens: int = 256
    kv_tokens: int = 16384
    streams: bool = True
    """Experts of a prompt's chunk go past the slots, as on a GPU; else through them, as on a CPU."""


@dataclass(frozen=True)
class Traffic:
    """Conversations: their rate for one replica, their shape, and how the favourite kinds change."""

    rate: float
    zipf: float = 1.0
    drift_seconds: float = 20.0
    turns: tuple[int, int] = (1, 4)
    prompt_tokens: tuple[int, int] = (32, 160)
    answer_tokens: tuple[int, int] = (32, 96)
    think_seconds: float = 4.0
    known_share: float = 0.75
    """Conversations that begin as others of their kind do, as with a system prompt of an application."""
    statistics_seconds: float = 2.0
    slow: float = 1.0
    """Factor of the time of the first replica's steps."""


@dataclass
class Turn:
    """A turn of a conversation, and what became of it."""

    conversation: int
    kind: int
    first: int
    history: int
    prompt: int
    answer: int
    is_known: bool
    think_seconds: float
    after: Turn | None = None
    arrived: float = 0.0
    first_token: float = 0.0
    done: float = 0.0
    keys: tuple[int, ...] = ()
    replica: int = -1


@dataclass
class Counts:
    """Sums since the start of counting."""

    fetched: int = 0
    missed: int = 0
    wanted: int = 0
    generated: int = 0
    recomputed: int = 0
    turns: list[Turn] = field(default_factory=list)
    loads: list[npt.NDArray[np.int64]] = field(default_factory=list)
    choice_seconds: float = 0.0
    num_choices: int = 0
    statistics_bytes: int = 0


class Simulation:
    """`num_replicas` machines under one policy."""

    def __init__(
        self, kinds: Kinds, machine: Machine, traffic: Traffic, num_replicas: int, policy: str, seconds: float,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.kinds, self.machine, self.traffic, self.policy = kinds, machine, traffic, policy
        self.num, self.seconds, self.seed = num_replicas, seconds, seed
        self.draw, self.noise = random.Random(seed), np.random.default_rng(seed)
        _, layers, self.top_k = kinds.experts.shape
        self.every_layer = np.arange(layers)[None, :, None]
        self.last = np.zeros((self.num, layers, kinds.num_experts), dtype=np.float64)
        self.resident = np.zeros(self.last.shape, dtype=np.bool_)
        rows = (self.num, machine.rows)
        self.state = np.zeros(rows, dtype=np.int8)
        self.position = np.zeros(rows, dtype=np.int64)
        self.left = np.zeros(rows, dtype=np.int64)
        self.row_kind = np.zeros(rows, dtype=np.int64)
        self.row_turn: list[list[Turn | None]] = [[None] * machine.rows for _ in range(self.num)]
        self.free_at = np.zeros(self.num)
        self.queue: list[deque[Turn]] = [deque() for _ in range(self.num)]
        self.load = np.zeros(self.num, dtype=np.int64)
        self.kv: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(self.num)]
        self.names = [str(at) for at in range(self.num)]
        self.fleet = Fleet(ChoiceOptions(held=0.0, wanted=0.0) if policy == "prefix" else DEFAULT_OPTIONS)
        self.layers = sketch_layers(layers, kinds.num_experts)
        self.ledgers = [TopicLedger(len(self.layers) * kinds.num_experts) for _ in self.names]
        self.counts = Counts()
        self.events: list[tuple[float, int, str, Any]] = []
        self.order = itertools.count()
        self.next_robin = 0
        self.kind_order = list(range(len(kinds.start)))
        self.steps = 0

    def run(self) -> Counts:
        """Simulate all of the traffic's seconds."""
        self._at(0.0, "conversation", 0)
        self._at(self.traffic.drift_seconds, "drift", None)
        for at in range(self.num):
            self._at(self.traffic.statistics_seconds * (at + 1) / self.num, "statistics", at)
        self._at(0.5, "sample", None)
        now = 0.0
        quantum = self.machine.base_seconds / 4
        while now < self.seconds:
            while self.events and self.events[0][0] <= now:
                at, _, kind, what = heapq.heappop(self.events)
                getattr(self, f"_on_{kind}")(at, what)
            due = np.flatnonzero((self.free_at <= now) & (self.load > 0))
            now += quantum
            if len(due):
                self._step(due, now - quantum)
            else:
                now = max(now, min(self.events[0][0], self.free_at[self.load > 0].min(initial=self.seconds)))
        return self.counts

    def _at(self, at: float, kind: str, what: Any) -> None:
        heapq.heappush(self.events, (at, next(self.order), kind, what))

    @property
    def _counting_from(self) -> float:
        return self.seconds / 3

    def _on_conversation(self, now: float, number: int) -> None:
        traffic, draw = self.traffic, random.Random(f"{self.seed} {number}")  # the same under every policy
        self._at(now + draw.expovariate(traffic.rate * self.num), "conversation", number + 1)
        weights = [(rank + 1) ** -traffic.zipf for rank in range(len(self.kind_order))]
        kind = draw.choices(self.kind_order, weights)[0]
        first, is_known = draw.randrange(int(self.kinds.length[kind])), draw.random() < traffic.known_share
        turns: list[Turn] = []
        history = 0
        for _ in range(draw.randint(*traffic.turns)):
            prompt, answer = draw.randint(*traffic.prompt_tokens), draw.randint(*traffic.answer_tokens)
            think = draw.expovariate(1 / traffic.think_seconds)
            turns.append(Turn(number, kind, first, history, prompt, answer, is_known, think))
            history += prompt + answer
        for turn, after in itertools.pairwise(turns):
            turn.after = after
        self._on_turn(now, turns[0])

    def _on_turn(self, now: float, turn: Turn) -> None:
        turn.arrived = now
        likeness = self._likeness(turn)
        started = time.thread_time()  # other processes do not count
        at = self._choose(turn, likeness, now)
        self.counts.choice_seconds += time.thread_time() - started
        self.counts.num_choices += 1
        turn.replica = at
        turn.keys = self.ledgers[at].begin(likeness)
        self.queue[at].append(turn)
        self.load[at] += 1

    def _choose(self, turn: Turn, likeness: Likeness, now: float) -> int:
        if self.policy == "alone":
            return turn.conversation % self.num
        if self.policy == "random":
            return self.draw.randrange(self.num)
        if self.policy == "round robin":
            self.next_robin = (self.next_robin + 1) % self.num
            return self.next_robin
        if self.policy == "two choices":
            return min(self.draw.sample(range(self.num), 2), key=lambda at: self.load[at])
        loads = dict(zip(self.names, self.load.tolist(), strict=True))
        chosen = self.fleet.ranked(likeness, loads, now, self.draw)[0].replica
        self.fleet.sent(chosen, likeness, now)
        return int(chosen)

    def _likeness(self, turn: Turn) -> Likeness:
        blocks = (turn.history + turn.prompt) // BLOCK_TOKENS
        beginning = [turn.conversation * 4096 + block + 1_000_000 for block in range(blocks)]
        keys: tuple[int, ...] = (turn.conversation + 1_000_000_000,) if turn.history else ()
        if turn.is_known and beginning:
            beginning[0] = turn.kind + 1
        if turn.is_known:
            keys = (*keys, turn.kind + 1)
        words = NO_WORDS
        if self.kinds.words is not None:
            of_kind = self.kinds.words[turn.kind]
            first = (turn.first + turn.history) // BLOCK_TOKENS
            words = of_kind[(first + np.arange(1 + turn.prompt // BLOCK_TOKENS)) % len(of_kind)].any(axis=0)
        return Likeness(tuple(beginning), keys, words)

    def _on_drift(self, now: float, _: None) -> None:
        self._at(now + self.traffic.drift_seconds, "drift", None)
        self.kind_order.append(self.kind_order.pop(0))

    def _on_sample(self, now: float, _: None) -> None:
        self._at(now + 0.5, "sample", None)
        if now >= self._counting_from:
            self.counts.loads.append(self.load.copy())

    def _on_statistics(self, now: float, at: int) -> None:
        self._at(now + self.traffic.statistics_seconds, "statistics", at)
        if self.policy not in ("prefix", "affinity"):
            return
        held = self.resident[at, self.layers].ravel()
        wire = self.ledgers[at].statistics(now, int(self.load[at]), held, np.ones_like(held)).to_wire()
        self.counts.statistics_bytes = max(self.counts.statistics_bytes, len(pickle.dumps(wire)))
        self.fleet.update(self.names[at], wire)

    def _on_done(self, now: float, turn: Turn) -> None:
        self.load[turn.replica] -= 1
        kept = self.kv[turn.replica]
        kept[turn.conversation] = turn.history + turn.prompt + turn.answer
        kept.move_to_end(turn.conversation)
        while sum(kept.values()) > self.machine.kv_tokens:
            kept.popitem(last=False)
        tokens = self.kinds.tokens(turn.kind, turn.first + turn.history, turn.prompt + turn.answer)
        self.ledgers[turn.replica].add(turn.keys, self._mass(tokens), len(tokens))
        if now >= self._counting_from:
            self.counts.turns.append(turn)
        if turn.after is not None:
            self._at(now + turn.think_seconds, "turn", turn.after)

    def _mass(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        picks = self.kinds.experts[tokens][:, self.layers].astype(np.int64)
        picks += (np.arange(len(self.layers)) * self.kinds.num_experts)[None, :, None]
        return np.bincount(picks.ravel(), minlength=len(self.layers) * self.kinds.num_experts).astype(np.float64)

    def _admit(self, at: int) -> None:
        for row in np.flatnonzero(self.state[at] == EMPTY):
            if not self.queue[at]:
                return
            turn = self.queue[at].popleft()
            cached = self.kv[at].pop(turn.conversation, 0)
            self.counts.recomputed += turn.history - cached
            self.state[at, row], self.row_kind[at, row], self.row_turn[at][row] = PREFILL, turn.kind, turn
            self.position[at, row] = turn.first + cached
            self.left[at, row] = turn.history + turn.prompt - cached

    def _step(self, due: npt.NDArray[np.int64], now: float) -> None:
        """One step of each replica of `due`, at once."""
        kinds, machine = self.kinds, self.machine
        seconds = np.full(len(due), machine.base_seconds)
        missed = np.zeros(len(due), dtype=np.int64)
        for at in due:
            if self.queue[at]:
                self._admit(at)
        state = self.state[due]
        reading = np.flatnonzero((state == PREFILL).any(axis=1))
        chunks, read = self._chunks(due[reading])
        seconds[reading] += [count * machine.token_seconds for _, _, count in chunks]
        missed[reading] = (read & ~self.resident[due[reading]]).sum(axis=(1, 2))
        if not machine.streams:
            self._use(due[reading], read)
        index, row = np.nonzero(state == DECODE)
        at = due[index]
        kind = self.row_kind[at, row]
        tokens = kinds.start[kind] + self.position[at, row] % kinds.length[kind]
        wanted = np.zeros((len(due), *self.last.shape[1:]), dtype=np.bool_)
        wanted[index[:, None, None], self.every_layer, kinds.experts[tokens]] = True
        missed += (wanted & ~self.resident[due]).sum(axis=(1, 2))
        self._use(due, wanted)
        seconds += missed * machine.expert_bytes / machine.bytes_per_second
        seconds[due == 0] *= self.traffic.slow
        ends = now + seconds
        self.free_at[due] = ends
        self.position[at, row] += 1
        self.left[at, row] -= 1
        if now >= self._counting_from:
            self.counts.fetched += int(missed.sum()) * machine.expert_bytes
            self.counts.missed += int(missed.sum())
            self.counts.wanted += int(read.sum()) + int(wanted.sum())
            self.counts.generated += len(at)
        for where in np.flatnonzero(self.left[at, row] == 0):
            self._end(int(at[where]), int(row[where]), float(ends[index[where]]))
        for at_, row_, count in chunks:
            self.position[at_, row_] += count
            self.left[at_, row_] -= count
            turn = self.row_turn[at_][row_]
            assert turn is not None
            if self.left[at_, row_] == 0:
                turn.first_token = float(self.free_at[at_])
                self.state[at_, row_], self.left[at_, row_] = DECODE, turn.answer

    def _chunks(self, due: npt.NDArray[np.int64]) -> tuple[list[tuple[int, int, int]], npt.NDArray[np.bool_]]:
        """(replica, row, tokens) of the chunk of each replica's oldest prompt, and the experts [due, L, E] it wants."""
        read = np.zeros((len(due), *self.last.shape[1:]), dtype=np.bool_)
        chunks = []
        for index, at in enumerate(due.tolist()):
            rows = np.flatnonzero(self.state[at] == PREFILL).tolist()
            row = min(rows, key=lambda row: self.row_turn[at][row].arrived)  # type: ignore[union-attr]
            count = int(min(self.machine.chunk_tokens, self.left[at, row]))
            tokens = self.kinds.tokens(self.row_kind[at, row], self.position[at, row], count)
            read[index, self.every_layer, self.kinds.experts[tokens]] = True
            chunks.append((at, row, count))
        return chunks, read

    def _use(self, due: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]) -> None:
        """The wanted experts of each layer become the most recent; the most recent ones stay in the slots."""
        self.steps += 1
        last = self.last[due]
        # Experts of one step differ a little, so that exactly as many stay as there are slots.
        last[wanted] = self.steps + self.noise.random(int(wanted.sum()))
        least = np.partition(last, last.shape[2] - self.machine.slots, axis=2)[:, :, -self.machine.slots, None]
        self.last[due] = last
        self.resident[due] = (last >= least) & (last > 0)

    def _end(self, at: int, row: int, now: float) -> None:
        turn = self.row_turn[at][row]
        assert turn is not None
        self.state[at, row], self.row_turn[at][row] = EMPTY, None
        turn.done = now
        self._at(now, "done", turn)


def summary(counts: Counts) -> dict[str, float]:
    """The figures of one simulation."""
    ttft = np.array([turn.first_token - turn.arrived for turn in counts.turns])
    tpot = np.array([(turn.done - turn.first_token) / turn.answer for turn in counts.turns])
    loads = np.concatenate(counts.loads)
    return {
        "fetched_bytes_per_token": counts.fetched / counts.generated,
        "hit_rate": 1 - counts.missed / counts.wanted,
        "ttft_p50_seconds": float(np.percentile(ttft, 50)),
        "ttft_p99_seconds": float(np.percentile(ttft, 99)),
        "tpot_p50_seconds": float(np.percentile(tpot, 50)),
        "tpot_p99_seconds": float(np.percentile(tpot, 99)),
        "load_mean": float(loads.mean()),
        "load_p99": float(np.percentile(loads, 99)),
        "num_turns": len(counts.turns),
        "recomputed_tokens": counts.recomputed,
        "choice_seconds": counts.choice_seconds / counts.num_choices,
        "statistics_bytes": counts.statistics_bytes,
    }


@dataclass(frozen=True)
class Scenario:
    """One kind of service.

    Attributes:
        profile_experts: experts of every layer in a profile for each kind, under which its requests run; None for all.
        seconds: simulated, by the number of replicas; fewer where many replicas give as many turns.
    """

    says: str
    slots: int
    traffic: Traffic
    seconds: dict[int, float]
    profile_experts: int | None = None
    policies: tuple[str, ...] = POLICIES


SCENARIOS = {
    "profiles": Scenario(
        "each kind of request under its profile of 16 experts a layer, 24 slots", 24, Traffic(1.0),
        {4: 120, 16: 90, 64: 45, 256: 30}, profile_experts=16,
    ),
    "agents": Scenario(
        "all 64 experts, 32 slots, conversations of 4 to 12 turns", 32,
        Traffic(0.05, turns=(4, 12), prompt_tokens=(64, 256)), {4: 240, 16: 180, 64: 120, 256: 90},
        policies=(*POLICIES, "alone"),
    ),
    "short": Scenario(
        "all 64 experts, 32 slots, conversations of one turn", 32,
        Traffic(0.15, turns=(1, 1), prompt_tokens=(16, 64), answer_tokens=(64, 192)),
        {4: 120, 16: 90, 64: 60, 256: 40},
    ),
}  # fmt: skip
EXPERT_BYTES = 3 * 2048 * 1408 * 2
"""Of DeepSeek-V2-Lite, in 16 bits."""
ALONE = 4
"""So many times the replicas take the same conversations in turn: nearly all end before the next comes to theirs."""
SEED_REPLICAS = 16
"""Fleets of more replicas are simulated with proportionally fewer seeds."""
FAULTS = {"statistics a minute late": {"statistics_seconds": 60.0}, "a replica slow by ten": {"slow": 10.0}}
H100 = Machine(0, EXPERT_BYTES, base_seconds=0.007, token_seconds=2e-5, bytes_per_second=25e9)
LEAST_TOKENS = 256


def read_kinds(paths: list[Path]) -> Kinds:
    """Each document of at least `LEAST_TOKENS` tokens is a kind; so are the short ones of a file together."""
    traces: list[npt.NDArray[np.uint8]] = []
    for path in paths:
        with np.load(path) as arrays:
            if "document" not in arrays:
                traces += [arrays[name] for name in arrays.files]
                continue
            experts, document = arrays["experts"], arrays["document"]
        long = [at for at in np.unique(document) if (document == at).sum() >= LEAST_TOKENS]
        traces += [experts[document == at] for at in long]
        if len(rest := experts[~np.isin(document, long)]):
            traces.append(rest)
    return Kinds.of(traces, 64)


Figures = dict[str, list[float]]
"""The figures of one policy, each with a value for every seed."""


def simulate(kinds: Kinds, scenario: Scenario, num_replicas: int, policy: str, seed: int) -> dict[str, float]:
    """The figures of one policy and seed."""
    seconds = scenario.seconds.get(num_replicas, 60.0)
    machine, traffic = replace(H100, slots=scenario.slots), scenario.traffic
    if policy == "alone":
        num_replicas, traffic = num_replicas * ALONE, replace(traffic, rate=traffic.rate / ALONE)
    return summary(Simulation(kinds, machine, traffic, num_replicas, policy, seconds, seed).run())


def saves(by_policy: Mapping[str, Figures], policy: str) -> list[float]:
    """Share of two choices' fetched bytes that a policy saves, of each seed."""
    fetched, of_two = (by_policy[name]["fetched_bytes_per_token"] for name in (policy, "two choices"))
    return [1 - one / two for one, two in zip(fetched, of_two, strict=True)]


def under_fault(scenario: Scenario, fault: str) -> Scenario:
    """The scenario with one of `FAULTS`, for two choices and affinity alone."""
    traffic = replace(scenario.traffic, **FAULTS[fault])  # type: ignore[arg-type]
    return replace(scenario, says=f"{scenario.says}; {fault}", traffic=traffic, policies=("two choices", "affinity"))


def simulated(
    scenario: Scenario, all_kinds: Kinds, replicas: Iterable[int], seeds: int, processes: Executor
) -> dict[str, Any]:
    """The figures of a scenario, by the number of replicas and the policy; prints them."""
    count = scenario.profile_experts
    kinds = all_kinds if count is None else all_kinds.under_profiles(count)
    sizes = {}
    for num in replicas:
        some = range(max(1, min(seeds, seeds * SEED_REPLICAS // num)))
        jobs = [(policy, seed) for policy in scenario.policies for seed in some]
        found = processes.map(partial(simulate, kinds, scenario, num), *zip(*jobs, strict=True))
        by_policy: dict[str, Figures] = {policy: defaultdict(list) for policy in scenario.policies}
        for (policy, _), figures in zip(jobs, found, strict=True):
            for name, value in figures.items():
                by_policy[policy][name].append(value)
        sizes[str(num)] = by_policy
        print(f"\n{num} replicas, {len(some)} seeds: {scenario.says}\n{_shown(by_policy)}", flush=True)
    return sizes


def _shown(by_policy: Mapping[str, Figures]) -> str:
    columns = ("fetched MB/token", "saves", "hits", "TTFT p50 s", "p99 s", "TPOT p50 s", "p99 s", "load p99")
    names = (
        "hit_rate", "ttft_p50_seconds", "ttft_p99_seconds", "tpot_p50_seconds", "tpot_p99_seconds", "load_p99"
    )  # fmt: skip
    rows = []
    for policy, figures in by_policy.items():
        saved = saves(by_policy, policy)
        median = {name: float(np.median(values)) for name, values in figures.items()}
        rows.append((
            policy, median["fetched_bytes_per_token"] / 1e6,
            f"{np.median(saved):.0%} ({min(saved):.0%} to {max(saved):.0%})", *(median[name] for name in names),
        ))  # fmt: skip
    return table(("policy", *columns), rows)


def figure(scenarios: Mapping[str, Any], path: Path) -> None:
    """Fetched bytes of each policy as a share of those of two choices, by scenario and number of replicas: the median
    of the seeds, and between the least and the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(scenarios), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (name, sizes) in zip(axes, scenarios.items(), strict=True):
        for policy in SCENARIOS[name].policies:
            shares = [
                (1 - np.percentile(saves(by_policy, policy), [50, 100, 0])).tolist() for by_policy in sizes.values()
            ]
            median, least, most = zip(*shares, strict=True)
            width = 2 if policy == "affinity" else 1
            (drawn,) = axis.plot(range(len(sizes)), median, marker="o", label=policy, linewidth=width)
            axis.fill_between(range(len(sizes)), least, most, color=drawn.get_color(), alpha=0.15)
        axis.set_xticks(range(len(sizes)), list(sizes))
        axis.set_title(name)
        axis.set_xlabel("replicas")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("fetched bytes, two choices = 1")
    axes[0].set_ylim(bottom=0)
    axes[list(scenarios).index("agents") if "agents" in scenarios else -1].legend(
        fontsize="small", loc="lower center", ncols=2
    )
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = REPOSITORY / "benchmarks" / "data" / "routing-deepseek-v2-lite.npz"
    parser.add_argument(
        "--traces", type=Path, nargs="+", default=[bundled], help="recorded routing; see benchmarks/data"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1, help="simulations at once")
    parser.add_argument("--faults", action="store_true", help="simulate late statistics, and a slow replica")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/affinity.json and its figure, or affinity_faults"
    )
    arguments = parser.parse_args()
    all_kinds = read_kinds(arguments.traces)
    name = "affinity_faults" if arguments.faults else "affinity"
    result: dict[str, Any] = {
        "benchmark": name,
        **environment(),
        "traces": [path.name for path in arguments.traces],
        "num_kinds": len(all_kinds.start),
        "seeds": arguments.seeds,
        "machine": asdict(H100),
        "says": {one: SCENARIOS[one].says for one in arguments.scenarios},
    }
    scenarios = {one: SCENARIOS[one] for one in arguments.scenarios}
    with ProcessPoolExecutor(arguments.processes) as processes:
        figures_of = partial(
            simulated, all_kinds=all_kinds, replicas=arguments.replicas, seeds=arguments.seeds, processes=processes
        )
        if arguments.faults:
            result["faults"] = {
                fault: {one: figures_of(under_fault(scenario, fault)) for one, scenario in scenarios.items()}
                for fault in FAULTS
            }
        else:
            result["scenarios"] = {one: figures_of(scenario) for one, scenario in scenarios.items()}
    if arguments.save and not arguments.faults:
        figure(result["scenarios"], REPOSITORY / "docs" / "figures" / "affinity.png")
    finish(name, result, save=arguments.save)


if __name__ == "__main__":
    main()
