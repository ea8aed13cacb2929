"""A loaded model on the device-driven path, as the service sees it; Triton's interpreter where there is no GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from router.mask import ExpertMask
from server.errors import SettingsError
from server.masks.masking import FixedMasking
from server.model.device.step import graphs as device_graphs
from server.model.load_progress import LoadProgress
from server.serving.loading import load
from server.serving.service import LoadedModel
from server.settings.load import load_settings
from tests.expert_store.damage import damage
from tests.server.adapters import HALF, with_adapters
from tests.server.engine.clients import Client
from tests.server.model.device.small import DEVICE, TUNING


@pytest.fixture
def loaded(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LoadedModel]]:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_graphs, "Tuning", lambda: TUNING)
    models: list[LoadedModel] = []

    def make(path: str, **flags: Any) -> LoadedModel:
        flags = {"dtype": "float32", "max_context_tokens": 64, "max_batch_size": 1, **flags}
        settings = load_settings(
            {"store": small_store, "device": DEVICE.type, "decode_path": path, **flags}, environ={}
        )
        models.append(load(settings.settings, LoadProgress()))
        return models[-1]

    yield make
    for model in models:
        model.engine.stop(0)


def test_both_paths_give_the_same_text_and_the_same_account_of_it(loaded):
    made = {path: loaded(path, slots=5, cache_policy="lfu", kept_experts=1) for path in ("device", "host")}
    texts = {}
    for path, model in made.items():
        assert model.decode_path == path
        client = Client(model.engine, "one two three", max_new_tokens=5, ignore_eos=True)
        texts[path] = (client.result().generated_text, [round(token.logprob, 3) for token in client.tokens])
    assert texts["device"] == texts["host"]
    snapshots = {path: model.experts() for path, model in made.items()}
    device, host = snapshots["device"], snapshots["host"]
    assert (device.uses == host.uses).all()
    assert device.num_slots == host.num_slots == 5
    assert device.resident.sum(axis=1).tolist() == [5, 5]
    assert (device.hits + device.misses).sum() == 2 * 4 * 2, "four decoded tokens want two experts in two layers"
    assert device.slot_bytes >= host.slot_bytes
    assert (device.fetch_bytes == device.misses * device.expert_bytes).all()


@pytest.mark.exhaustive
def test_requests_for_which_slots_give_memory_have_the_texts_of_a_server_of_fixed_sizes(loaded):
    texts, shares = {}, {}
    for kind, memory in (("moving", 4 << 14), ("fixed", 8 << 14)):  # bytes of so many blocks
        engine = loaded("device", slots=7, max_batch_size=4, kv_memory=memory, memory_balance=kind).engine
        clients = [
            Client(engine, f"{word} two three " * 9, max_new_tokens=3, ignore_eos=True)
            for word in ("one", "four", "five", "six")
        ]
        texts[kind] = [client.result().generated_text for client in clients]
        shares[kind] = engine.status().memory
        engine.runner.pages.check_integrity(contents=True)
    assert texts["moving"] == texts["fixed"]
    assert (shares["moving"].is_moving, shares["fixed"].is_moving) == (True, False)
    assert shares["moving"].moves_to_kv > 0 == shares["fixed"].moves_to_kv


@pytest.mark.exhaustive
def test_sampled_greedy_and_penalised_requests_share_a_batch_and_choose_as_on_the_host(loaded):
    ways = [{"temperature": 0.7, "top_p": 0.9, "seed": 3}, {}, {"repetition_penalty": 1.3, "top_k": 5, "seed": 4}]
    texts = {}
    for path in ("device", "host"):
        engine = loaded(path, max_batch_size=3).engine
        clients = [Client(engine, "one two", max_new_tokens=4, ignore_eos=True, **way) for way in ways]
        texts[path] = [client.result().generated_text for client in clients]
    assert texts["device"] == texts["host"]
    assert len(set(texts["device"])) == 3


@pytest.mark.exhaustive
def test_requests_with_masks_of_their_own_share_a_batch(loaded):
    texts = {}
    for path in ("device", "host"):
        engine = loaded(path, max_batch_size=2).engine
        masks = [ExpertMask.same_in_every_layer(ids, 2, 8) for ids in ((0, 1, 2), (3, 4, 5, 6))]
        clients = [
            Client(engine, "one two", max_new_tokens=4, ignore_eos=True, masking=FixedMasking(mask)) for mask in masks
        ]
        texts[path] = [client.result().generated_text for client in clients]
    assert texts["device"] == texts["host"]
    assert len(set(texts["device"])) == 2


@pytest.mark.exhaustive
def test_requests_with_adapters_of_their_own_share_a_batch_of_the_captured_path(loaded, small_store, tmp_path):
    adapted = with_adapters(small_store, tmp_path / "adapted", HALF)
    told = {}
    for path in ("device", "host"):
        model = loaded(path, store=adapted, max_batch_size=4)
        assert model.decode_path == path
        options = {"max_new_tokens": 4, "ignore_eos": True, "masking": FixedMasking(HALF)}
        clients = [Client(model.engine, "one two", adapter=name, **options) for name in ("auto", "none", "pools")]
        clients.append(Client(model.engine, "one two", max_new_tokens=4, ignore_eos=True))
        results = [client.result() for client in clients]
        told[path] = [(one.generated_text, one.deficit.adapter, round(one.deficit.overall, 4)) for one in results]
    assert told["device"] == told["host"]
    assert [adapter for _, adapter, _ in told["host"]] == ["planned", None, "pools", None]
    assert len({(text, deficit) for text, _, deficit in told["host"]}) == 4


@pytest.mark.exhaustive
def test_what_came_to_the_mask_between_two_steps_is_served(loaded):
    model = loaded("device", experts="0-4")
    engine = model.engine
    first = Client(engine, "one two", max_new_tokens=3, ignore_eos=True).result()
    assert first.deficit.overall > 0

    def widen() -> None:
        engine.runner.model.routing.set_mask(ExpertMask.same_in_every_layer(range(8), 2, 8))
        engine.runner.adopt()

    engine.between_steps(widen).result(60)
    engine.runner.tier.wait()
    assert Client(engine, "one two", max_new_tokens=3, ignore_eos=True).result().deficit.overall == 0
    assert model.experts().available.all()


@pytest.mark.exhaustive
def test_requests_that_fetch_share_a_batch_with_those_that_do_without(loaded, few_small_store):
    """Greedy and sampled; the whole model's answers for those that fetch, and nothing of it for the others."""
    ways = [{}, {"on_missing": "fetch"}, {"on_missing": "fetch", "temperature": 0.8, "top_p": 0.9, "seed": 5}]
    found = {}
    for path in ("device", "host"):
        model = loaded(path, store=few_small_store, max_batch_size=3, slots=3)
        clients = [Client(model.engine, "one two", max_new_tokens=5, ignore_eos=True, **way) for way in ways]
        ends = [client.result() for client in clients]
        found[path] = [(end.generated_text, round(end.deficit.overall, 3)) for end in ends]
        assert not model.experts().available.all(), "nothing was added to the store"
    assert found["device"] == found["host"]
    whole = Client(loaded("host").engine, "one two", max_new_tokens=5, ignore_eos=True)
    assert found["device"][1] == (whole.result().generated_text, 0.0)
    assert found["device"][0][1] > 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize("corrupt_experts", ["fail", "mask"])
