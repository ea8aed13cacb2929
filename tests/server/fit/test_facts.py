"""Sizes from headers alone are those of the store that extraction writes and of the model that serving loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import GptOssConfig, GptOssForCausalLM

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.encoding.names import ExpertsDtype
from extractor.errors import CheckpointError
from extractor.statistics.file import write_statistics
from extractor.statistics.statistics import ExpertStatistics
from router.ledger import UsageLedger
from server.errors import UsageError
from server.fit.facts import facts_of
from server.model.decode_path import load_runner
from server.model.kv_memory import kv_token_bytes
from server.model.runner import RunnerOptions
from tests.server.fit.fake_hub import NAME, Hub, served_hub

QUICK = ("16bit", "int4", "nvfp4")


@pytest.mark.parametrize(
    "experts_dtype",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in get_args(ExpertsDtype)
        if name != "shipped"
    ],
)
def test_spans_of_every_encoding_are_those_that_extraction_writes(
    tiny_checkpoint: Path, experts_dtype: ExpertsDtype
) -> None:
    layout = ExpertsLayout.of(Checkpoint.open(tiny_checkpoint), experts_dtype)
    with facts_of(str(tiny_checkpoint), None, "auto") as model:
        assert model.encoded(experts_dtype).layers == layout.layers


def test_spans_of_a_transposed_model_are_those_that_extraction_writes(tmp_path: Path) -> None:
    config = GptOssConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=64, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    with facts_of(str(tmp_path), None, "auto") as model:
        made = ExpertsLayout.of(Checkpoint.open(tmp_path), "int4").layers
        assert model.encoded("int4").layers == made
        assert model.encoded("int4").encoded("16bit").layers == model.layers


def test_a_store_and_its_checkpoint_have_the_same_sizes(tiny_store: Path, tiny_checkpoint: Path) -> None:
    with facts_of(str(tiny_store), None, "auto") as store, facts_of(str(tiny_checkpoint), None, "auto") as checkpoint:
        assert store.layers == checkpoint.layers
        assert (store.trunk_bytes, store.step_bytes, store.kv_bytes) == (
            checkpoint.trunk_bytes, checkpoint.step_bytes, checkpoint.kv_bytes,
        )  # fmt: skip
        assert store.max_context == checkpoint.max_context


def test_sizes_are_those_of_the_loaded_model(tiny_store: Path) -> None:
    options = RunnerOptions(torch.device("cpu"), torch.bfloat16, path="host", max_tokens=64, num_slots=8)
    runner = load_runner(Store.open(tiny_store), options)
    try:
        with facts_of(str(tiny_store), None, "bfloat16") as model:
            parameters = {id(one): one for one in runner.model.model.parameters()}.values()
            assert model.trunk_bytes == sum(one.nbytes for one in parameters)
            assert 8 * len(model.layers) * model.span_bytes == runner.model.cache.statistics().slot_bytes
    finally:
        runner.model.close()


def test_the_encoding_of_a_store_is_what_it_is(tiny_store: Path) -> None:
    with pytest.raises(UsageError, match="wanted int4"), facts_of(str(tiny_store), "int4", "auto"):
        pass


def test_usage_of_a_store_gives_the_popularity_of_its_experts(tiny_store: Path, tmp_path: Path) -> None:
    store = shutil.copytree(tiny_store, tmp_path / "store")
    with Store.open(store) as opened:
        spec, fingerprint = opened.manifest.model, opened.manifest.source.fingerprint
    ledger = UsageLedger(spec.num_layers, spec.num_experts, fingerprint)
    ledger.num_tokens = 100
    ledger.demand_count[:, : spec.top_k] = 100
    (store / "usage.json").write_text(json.dumps(ledger.to_json()))
    with facts_of(str(store), None, "auto") as model:
        assert model.demand.source == "usage.json of the store, 100 tokens"
        assert np.array_equal(model.demand.shares[0] > 0.5, np.arange(spec.num_experts) < spec.top_k)
        assert model.demand.hit_rate(spec.top_k) == pytest.approx(1.0, abs=0.01)


def test_statistics_of_calibration_give_it_too_and_those_of_another_model_are_refused(
    tiny_store: Path, tmp_path: Path
) -> None:
    with Store.open(tiny_store) as opened:
        spec = opened.manifest.model
    statistics = ExpertStatistics("x", spec.num_layers, spec.num_experts, spec.top_k, domains=["a"])
    statistics.totals["demand"][0, :, : spec.top_k] = 50
    statistics.num_tokens[0] = 50
    write_statistics(tmp_path / "stats.safetensors", statistics)
    with facts_of(str(tiny_store), None, "auto", tmp_path / "stats.safetensors") as model:
        assert model.demand.source == f"{tmp_path / 'stats.safetensors'}, 50 tokens"
        assert model.demand.distinct(8) == pytest.approx(spec.top_k, abs=0.01)
    write_statistics(tmp_path / "other.safetensors", ExpertStatistics("x", 2, 4, 1, domains=["a"]))
    with (
        pytest.raises(UsageError, match="4 experts in 2 layers"),
        facts_of(str(tiny_store), None, "auto", tmp_path / "other.safetensors"),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}, 3 * 2 * 2 * 16),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 2 * 2 * 4 * 16),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 4, "v_head_dim": 12}, 2 * (8 + 4)),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
          "layer_types": ["linear_attention", "full_attention"]}, 2 * 16),
    ],
    ids=["grouped queries", "all heads", "latent attention", "linear layers"],
)  # fmt: skip
def test_bytes_of_a_token_in_kv_memory(config: dict[str, object], wanted: int) -> None:
    from types import SimpleNamespace

    assert kv_token_bytes(SimpleNamespace(**config), 2) == 2 * wanted


def test_a_model_of_the_hub_is_described_by_its_headers(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served_hub(tiny_checkpoint) as hub:
        _ask(hub, monkeypatch)
        with facts_of(NAME, None, "auto") as described, facts_of(str(tiny_checkpoint), None, "auto") as model:
            assert described.name == NAME
            assert described.layers == model.layers
            assert described.trunk_bytes == model.trunk_bytes
        with pytest.raises(CheckpointError, match="could not be described by the hub"), facts_of("a/b", None, "auto"):
            pass
    weights = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert 0 < sum(hub.sent) < weights / 50


def test_an_index_of_the_hub_that_names_other_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with served_hub(tmp_path) as hub:
        _ask(hub, monkeypatch)
        with pytest.raises(CheckpointError, match="damaged or hostile"), facts_of(NAME, None, "auto"):
            pass
    assert not hub.sent


@pytest.mark.parametrize("offsets", [[0, 10**30], [0, "x"], [0], [0, -100]])
def test_a_header_of_the_hub_without_sizes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: list[object]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with served_hub(tmp_path) as hub:
        _ask(hub, monkeypatch)
        with pytest.raises(CheckpointError, match="no sizes of a file"), facts_of(NAME, None, "auto"):
            pass


def _ask(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
