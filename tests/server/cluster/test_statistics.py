"""The statistics of a replica: what is counted to which topic, and what remains after they were sent."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.cluster.likeness import BLOCK_BYTES, WORD_BUCKETS, Likeness, words_of
from server.cluster.statistics import (
    MAX_BYTES,
    MAX_PREFIXES,
    MAX_TOPICS,
    SKETCH_EXPERTS,
    ReplicaStatistics,
    TopicLedger,
    sketch_layers,
)

NUM = 16
NOTHING_HELD = np.zeros(NUM, dtype=np.bool_)


def _likeness(*keys: int, words: str = "", beginning: tuple[int, ...] = ()) -> Likeness:
    return Likeness(beginning, keys, words_of(words))


def _mass(expert: int) -> np.ndarray:
    return np.eye(NUM)[expert]


def test_demand_goes_to_the_topics_of_its_request() -> None:
    ledger = TopicLedger(NUM)
    law, sea = ledger.begin(_likeness(1)), ledger.begin(_likeness(2))
    ledger.add(law, 3 * _mass(4), 20)
    ledger.add(sea, 5 * _mass(9), 30)
    topics = {topic.key: topic for topic in ledger.statistics(0.0, 0, NOTHING_HELD, NOTHING_HELD).topics}
    assert topics[1].demand.tolist() == _mass(4).tolist()
    assert topics[2].demand.tolist() == _mass(9).tolist()
    assert (topics[1].num_tokens, topics[2].num_tokens) == (20, 30)


def test_requests_without_a_key_are_put_together_by_their_words() -> None:
    ledger = TopicLedger(NUM)
    sea = ledger.begin(_likeness(words="the ship sailed over the sea to the harbour"))
    sums = ledger.begin(_likeness(words="what is seven plus twelve minus four"))
    again = ledger.begin(_likeness(words="the ship left the harbour over the sea"))
    assert sea == again != sums


def test_old_demand_counts_less() -> None:
    ledger = TopicLedger(NUM)
    topic = ledger.begin(_likeness(1))
    ledger.add(topic, 1000 * _mass(0), 1000)
    ledger.add(topic, 1000 * _mass(1), 1000)
    (found,) = ledger.statistics(0.0, 0, NOTHING_HELD, NOTHING_HELD).topics
    assert found.demand[1] > found.demand[0] > 0


@given(st.lists(st.integers(0, 80), max_size=200))
@settings(max_examples=30)
def test_the_last_topics_and_beginnings_stay(keys: list[int]) -> None:
    ledger = TopicLedger(NUM, max_prefixes=32)
    for key in keys:
        ledger.add(ledger.begin(_likeness(key, beginning=(key, 1000 + key))), _mass(key % NUM), 1)
    found = ledger.statistics(0.0, 0, NOTHING_HELD, NOTHING_HELD)
    last = list(dict.fromkeys(reversed(keys)))
    assert [topic.key for topic in reversed(found.topics)] == last[:MAX_TOPICS]
    assert set(found.prefixes) >= {prefix for key in last[:16] for prefix in (key, 1000 + key)}
    assert len(found.prefixes) <= 32


def test_a_beginning_is_held_where_its_tokens_are_or_where_it_just_came_in() -> None:
    ledger, digests = TopicLedger(NUM), [11, 12, 13, 14]
    prompt = Likeness((1, 2, 3), (), words_of(""), num_bytes=4 * BLOCK_BYTES)
    ledger.begin(prompt, digests, now=100.0)

    def held(taken_at: float, *of_tree: int) -> tuple[int, ...]:
        return ledger.statistics(taken_at, 0, NOTHING_HELD, NOTHING_HELD, of_tree).prefixes

    assert held(101.0) == (1, 2, 3), "it may not be read yet"
    assert held(200.0) == ()
    assert held(200.0, 11, 12) == (1, 2)
    assert held(200.0, *digests) == (1, 2, 3)
    ledger.begin(Likeness((9,), (), words_of(""), num_bytes=BLOCK_BYTES), [], now=150.0)
    assert held(200.0, 11) == (1,), "a prompt without a whole block of tokens is never held"


def test_full_statistics_are_small_and_say_the_same_after_they_were_sent() -> None:
    ledger, draw = TopicLedger(SKETCH_EXPERTS), np.random.default_rng(0)
    for key in range(MAX_TOPICS):
        beginning = tuple(draw.integers(0, 2**63, MAX_PREFIXES // MAX_TOPICS + 1).tolist())
        likeness = Likeness(beginning, (2**64 - 1 - key,), draw.random(WORD_BUCKETS) < 0.3)
        ledger.add(ledger.begin(likeness), draw.random(SKETCH_EXPERTS) ** 4, 100)
    sent = ledger.statistics(12.5, 7, *draw.random((2, SKETCH_EXPERTS)) < 0.5)
    wire = sent.to_wire()
    assert len(pickle.dumps(wire)) < MAX_BYTES
    got = ReplicaStatistics.from_wire(wire)
    assert got is not None
    assert (got.taken_at, got.load, got.prefixes) == (sent.taken_at, sent.load, sent.prefixes)
    assert (got.held == sent.held).all()
    assert (got.available == sent.available).all()
    for before, after in zip(sent.topics, got.topics, strict=True):
        assert before.key == after.key
        assert (before.words == after.words).all()
        assert np.abs(before.demand - after.demand).sum() < 0.1
        assert after.demand.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("wire", [{}, {"version": 0}])
def test_statistics_of_another_version_say_nothing(wire: dict[str, int]) -> None:
    assert ReplicaStatistics.from_wire(wire) is None


@pytest.mark.parametrize(("num_layers", "num_experts", "count"), [(8, 64, 8), (26, 64, 16), (61, 256, 4), (3, 4096, 1)])
def test_a_sketch_has_evenly_spaced_layers(num_layers: int, num_experts: int, count: int) -> None:
    layers = sketch_layers(num_layers, num_experts)
    assert len(layers) == count
    assert layers.min() == 0
    assert layers.max() == (num_layers - 1 if count > 1 else 0)
