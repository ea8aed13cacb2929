"""The statistics by which a router knows a replica: what it holds, what it was wanted for, and the prompts it has seen.

Invariant: a replica's statistics stay under `MAX_BYTES`, whatever the model and the traffic. Experts are seen through a
sketch: those of a few layers, evenly spaced, since the layers of one text go together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from server.cluster.likeness import BLOCK_BYTES, WORD_BUCKETS, Likeness

VERSION = 2
SKETCH_EXPERTS = 1024
"""Most experts, counted over the layers of a sketch."""
MAX_TOPICS = 24
MAX_PREFIXES = 1024
MAX_BYTES = 64 * 1024
BEGINNING_SECONDS = 5.0
"""A beginning counts as held for so long before the prompt must have been read."""
HALF_LIFE_TOKENS = 2048.0
"""A topic's demand counts half after so many tokens of it."""
LIKE_TOPIC = 0.5
"""From this likeness of words on, a request without a key is counted to the topic that is most like it."""
NEW_WORDS = 0.2
USUAL_WORD = 0.1
"""A topic's words fade by `NEW_WORDS` with each request without them, and belong to it while over `USUAL_WORD`."""

Weights = npt.NDArray[np.float32]


def sketch_layers(num_layers: int, num_experts: int) -> npt.NDArray[np.int64]:
    """The layers of a sketch: evenly spaced, as many as `SKETCH_EXPERTS` allows, at least one."""
    count = max(1, min(num_layers, SKETCH_EXPERTS // num_experts))
    return np.unique(np.linspace(0, num_layers - 1, count).round().astype(np.int64))


@dataclass(frozen=True)
class Topic:
    """Requests that belong together, and what they wanted.

    Attributes:
        key: of `Likeness.keys`, or a hash of their words where they have none.
        words: bool [WORD_BUCKETS], of its last requests.
        demand: float32 [N], share of the router mass of each of the sketch's experts.
        num_tokens: tokens that wanted it, the older ones counted less.
    """

    key: int
    words: npt.NDArray[np.bool_]
    demand: Weights
    num_tokens: float


@dataclass(frozen=True)
class ReplicaStatistics:
    """A replica at one moment.

    Attributes:
        taken_at: seconds of the system's clock.
        load: requests that it runs or that wait there.
        held: bool [N], of the sketch's experts those in its slots; available: those that it may serve.
        topics: of the requests that it served.
        prefixes: hashes of beginnings that its KV memory holds, the most recent last.
    """

    taken_at: float
    load: int
    held: npt.NDArray[np.bool_]
    available: npt.NDArray[np.bool_]
    topics: tuple[Topic, ...] = ()
    prefixes: tuple[int, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """Plain values and bytes; demands take 4 bits an expert."""
        return {
            "version": VERSION,
            "taken_at": self.taken_at,
            "load": self.load,
            "num_experts": len(self.held),
            "held": np.packbits(self.held).tobytes(),
            "available": np.packbits(self.available).tobytes(),
            "topics": [
                (topic.key, np.packbits(topic.words).tobytes(), _pack(topic.demand), round(topic.num_tokens))
                for topic in self.topics
            ],
            "prefixes": np.array(self.prefixes, dtype=np.uint64).tobytes(),
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Self | None:
        """The statistics; None if they are empty or of another version, as while newer replicas come in."""
        if wire.get("version") != VERSION:
            return None
        count = wire["num_experts"]
        return cls(
            wire["taken_at"],
            wire["load"],
            _bits(wire["held"], count),
            _bits(wire["available"], count),
            tuple(
                Topic(key, _bits(words, WORD_BUCKETS), _unpack(demand, count), float(num_tokens))
                for key, words, demand, num_tokens in wire["topics"]
            ),
            tuple(np.frombuffer(wire["prefixes"], dtype=np.uint64).tolist()),
        )


class _Counted:
    """A topic that still changes."""

    def __init__(self, likeness: Likeness, num_experts: int) -> None:
        self.words = likeness.words.astype(np.float32)
        self.mass = np.zeros(num_experts, dtype=np.float64)
        self.num_tokens = 0.0

    def frozen(self, key: int) -> Topic:
        return Topic(key, self.words > USUAL_WORD, _shares(self.mass), self.num_tokens)


class TopicLedger:
    """Counts what a replica's requests wanted, by topic, and the beginnings that it has seen. Not thread-safe.

    Args:
        num_experts: N, of the sketch.
        max_prefixes: blocks of beginnings that are kept.
    """

    def __init__(self, num_experts: int, max_prefixes: int = MAX_PREFIXES) -> None:
        self._num_experts = num_experts
        self._topics: OrderedDict[int, _Counted] = OrderedDict()
        self._prefixes: OrderedDict[int, tuple[int | None, float]] = OrderedDict()  # digest of the tokens, time
        self._max_prefixes = max_prefixes

    def begin(self, likeness: Likeness, digests: Sequence[int] | None = None, now: float = 0.0) -> tuple[int, ...]:
        """Count a request that came in; returns the keys of its topics, for `add`.

        Args:
            digests: of the blocks of its tokens (`block_digests`); None counts its beginning as held.
            now: seconds on the clock of `ReplicaStatistics.taken_at`.
        """
        for at, prefix in enumerate(likeness.beginning, start=1):
            digest = None if digests is None else _digest_at(at * BLOCK_BYTES / likeness.num_bytes, digests)
            self._prefixes[prefix] = (digest, now)
            self._prefixes.move_to_end(prefix)
        while len(self._prefixes) > self._max_prefixes:
            self._prefixes.popitem(last=False)
        keys = likeness.keys or (self._like(likeness),)
        for key in keys:
            counted = self._topics.setdefault(key, _Counted(likeness, self._num_experts))
            counted.words += NEW_WORDS * (likeness.words - counted.words)
            self._topics.move_to_end(key)
        while len(self._topics) > MAX_TOPICS:
            self._topics.popitem(last=False)
        return keys

    def add(self, keys: Sequence[int], mass: npt.NDArray[np.floating], num_tokens: int) -> None:
        """Count the router mass [N] that tokens of a request demanded. Topics that left meanwhile are not counted."""
        decay = 0.5 ** (num_tokens / HALF_LIFE_TOKENS)
        for counted in (self._topics[key] for key in keys if key in self._topics):
            counted.mass = counted.mass * decay + mass
            counted.num_tokens = counted.num_tokens * decay + num_tokens

    def statistics(
        self, taken_at: float, load: int, held: npt.NDArray[np.bool_], available: npt.NDArray[np.bool_],
        digests: Collection[int] = (),
    ) -> ReplicaStatistics:  # fmt: skip
        """All of it at this moment; arguments as the attributes of `ReplicaStatistics`.

        Args:
            digests: of the blocks of tokens that KV memory holds. A request that came in just now counts as held.
        """
        prefixes = (
            prefix
            for prefix, (digest, begun_at) in self._prefixes.items()
            if digest is None or digest in digests or 0 <= taken_at - begun_at < BEGINNING_SECONDS
        )
        topics = tuple(counted.frozen(key) for key, counted in self._topics.items() if counted.num_tokens)
        return ReplicaStatistics(taken_at, load, held, available, topics, tuple(prefixes))

    def _like(self, likeness: Likeness) -> int:
        """The key of the topic whose words are most like the request's, or a new one if none is like it."""
        words = np.array([counted.words > USUAL_WORD for counted in self._topics.values()], dtype=np.bool_)
        if len(words):
            shared = (words & likeness.words).sum(axis=1)
            likenesses = shared / np.sqrt(np.maximum(1, words.sum(axis=1)) * max(1, likeness.words.sum()))
            likest = int(likenesses.argmax())
            if likenesses[likest] >= LIKE_TOPIC:
                return list(self._topics)[likest]
        return xxhash.xxh3_64_intdigest(np.packbits(likeness.words).tobytes())


def _digest_at(share: float, digests: Sequence[int]) -> int:
    """The digest of the tokens' first blocks that stand for the first `share` of a text, at least one; 0 if there is
    none, which no tree holds."""
    return digests[max(0, round(share * len(digests)) - 1)] if digests else 0


def _shares(mass: npt.NDArray[np.float64]) -> Weights:
    total = mass.sum()
    return (mass / total if total else mass).astype(np.float32)


def _pack(shares: Weights) -> bytes:
    """Shares in 4 bits each, as square roots of their ratio to the largest: small ones keep some of their size."""
    most = shares.max(initial=0.0)
    codes = np.rint(15 * np.sqrt(shares / most)).astype(np.uint8) if most else np.zeros(len(shares), dtype=np.uint8)
    codes = np.append(codes, np.zeros(len(codes) % 2, dtype=np.uint8))
    return (codes[0::2] << 4 | codes[1::2]).tobytes()


def _unpack(packed: bytes, count: int) -> Weights:
    codes = np.frombuffer(packed, dtype=np.uint8)
    values = np.stack([codes >> 4, codes & 15], axis=1).ravel()[:count].astype(np.float64)
    return _shares(values**2)


def _bits(packed: bytes, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(np.bool_)
