"""What requests can ask for where an expert is missing, alone and mixed in one batch."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from expert_store.errors import ExpertUnavailableError
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.source import attach_source
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.engine.engine import Engine
from server.engine.masks import check_nothing_missing
from server.engine.request import ExpertMissingError, GenerationRequest, InvalidRequestError
from server.masks.masking import FixedMasking
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, RunnerOptions, SelectiveModel
from tests.server.engine.clients import Client
from tests.server.model.host.greedy import greedy, stock_greedy

TEXT = "Once upon a time"
NUM_KEPT = 16


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundled checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("checkpoints") / "tiny"))


@pytest.fixture(scope="module")
def few(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a quarter of the experts, whose checkpoint lies where it says."""
    path = tmp_path_factory.mktemp("stores") / "few"
    prepare(Checkpoint.open(checkpoint), path, SelectionRequest(count=NUM_KEPT)).run()
    return path


def model_of(store: Path, num_slots: int = 12) -> SelectiveModel:
    model = load_model(
        Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=num_slots)
    )
    model.source_problem = attach_source(model.store)
    return model


def test_a_masked_request_tells_what_its_tokens_wanted_and_an_unmasked_one_nothing(
    make_engine: Callable[..., Engine], few: Path
) -> None:
    assert Client(make_engine(), TEXT, max_new_tokens=8).result().deficit.demand is None
    deficit = Client(make_engine(store_path=few), TEXT, max_new_tokens=8).result().deficit
    assert deficit.demand is not None
    assert deficit.demand.shape == (8, 64)
    missing = deficit.demand[:, NUM_KEPT:].sum()
    assert missing / deficit.demand.sum() == pytest.approx(deficit.overall, rel=1e-4), "the store has the first 16"


def test_what_is_fetched_makes_the_whole_model_bit_for_bit(few: Path, tiny_store: Path) -> None:
    everything = ExpertMask(np.ones((8, 64), dtype=np.bool_))
    partial, whole = model_of(few), model_of(tiny_store)
    ids = whole.tokenizer(TEXT).input_ids
    tokens, logits = greedy(HostRunner(partial, max_rows=1, max_tokens=64), ids, 20, everything)
    wanted_tokens, wanted_logits = greedy(HostRunner(whole, max_rows=1, max_tokens=64), ids, 20)
    assert tokens == wanted_tokens
    assert torch.equal(logits, wanted_logits)
    assert int(partial.cache.statistics().resident.max()) <= 12, "what was fetched takes slots and nothing else"
    partial.cache.check_integrity()


def test_a_fetching_answer_is_that_of_stock_transformers_unmasked(
    make_engine: Callable[..., Engine], few: Path, stock: PreTrainedModel
) -> None:
    engine = make_engine(store_path=few, num_slots=10)
    client = Client(engine, TEXT, on_missing="fetch", max_new_tokens=24, ignore_eos=True)
    result = client.result()
    ids = engine.runner.model.tokenizer(TEXT).input_ids
    assert client.token_ids == stock_greedy(stock, ids, 24)[0]
    assert result.deficit.overall == 0.0
    assert result.deficit.top1_missing_tokens == 0
    assert not engine.runner.model.store.available.all(), "nothing was added to the store"


def test_a_refusing_request_ends_alone_and_names_what_it_wanted(make_engine: Callable[..., Engine], few: Path) -> None:
    engine = make_engine(store_path=few)
    alone = Client(engine, TEXT, max_new_tokens=24, ignore_eos=True)
    alone.result()
    beside = Client(engine, TEXT, max_new_tokens=24, ignore_eos=True)
    refusing = Client(engine, "Der Hund ist", on_missing="refuse", max_new_tokens=20)
    error = refusing.error()
    beside.result()
    assert isinstance(error, ExpertMissingError)
    assert error.expert >= NUM_KEPT
    assert 0.0 < error.share <= 1.0
    assert f"expert {error.expert} of layer {error.layer}" in str(error)
    assert refusing.tokens == [], "it wanted a missing expert in its prompt already"
    assert beside.token_ids == alone.token_ids
    assert engine.status().kv_tokens == 0


