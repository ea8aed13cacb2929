"""Linear layers of the trunk in FP8: from a checkpoint, or made by row, through a store into transformers' modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import TargetError
from extractor.planning.selection import SelectionRequest
from extractor.writing.linears import made_by_row
from extractor.writing.prepare import prepare
from extractor.writing.verify import verify_against
from server.model.seam.trunk import eight_bits, load_trunk
from tests.families.test_quantised import fp8_in_blocks, quantised_checkpoint

EVERYTHING = SelectionRequest()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of three layers whose projections are in FP8, in blocks of 16 × 16; its head is in bfloat16."""
    directory = tmp_path_factory.mktemp("fp8") / "checkpoint"
    return quantised_checkpoint("qwen3_moe", fp8_in_blocks, directory, moe_intermediate_size=32)


def by_row(weight: Tensor) -> Tensor:
    codes, scales = made_by_row(weight)
    return (codes.float() * scales).to(weight.dtype)


@pytest.mark.parametrize(("wanted", "held", "num_held"), [("shipped", "shipped", 12), ("fp8", "fp8", 13)])
@pytest.mark.filterwarnings("ignore")
def test_linear_layers_of_the_trunk_stay_in_fp8_and_have_the_values_that_transformers_loads(
    checkpoint: Path, tmp_path: Path, wanted: Any, held: str, num_held: int
) -> None:
    stores = tmp_path / "16bit", tmp_path / "fp8"
    for store, trunk_dtype in zip(stores, ("16bit", wanted), strict=True):
        prepare(Checkpoint.open(checkpoint), store, EVERYTHING, trunk_dtype=trunk_dtype).run()
        verify_against(store, Checkpoint.open(checkpoint))
    manifests = [read_manifest(store) for store in stores]
    assert [manifest.trunk_dtype for manifest in manifests] == [None, held]
    assert sum(file.bytes for file in manifests[1].trunk) < sum(file.bytes for file in manifests[0].trunk)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    if held == "fp8":
        loaded.lm_head.weight.data = by_row(loaded.lm_head.weight.data)
    trunk = load_trunk(stores[1] / "trunk", device=torch.device("cpu"), dtype=torch.bfloat16)
    values = loaded.state_dict()
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, values[name]), name
    found = eight_bits(trunk, stores[1] / "trunk")
    assert len(found) == num_held
    for linear, (codes, scales) in found.items():
        groups = codes.float().view(*scales.shape, -1)
        assert torch.equal((groups * scales[..., None]).flatten(1).bfloat16(), linear.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_store_keeps_the_dtype_of_its_trunk(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    prepare(opened, tmp_path, SelectionRequest(count=2), trunk_dtype="16bit").run()
    with pytest.raises(TargetError, match="--trunk-dtype 16bit, wanted fp8"):
        prepare(opened, tmp_path, EVERYTHING, trunk_dtype="fp8")
    before = read_manifest(tmp_path).trunk
    prepare(opened, tmp_path, EVERYTHING).run()
    assert read_manifest(tmp_path).trunk == before


def test_an_extraction_with_an_option_that_made_nothing_may_be_run_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(tiny_checkpoint)
    prepare(opened, tmp_path, SelectionRequest(count=1), trunk_dtype="shipped").run()
    assert read_manifest(tmp_path).trunk_dtype is None
    assert prepare(opened, tmp_path, SelectionRequest(count=1), trunk_dtype="shipped").is_finished
    with pytest.raises(TargetError, match="--trunk-dtype 16bit, wanted fp8"):
        prepare(opened, tmp_path, SelectionRequest(count=1), trunk_dtype="fp8")


def test_a_row_of_zeros_has_codes_and_a_scale_of_one() -> None:
    codes, scales = made_by_row(torch.cat([torch.zeros(1, 16), torch.full((1, 16), -7.0)]))
    assert codes.float().tolist() == [[0.0] * 16, [-448.0] * 16]
    assert scales.tolist() == [[1.0], [7 / 448]]
