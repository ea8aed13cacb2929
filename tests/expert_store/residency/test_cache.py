"""The cache and the host tier over a hand-made store, against a model of what they must hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expert_store.errors import ExpertUnavailableError, ShardCorruptError, SlotsError
from expert_store.manifest import LayerSpec, TensorSpec
from expert_store.residency.cache import ExpertCache
from expert_store.residency.host_tier import HostTier
from expert_store.residency.policy import LFU, LRU

CPU = torch.device("cpu")
NUM_LAYERS, NUM_EXPERTS = 2, 6
SPEC_TENSORS = (TensorSpec("gate_up_proj", "F32", (4, 2), 0, 32), TensorSpec("down_proj", "F32", (2, 2), 32, 16))


class MemoryStore:
    """The part of `Store` that the tiers use, with spans made on the spot: weight (layer, expert) is a constant."""

    def __init__(self, absent: tuple[int, ...] = ()) -> None:
        layers = tuple(LayerSpec(i, i, f"model.layers.{i}.mlp.experts", 48, SPEC_TENSORS) for i in range(NUM_LAYERS))
        deep = [type("Deep", (), {"experts": (e,) * NUM_LAYERS}) for e in range(NUM_EXPERTS) if e not in absent]
        model = type("Model", (), {"num_experts": NUM_EXPERTS})
        self.manifest = type("Manifest", (), {"layers": layers, "model": model, "deep_experts": deep})
        self.available = np.ones((NUM_LAYERS, NUM_EXPERTS), dtype=np.bool_)
        self.available[:, list(absent)] = False
        self.path = Path("memory")
        self.num_reads = 0
        self.broken: set[tuple[int, int]] = set()

    has_source = False

    def layer_spec(self, layer: int) -> LayerSpec:
        return self.manifest.layers[layer]

    def read_expert(self, layer: int, expert: int, out: torch.Tensor) -> None:
        self.num_reads += 1
        if (layer, expert) in self.broken:
            raise ShardCorruptError(f"layer {layer} expert {expert} is broken")
        out.view(torch.float32).fill_(value_of(layer, expert))


def value_of(layer: int, expert: int) -> float:
    return 100.0 * layer + expert + 1


def make_cache(
    store: MemoryStore, num_slots: int, host_entries: int | None = None, policy=LRU, most_slots: int | None = None
) -> ExpertCache:
    host = None
    if host_entries is not None:
        host = HostTier(store, budget_bytes=48 * host_entries, pinned=False)  # type: ignore[arg-type]
    return ExpertCache(
        store,  # type: ignore[arg-type]
        num_slots=num_slots,
        device=CPU,
        dtype=torch.float32,
        host_tier=host,
        policy=policy,
        most_slots=most_slots,
    )


@pytest.fixture(params=[None, 1, 3], ids=["from disk", "host tier of 1", "host tier of 3"])
def host_entries(request: pytest.FixtureRequest) -> int | None:
    return request.param


def test_acquired_slots_hold_the_experts_weights(host_entries: int | None) -> None:
    cache = make_cache(MemoryStore(), 3, host_entries)
    for experts in ([0, 1, 2], [5, 3], [2, 4, 5]):
        slots = cache.acquire(1, experts)
        for expert, slot in zip(experts, slots, strict=True):
            for param in cache.pools[1].params.values():
                assert bool((param[slot] == value_of(1, expert)).all())
        cache.release(1, experts)
        cache.check_integrity()
    cache.close()


def test_leased_expert_is_never_evicted(host_entries: int | None) -> None:
    cache = make_cache(MemoryStore(), 3, host_entries)
    (leased_slot,) = cache.acquire(0, [0])
    for expert in (1, 2, 3, 4, 5):
        cache.acquire(0, [expert])
        cache.release(0, [expert])
    assert int(cache.page_table[0, 0]) == leased_slot
    assert bool((cache.pools[0].params["down_proj"][leased_slot] == value_of(0, 0)).all())


def test_more_experts_than_slots_at_once_is_an_error_and_leases_nothing() -> None:
    cache = make_cache(MemoryStore(), 2)
    with pytest.raises(SlotsError, match="needs 3 slots at once and has 2"):
        cache.acquire(0, [0, 1, 2])
    cache.check_integrity()
    cache.acquire(0, [3, 4])


def test_an_expert_outside_the_store_is_named_and_nothing_stays_leased() -> None:
    cache = make_cache(MemoryStore(absent=(4,)), 2)
    with pytest.raises(ExpertUnavailableError, match="expert 4 of layer 1 is not in the store"):
        cache.acquire(1, [0, 4])
    cache.check_integrity()
    cache.acquire(1, [2, 3])


def test_a_span_that_cannot_be_read_leaves_the_slot_free_and_the_expert_absent(host_entries: int | None) -> None:
    store = MemoryStore()
    store.broken.add((0, 3))
    cache = make_cache(store, 2, host_entries)
    with pytest.raises(ShardCorruptError):
        cache.acquire(0, [2, 3])
    cache.check_integrity()
    assert cache.page_table[0, 3] == -1
    store.broken.clear()
    slots = cache.acquire(0, [2, 3])
    assert bool((cache.pools[0].params["down_proj"][slots[1]] == value_of(0, 3)).all())


def test_a_second_use_is_a_hit_and_reads_nothing() -> None:
    store = MemoryStore()
    cache = make_cache(store, 4)
    for _ in range(2):
        cache.acquire(0, [1, 2])
        cache.release(0, [1, 2])
    statistics = cache.statistics()
    assert store.num_reads == 2
    assert (statistics.hits[0], statistics.misses[0], statistics.fetch_bytes[0]) == (2, 2, 96)


def test_preload_fills_slots_with_the_best_deep_experts_first() -> None:
    cache = make_cache(MemoryStore(absent=(0,)), 3)
    seen: list[tuple[int, int]] = []
    cache.preload(lambda done, total: seen.append((done, total)))
    assert sorted(cache.resident(0)) == sorted(cache.resident(1)) == [1, 2, 3]
    assert seen[-1] == (288, 288)
    cache.check_integrity()


def test_weights_of_another_dtype_are_converted_on_the_way(host_entries: int | None) -> None:
    store = MemoryStore()
    host = None
    if host_entries is not None:
        host = HostTier(store, budget_bytes=48 * host_entries, pinned=False)  # type: ignore[arg-type]
    cache = ExpertCache(store, num_slots=2, device=CPU, dtype=torch.bfloat16, host_tier=host)  # type: ignore[arg-type]
    (slot,) = cache.acquire(1, [5])
    weight = cache.pools[1].params["gate_up_proj"][slot]
    assert weight.dtype == torch.bfloat16
    assert bool((weight == torch.tensor(value_of(1, 5), dtype=torch.bfloat16)).all())
    assert cache.statistics().slot_bytes == NUM_LAYERS * 2 * 24


def test_a_host_tier_too_small_for_one_expert_names_what_would_do() -> None:
    with pytest.raises(SlotsError, match="--host-memory 48"):
        HostTier(MemoryStore(), budget_bytes=47, pinned=False)  # type: ignore[arg-type]


def test_no_slots_is_refused() -> None:
    with pytest.raises(SlotsError, match="at least 1"):
        make_cache(MemoryStore(), 0)


def test_slots_that_close_evict_the_least_recently_used_and_open_again_empty() -> None:
    cache = make_cache(MemoryStore(), 4, most_slots=6)
    for expert in (0, 1, 2, 3, 0):
        cache.acquire(0, [expert])
        cache.release(0, [expert])
    cache.resize(2)
    cache.check_integrity()
    assert cache.resident(0) == [3, 0]
    assert cache.statistics().slot_bytes == NUM_LAYERS * 2 * 48
    cache.resize(6)
    cache.check_integrity()
    slots = cache.acquire(0, range(6))
    assert [float(cache.pools[0].params["down_proj"][slot][0, 0]) for slot in slots] == [1, 2, 3, 4, 5, 6]
    assert cache.statistics().evictions[0] == 2


def test_slots_never_become_fewer_than_leases_nor_more_than_there_is_room_for() -> None:
    cache = make_cache(MemoryStore(), 4, most_slots=5)
    cache.acquire(1, [0, 1, 2])
    for wanted in (0, 2, 6):
        with pytest.raises(SlotsError, match=f"{wanted} slots a layer, wanted 3 to 5"):
            cache.resize(wanted)
    cache.resize(3)
    cache.check_integrity()
    cache.release(1, [0, 1, 2])
    cache.resize(1)


class CacheMachine(RuleBasedStateMachine):
    """Random leases, releases, broken reads and numbers of slots: the tables agree at every point, and weights are the
    right ones."""

    @initialize(
        num_slots=st.integers(1, NUM_EXPERTS),
        host=st.sampled_from([None, 1, 2, 5]),
        policy=st.sampled_from([LRU, LFU]),
    )
    def start(self, num_slots: int, host: int | None, policy: type[LRU] | type[LFU]) -> None:
        self.store = MemoryStore(absent=(5,))
        self.cache = make_cache(self.store, num_slots, host, policy, most_slots=NUM_EXPERTS)
        self.held: list[tuple[int, list[int], list[int]]] = []

    @rule(layer=st.integers(0, NUM_LAYERS - 1), experts=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1))
    def acquire(self, layer: int, experts: set[int]) -> None:
        ids = sorted(experts)
        leased = {expert for at, held, _ in self.held for expert in held if at == layer}
        fits = len(leased | experts) <= self.cache.num_slots
        readable = not any((layer, e) in self.store.broken and self.cache.page_table[layer, e] < 0 for e in ids)
        if fits and readable and 5 not in experts:
            self.held.append((layer, ids, self.cache.acquire(layer, ids)))
        else:
            with pytest.raises((SlotsError, ExpertUnavailableError, ShardCorruptError)):
                self.cache.acquire(layer, ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        layer, ids, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.release(layer, ids)

    @rule(num_slots=st.integers(0, NUM_EXPERTS + 1))
    def resize(self, num_slots: int) -> None:
        most_leased = max(len({e for at, held, _ in self.held for e in held if at == layer}) for layer in (0, 1))
        if max(1, most_leased) <= num_slots <= NUM_EXPERTS:
            self.cache.resize(num_slots)
        else:
            with pytest.raises(SlotsError):
                self.cache.resize(num_slots)

    @rule(key=st.tuples(st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1)))
    def break_or_mend(self, key: tuple[int, int]) -> None:
        self.store.broken ^= {key}

    @invariant()
    def tables_agree_and_leased_weights_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        for layer, ids, slots in self.held:
            for expert, slot in zip(ids, slots, strict=True):
                weight = self.cache.pools[layer].params["gate_up_proj"][slot]
                assert bool((weight == value_of(layer, expert)).all()), f"layer {layer} expert {expert}"

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=25)