def test_a_damaged_expert_is_dealt_with_as_on_the_host(loaded, small_store, tmp_path, corrupt_experts):
    whole = Client(loaded("host").engine, "one two", max_new_tokens=4, ignore_eos=True)
    whole.result()
    uses = loaded("host")
    Client(uses.engine, "one two", max_new_tokens=4, ignore_eos=True).result()
    layer, expert = np.argwhere(uses.experts().uses > 0)[-1].tolist()
    path = Path(shutil.copytree(small_store, tmp_path / "store"))
    damage(path, layer, expert)
    model = loaded("device", store=path, corrupt_experts=corrupt_experts, slots=3)
    client = Client(model.engine, "one two", max_new_tokens=4, ignore_eos=True)
    if corrupt_experts == "fail":
        assert f"(layer {layer}, expert {expert})" in str(client.error())
        assert model.engine.status().totals.num_failed == 1
    else:
        allowed = np.ones((2, 8), dtype=bool)
        allowed[layer, expert] = False
        masking = FixedMasking(ExpertMask.of(allowed))
        wanted = Client(uses.engine, "one two", max_new_tokens=4, ignore_eos=True, masking=masking)
        assert client.result().generated_text == wanted.result().generated_text
        assert np.argwhere(model.experts().corrupt).tolist() == [[layer, expert]]
    damage(path, layer, expert)  # flips the same bit back
    healed = Client(model.engine, "one two", max_new_tokens=4, ignore_eos=True)
    assert (healed.result().generated_text == whole.result().generated_text) == (corrupt_experts == "fail")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_is_fetched_for_grown_and_shrunk_while_it_serves(loaded, few_small_store, tmp_path, dtype):
    """The store is float32: in the other dtype every span is converted on its way."""

    def answer(model: LoadedModel, **options: Any) -> tuple[str, float]:
        result = Client(model.engine, "one two", max_new_tokens=4, ignore_eos=True, **options).result()
        return result.generated_text, round(result.deficit.overall, 3)

    whole = answer(loaded("device", dtype=dtype))
    path = Path(shutil.copytree(few_small_store, tmp_path / "store"))
    model = loaded("device", store=path, slots=3, dtype=dtype)
    few = answer(model)
    assert few[1] > 0.0
    assert answer(model, on_missing="fetch") == whole
    model.growth.grow(5)
    model.growth.wait(60)
    assert model.growth.status().error is None
    assert answer(model, on_missing="fetch") == whole, "what is on its way is fetched at once"
    model.engine.runner.tier.wait()
    assert answer(model) == whole
    model.growth.shrink([3, 4, 5, 6, 7])
    assert answer(model) == few
    assert answer(model, on_missing="fetch") == whole
    model.engine.runner.pages.check_integrity(contents=True)


def test_a_path_that_cannot_do_what_is_set_is_refused_by_name(loaded):
    with pytest.raises(SettingsError, match="resident_bias"):
        loaded("host", resident_bias=0.1)
    with pytest.raises(SettingsError, match="decode_path is device"):
        loaded("device", max_batch_size=65)
    with pytest.raises(SettingsError, match="max_context_tokens is 4096"):
        loaded("device", max_context_tokens=4096)
