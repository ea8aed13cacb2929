"""What cannot be served is refused at extraction, before anything is written, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.errors import UnsupportedFamilyError
from tests.families.checkpoints import tiny_config
from tests.families.composites import tiny_tower

OUTSIDE = "no layer of .* goes through transformers' experts registry"
NO_MODEL = "transformers has no causal language model"
REASONS = {
    "doge": OUTSIDE,
    "jetmoe": OUTSIDE,
    "llama4_text": OUTSIDE,
    "longcat_flash": OUTSIDE,
    "switch_transformers": NO_MODEL,
    "nllb-moe": NO_MODEL,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in REASONS if name in CONFIG_MAPPING])
def test_family_that_cannot_be_served_is_refused_with_the_reason(model_type: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = Checkpoint(tmp_path, "x", "x", {**config, "num_experts": 8}, (), ())
    with pytest.raises(UnsupportedFamilyError, match=REASONS[model_type]):
        ExpertsLayout.of(checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_layer_with_experts_for_text_and_others_for_images_is_refused(tmp_path: Path) -> None:
    config_class = CONFIG_MAPPING["ernie4_5_vl_moe"]
    default = config_class()
    text = tiny_config("ernie4_5_moe").to_dict() | {
        "moe_intermediate_size": [24, 24],
        "model_type": "ernie4_5_vl_moe_text",
    }
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    for key in ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"):
        text.pop(key, None)
    config_class(
        text_config=text, vision_config=tiny_tower(default.vision_config, text["hidden_size"])
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UnsupportedFamilyError, match="more than one set of routed experts"):
        ExpertsLayout.of(Checkpoint(tmp_path, "x", "x", config, (), ()))