def test_a_refusing_request_that_lacks_nothing_is_answered(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    refusing = Client(engine, TEXT, on_missing="refuse", max_new_tokens=12)
    masked = Client(engine, TEXT, max_new_tokens=12)
    assert refusing.result().generated_text == masked.result().generated_text


def test_a_refusing_request_ends_at_the_token_that_its_own_mask_fails(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prompt = engine.runner.model.tokenizer(TEXT).input_ids
    row = engine.runner.allocate()
    wanted = engine.runner.prefill(row, prompt).record.served_index
    engine.runner.free(row)
    allowed = np.zeros((8, 64), dtype=np.bool_)
    for layer, ids in enumerate(wanted):
        allowed[layer, np.unique(ids)] = True
    masking = FixedMasking(ExpertMask(allowed))
    error = Client(engine, TEXT, masking=masking, on_missing="refuse", max_new_tokens=50, ignore_eos=True)
    assert isinstance(error.error(), ExpertMissingError)
    assert error.tokens, "the prompt had all that it wanted"


def test_each_row_of_a_mixed_batch_gets_what_it_gets_alone(make_engine: Callable[..., Engine], few: Path) -> None:
    engine = make_engine(store_path=few, max_rows=6, num_slots=10)
    half = ExpertMask.same_in_every_layer(range(8), 8, 64)
    kinds: list[dict[str, Any]] = [
        {},
        {"on_missing": "fetch"},
        {"masking": FixedMasking(half)},
        {"router_temperature": 1.7},
        {"on_missing": "fetch", "router_temperature": 0.5},
        {"on_missing": "fetch", "masking": FixedMasking(ExpertMask.same_in_every_layer(range(8, 40), 8, 64))},
        {"on_missing": "refuse"},
    ]
    texts = [TEXT, "Der Hund ist", "12 + 5 =", "The river", "def main():", "Paris is", "Once"]
    options = {"max_new_tokens": 16, "ignore_eos": True}
    alone = [Client(engine, text, **kind, **options) for text, kind in zip(texts, kinds, strict=True)]
    for client in alone:  # one after the other
        assert client.ended.wait(60)
    together = [Client(engine, text, **kind, **options) for text, kind in zip(texts, kinds, strict=True)]
    for mine, before in zip(together[:-1], alone[:-1], strict=True):
        result, wanted = mine.result(), before.result()
        assert mine.token_ids == before.token_ids
        assert result.deficit.overall == pytest.approx(wanted.deficit.overall, abs=1e-6)
        assert result.deficit.top1_missing_per_layer == wanted.deficit.top1_missing_per_layer
    assert str(together[-1].error()) == str(alone[-1].error())
    assert together[1].result().deficit.overall == together[4].result().deficit.overall == 0.0
    assert together[0].result().deficit.overall > 0.0


def test_one_at_a_time_and_in_one_step_differ_in_nothing(few: Path) -> None:
    """The runner itself, logits and all: rows that fetch, are masked and are tempered decode in one step."""
    runner = HostRunner(model_of(few), max_rows=4, max_tokens=64)
    everything = ExpertMask(np.ones((8, 64), dtype=np.bool_))
    masks = [None, everything, None, everything]
    temperatures = [1.0, 1.0, 2.5, 0.7]
    prompts = [runner.model.tokenizer(text).input_ids for text in (TEXT, "Der Hund", "12 + 5 =", "The river")]

    def rows() -> list[int]:
        held = [runner.allocate() for _ in prompts]
        for row, ids, mask, temperature in zip(held, prompts, masks, temperatures, strict=True):
            runner.prefill(row, ids, mask=mask, temperature=temperature)
        return held

    held = rows()
    together = runner.decode([RowStep(*one) for one in zip(held, [5, 6, 7, 8], masks, temperatures, strict=True)])
    for row in held:
        runner.free(row)
    for at, row in enumerate(rows()):
        alone = runner.decode([RowStep(row, 5 + at, masks[at], temperatures[at])])
        assert alone.record.served_index[:, 0].tolist() == together.record.served_index[:, at].tolist()
        torch.testing.assert_close(alone.logits[0], together.logits[at], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_router_temperature_divides_the_routers_logits(
    make_engine: Callable[..., Engine], stock: PreTrainedModel, temperature: float
) -> None:
    """Dividing the gate's weights by a power of two divides its logits exactly."""
    engine = make_engine(num_slots=64)
    client = Client(engine, TEXT, router_temperature=temperature, max_new_tokens=20, ignore_eos=True)
    client.result()
    tempered = copy.deepcopy(stock)
    for layer in tempered.model.layers:
        layer.mlp.gate.weight = nn.Parameter(layer.mlp.gate.weight / temperature)
    ids = engine.runner.model.tokenizer(TEXT).input_ids
    assert client.token_ids == stock_greedy(tempered, ids, 20)[0]
    assert client.token_ids != stock_greedy(stock, ids, 20)[0]


def test_without_a_source_fetching_is_refused_with_the_reason(
    make_engine: Callable[..., Engine], checkpoint: Path, tmp_path: Path
) -> None:
    moved, store = tmp_path / "moved", tmp_path / "store"
    shutil.copytree(checkpoint, tmp_path / "here")
    prepare(Checkpoint.open(tmp_path / "here"), store, SelectionRequest(count=4)).run()
    (tmp_path / "here").rename(moved)
    engine = make_engine(store_path=store)
    with pytest.raises(InvalidRequestError, match=r"needs the checkpoint.*here is no directory on this machine"):
        Client(engine, TEXT, on_missing="fetch")
    assert Client(engine, TEXT, max_new_tokens=2).result().num_generated_tokens == 2


def test_another_checkpoint_in_its_place_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    here, store = tmp_path / "here", tmp_path / "store"
    shutil.copytree(checkpoint, here)
    prepare(Checkpoint.open(here), store, SelectionRequest(count=4)).run()
    weights = here / "model-00002-of-00003.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 15 * 7 :] = bytes(len(content) - len(content) // 15 * 7)
    weights.write_bytes(content)
    with Store.open(store) as opened:
        assert "another checkpoint, or a changed one" in attach_source(opened)
        assert not opened.has_source


def test_a_checkpoint_that_changes_while_serving_is_an_error_and_no_answer(checkpoint: Path, tmp_path: Path) -> None:
    here, store = tmp_path / "here", tmp_path / "store"
    shutil.copytree(checkpoint, here)
    prepare(Checkpoint.open(here), store, SelectionRequest(count=4)).run()
    with Store.open(store) as opened:
        assert attach_source(opened) == ""
        out = memoryview(bytearray(opened.layer_spec(0).span_bytes))
        opened.read_expert(0, 60, out)
        for file in here.glob("*.safetensors"):
            file.write_bytes(file.read_bytes())
        with pytest.raises(ExpertUnavailableError, match=r"expert 60 of MoE layer 0.*was changed"):
            opened.read_expert(0, 60, out)


def test_a_store_of_a_hub_checkpoint_finds_its_snapshot_in_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / revision
    shutil.copytree(checkpoint, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    store = tmp_path / "store"
    opened = Checkpoint.open(snapshot, name="someone/tiny", location=f"someone/tiny@{revision}")
    prepare(opened, store, SelectionRequest(count=4)).run()
    with Store.open(store) as found:
        assert attach_source(found) == ""
        assert found.has_source
    shutil.rmtree(tmp_path / "hub")
    with Store.open(store) as found:
        assert "not in the hub's cache" in attach_source(found)


@pytest.mark.parametrize(
    ("kind", "message"), [("device", "not possible: host memory has no room"), ("nothing", "wanted one of")]
)
def test_what_the_way_of_running_cannot_do_is_refused_by_name(
    make_engine: Callable[..., Engine], few: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    engine = make_engine(store_path=few)
    monkeypatch.setattr(HostRunner, "fetch_refusal", lambda self: "host memory has no room")
    with pytest.raises(InvalidRequestError, match=message):
        Client(engine, TEXT, on_missing="fetch" if kind == "device" else "guess")  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_router_temperature_is_refused(make_engine: Callable[..., Engine], temperature: float) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequestError, match="wanted a number above 0"):
        engine.submit(GenerationRequest("odd", (5,), router_temperature=temperature), print)


def test_tokens_that_did_without_their_most_wanted_expert_are_counted(
    make_engine: Callable[..., Engine], few: Path
) -> None:
    engine = make_engine(store_path=few)
    runner = engine.runner
    prompt = tuple(runner.model.tokenizer(TEXT).input_ids)
    row = runner.allocate()
    record = runner.prefill(row, prompt).record
    runner.free(row)
    assert record.demand_index is not None
    assert record.demand_weight is not None
    lacking = [
        [
            int(record.demand_index[layer, token, record.demand_weight[layer, token].argmax()]) >= NUM_KEPT
            for token in range(len(prompt))
        ]
        for layer in range(8)
    ]
    deficit = Client(engine, TEXT, max_new_tokens=1).result().deficit
    assert deficit.num_tokens == len(prompt)
    assert deficit.top1_missing_per_layer == tuple(map(sum, lacking))
    assert deficit.top1_missing_tokens == sum(any(column) for column in zip(*lacking, strict=True))
    assert engine.ledger.top1_missing.tolist() == list(deficit.top1_missing_per_layer)
    assert engine.ledger.top1_missing_tokens == deficit.top1_missing_tokens > 0


def test_the_first_token_that_lacks_an_expert_is_named_with_its_most_wanted_one() -> None:
    demand = np.array([[[0, 1], [2, 1]], [[0, 1], [3, 4]]])  # [L, T, K]; id 4 is a pick that does not exist
    weight = np.array([[[0.5, 0.5], [0.75, 0.25]], [[0.5, 0.5], [1.0, 0.0]]], dtype=np.float32)
    all_but = lambda *ids: ExpertMask.of(np.array([[expert not in ids for expert in range(4)]] * 2))  # noqa: E731
    check_nothing_missing(demand, weight, all_but())
    with pytest.raises(ExpertMissingError) as caught:
        check_nothing_missing(demand, weight, all_but(2, 3))
    assert (caught.value.layer, caught.value.expert, caught.value.share) == (0, 2, 0.75)
    with pytest.raises(ExpertMissingError) as caught:
        check_nothing_missing(demand, weight, all_but(3))
    assert (caught.value.layer, caught.value.expert, caught.value.share) == (1, 3, 1.0)
