"""A pruned checkpoint of every family: transformers loads it, and its logits are those of the masked model.

Checkpoints are written by transformers, extracted whole and exported twice: with other experts in each layer, and with
fewer than top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from expert_store.adapter import store_adapters
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import SelectionError, UnsupportedFamilyError
from extractor.exporting.export import prepare_export
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.quality.batches import run_batch
from tests.families.checkpoints import NUM_EXPERTS, TOP_K, moe_blocks, random_model
from tests.families.composites import TEXT_PARTS, as_omni, composite_model
from tests.families.serving import (
    PROMPTS,
    assembled,
    assert_same,
    checkpoint_of,
    served_families,
    served_logits,
    stock_logits,
)
from tests.families.test_whole_model import extracted
from tests.server.adapters import with_adapters

QUICK = ("deepseek_v3", "gpt_oss", "qwen3_moe")
"""Groups and a correction bias; experts side by side in one tensor, with biases; experts one by one."""
BY_LAYER = ([0, 1, 3, 4, 6, 7], [0, 2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 7])
FEW = [1, 6]
MERGED = (
    *("deepseek_v3", "ernie4_5_moe", "gemma4_text", "gpt_oss", "granitemoe"),
    *("minimax_m2", "qwen2_moe", "qwen3_next"),
)
"""Families with other norms, routers and layers, whose adapters are merged."""


def plan_of(kept: Sequence[Sequence[int]]) -> Plan:
    """A plan that keeps these experts of each layer, in another order than that of their ids."""
    deep_experts = tuple(PlannedExpert(experts) for experts in zip(*kept, strict=True))
    return Plan(len(kept), NUM_EXPERTS, {"kind": "free"}, deep_experts[::-1])


def loader(model: Any) -> Any:
    """The class to load with: transformers' choice for a text part that is a model of its own."""
    return AutoModelForCausalLM if type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING else type(model)


def mask_of(kept: Sequence[Sequence[int]]) -> ExpertMask:
    allowed = np.zeros((len(kept), NUM_EXPERTS), dtype=np.bool_)
    for layer, experts in enumerate(kept):
        allowed[layer, list(experts)] = True
    return ExpertMask.of(allowed)


def assert_exported(store: Store, out: Path, kept: Sequence[Sequence[int]], model: Any) -> None:
    """Export `kept`, and compare stock transformers on it with the masked store."""
    work = prepare_export(store, out, plan_of(kept), None)
    work.run()
    loaded, told = loader(model).from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    assert work.top_k == min(TOP_K, len(kept[0])) or model.config.model_type in ("phimoe", "zaya")
    assert [experts.down_proj.shape[0] for _, _, experts in moe_blocks(loaded)] == [len(kept[0])] * len(kept)
    selective = assembled(store, NUM_EXPERTS)
    ours = served_logits(selective, [mask_of(kept)] * len(PROMPTS))
    for masked, prompt in zip(ours, PROMPTS, strict=True):
        assert_same(masked, stock_logits(loaded.eval(), prompt))


@pytest.mark.parametrize("family", served_families(QUICK))
@torch.no_grad()
def test_exported_checkpoint_has_the_logits_of_the_masked_model(family: str, tmp_path: Path, repository: Path) -> None:
    model = random_model(family)
    with extracted(model, tmp_path, repository) as store:
        num_layers = store.manifest.model.num_layers
        assert_exported(store, tmp_path / "out", BY_LAYER[:num_layers], model)
        assert set(Checkpoint.open(tmp_path / "out").tensors) <= set(Checkpoint.open(tmp_path / "checkpoint").tensors)
        few = [FEW] * num_layers
        if hasattr(moe_blocks(model)[0][1], "num_group"):
            with pytest.raises(SelectionError, match=r"keeps 1 experts in each of 2 groups"):
                prepare_export(store, tmp_path / "few", plan_of(few), None)
            with pytest.raises(SelectionError, match=r"layer 0 keeps \[4, 0\] of 4 in each"):
                prepare_export(store, tmp_path / "few", plan_of([[0, 1, 2, 3]] * num_layers), None)
        else:
            assert_exported(store, tmp_path / "few", few, model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", MERGED)
@torch.no_grad()
def test_merged_adapter_gives_the_logits_of_masked_rows_with_it(family: str, tmp_path: Path, repository: Path) -> None:
    """Every part of an adapter: of linear layers, norms, routers and experts."""
    model = random_model(family)
    with extracted(model, tmp_path, repository) as store:
        kept = BY_LAYER[: store.manifest.model.num_layers]
        adapted = with_adapters(store.path, tmp_path / "adapted", mask_of(kept))
    with Store.open(adapted) as store:
        adapter = store_adapters(store.path, store.manifest)["planned"]
        prepare_export(store, tmp_path / "out", plan_of(kept), None, adapter).run()
        merged = loader(model).from_pretrained(tmp_path / "out").eval()(input_ids=torch.tensor([PROMPTS[0]])).logits
        selective = assembled(store, NUM_EXPERTS)
        masked = partial(run_batch, selective, [PROMPTS[0]], mask_of(kept))
        assert_same(masked("planned").logits, merged)
        assert float((masked().logits - merged).abs().max()) > 0.01, "the adapter changes nothing"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in TEXT_PARTS if name in CONFIG_MAPPING])
@torch.no_grad()
def test_exported_composite_answers_text_as_the_masked_one(model_type: str, tmp_path: Path, repository: Path) -> None:
    model = composite_model(model_type)
    with extracted(model, tmp_path, repository) as store:
        assert_exported(store, tmp_path / "out", BY_LAYER[: store.manifest.model.num_layers], model)
        assert set(Checkpoint.open(tmp_path / "out").tensors) <= set(Checkpoint.open(tmp_path / "checkpoint").tensors)


@pytest.mark.exhaustive
def test_omni_models_are_refused_by_name(tmp_path: Path, repository: Path) -> None:
    checkpoint_of(composite_model("qwen3_omni_moe_thinker"), tmp_path / "checkpoint", repository)
    as_omni(tmp_path / "checkpoint")
    prepare(Checkpoint.open(tmp_path / "checkpoint"), tmp_path / "store", SelectionRequest()).run()
    with (
        Store.open(tmp_path / "store") as store,
        pytest.raises(UnsupportedFamilyError, match="'qwen3_omni_moe' cannot be exported"),
    ):
        prepare_export(store, tmp_path / "out", None, None)


def test_families_that_always_make_two_picks_refuse_one_expert(tmp_path: Path, repository: Path) -> None:
    model = random_model("phimoe")
    with extracted(model, tmp_path, repository) as store:
        one = [[3]] * store.manifest.model.num_layers
        with pytest.raises(UnsupportedFamilyError, match="'phimoe' cannot be exported with 1 experts"):
            prepare_export(store, tmp_path / "out", plan_of(one), None)
