"""A store with its source attached: what it lacks is read from there, what it has is not."""

from pathlib import Path

import pytest
import torch

from expert_store.errors import ExpertUnavailableError
from expert_store.residency.cache import ExpertCache
from expert_store.store import Store
from tests.expert_store.hand_made import COLUMNS, span, write_store


class Source:
    """Every expert's span, by the rule of the hand-made store."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def read_expert(self, layer: int, expert: int, out: memoryview) -> None:
        self.read.append((layer, expert))
        out[:] = span(layer, expert)


def test_what_the_store_lacks_comes_from_its_source_alone(tmp_path: Path) -> None:
    write_store(tmp_path)
    source = Source()
    with Store.open(tmp_path) as store:
        assert not store.has_source
        store.attach_source(source)
        assert store.has_source
        assert not store.available.all(), "what a mask may choose from stays what the store holds"
        for layer in range(2):
            for expert in range(4):
                out = memoryview(bytearray(36))
                store.read_expert(layer, expert, out)
                assert bytes(out) == span(layer, expert)
        held = {(layer, experts[layer]) for experts in COLUMNS for layer in range(2)}
        assert set(source.read) == {(layer, expert) for layer in range(2) for expert in range(4)} - held
        with pytest.raises(ExpertUnavailableError, match="there is no expert 4"):
            store.read_expert(0, 4, memoryview(bytearray(36)))


def test_the_cache_fetches_from_the_source_and_preloads_without_it(tmp_path: Path) -> None:
    write_store(tmp_path)
    source = Source()
    with Store.open(tmp_path) as store:
        cache = ExpertCache(store, num_slots=3, device=torch.device("cpu"), dtype=torch.bfloat16)
        with pytest.raises(ExpertUnavailableError, match="expert 3 of layer 0 is not in the store"):
            cache.acquire(0, [3])
        store.attach_source(source)
        cache.preload()
        assert source.read == []
        (slot,) = cache.acquire(0, [3])
        assert source.read == [(0, 3)]
        params = cache.pools[0].params
        content = b"".join(bytes(params[name][slot].view(torch.uint8).flatten().tolist()) for name in params)
        assert content == span(0, 3)
        cache.release(0, [3])
        cache.check_integrity()
        cache.close()
