"""Which checkpoints are refused by their config alone, and the reasons given."""

import json
from pathlib import Path
from typing import Any

import pytest

from extractor.checkpoint.conversion import trace
from extractor.checkpoint.families import check_family
from extractor.errors import UnsupportedFamilyError


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_the_first_families_are_taken(family: str) -> None:
    assert check_family({"model_type": family, "num_experts": 8}, "x") == family


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "qwen3", "num_experts": 0}, {}])
def test_a_dense_model_is_told_what_is_wanted(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"is a dense model.*use a Mixture-of-Experts checkpoint"):
        check_family(config, "x")


def test_a_quantised_checkpoint_is_refused_with_the_reason() -> None:
    config = {"model_type": "qwen3_moe", "num_experts": 8, "quantization_config": {"quant_method": "unheard-of"}}
    with pytest.raises(UnsupportedFamilyError, match=r"is quantised \(unheard-of\)"):
        check_family(config, "x")


@pytest.mark.parametrize("family", ["newmoe", "switch_transformers", "llama", None])
def test_a_family_that_cannot_be_extracted_is_told_which_can(family: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "num_experts": 8, "num_hidden_layers": 1}))
    with pytest.raises(
        UnsupportedFamilyError, match=r"cannot be extracted: .*use a checkpoint of a supported"
    ) as caught:
        trace(tmp_path, {})
    assert "mixtral" in str(caught.value)
    assert "qwen3_moe" in str(caught.value)
