"""DeepSeek-V4's layers that route by token id: served whole, and refused by name where experts would be hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.store import Store
from extractor.errors import SelectionError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.errors import MaskError
from router.mask import ExpertMask
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from tests.families.checkpoints import NUM_EXPERTS, TOP_K, is_installed, random_model
from tests.families.serving import PROMPTS, assembled, assert_same, checkpoint_of, served_logits, stock_logits

pytestmark = pytest.mark.skipif(not is_installed("deepseek_v4"), reason="this transformers has no deepseek_v4")
NUM_LAYERS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    """A random model whose first layer routes by token id."""
    built = random_model("deepseek_v4", mlp_layer_types=["hash_moe", "moe", "moe"])
    table = built.model.layers[0].mlp.gate.tid2eid
    generator = torch.Generator().manual_seed(5)
    for token in range(len(table)):
        table[token] = torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K]
    return built


@pytest.fixture(scope="module")
def store_path(model: Any, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    where = tmp_path_factory.mktemp("token-ids")
    prepare(checkpoint_of(model, where / "checkpoint", repository), where / "store", SelectionRequest()).run()
    return where / "store"


@pytest.mark.parametrize(
    "num_slots", [1, *(pytest.param(num, marks=pytest.mark.exhaustive) for num in (NUM_EXPERTS // 2, NUM_EXPERTS))]
)
def test_a_layer_that_routes_by_token_id_is_served_exactly_from_slots(
    model: Any, store_path: Path, num_slots: int
) -> None:
    reference = [stock_logits(model, prompt) for prompt in PROMPTS]
    selective = assembled(Store.open(store_path), num_slots)
    seen: set[tuple[int, int]] = set()
    for ours, theirs in zip(served_logits(selective, [None] * len(PROMPTS), seen), reference, strict=True):
        assert_same(ours, theirs)
    table = model.model.layers[0].mlp.gate.tid2eid
    tokens = {token for prompt in PROMPTS for token in prompt}
    assert {expert for layer, expert in seen if layer == 0} == set(table[sorted(tokens)].flatten().tolist())
    selective.close()


def test_experts_of_a_layer_that_routes_by_token_id_cannot_be_left_out(
    model: Any, tmp_path: Path, repository: Path
) -> None:
    checkpoint = checkpoint_of(model, tmp_path / "checkpoint", repository)
    with pytest.raises(
        SelectionError, match=r"MoE layer 0 of deepseek_v4 routes by token id.* 6 were chosen: extract all"
    ):
        prepare(checkpoint, tmp_path / "store", SelectionRequest(experts="0-5"))


def test_a_mask_over_a_layer_that_routes_by_token_id_is_refused_by_name(store_path: Path) -> None:
    hidden = ExpertMask.same_in_every_layer(range(6), NUM_LAYERS, NUM_EXPERTS)
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=2, mask=hidden)
    with pytest.raises(MaskError, match=r"MoE layer 0 of deepseek_v4 routes by token id.* serve without a mask"):
        load_model(Store.open(store_path), options)
    selective = assembled(Store.open(store_path), 2)
    elsewhere = hidden.allowed.copy()
    elsewhere[0] = True
    assert selective.routing.mask_refusal(ExpertMask.of(elsewhere)) is None
    for mask in (hidden, None):
        assert "MoE layer 0" in str(selective.routing.mask_refusal(mask))
    selective.close()
