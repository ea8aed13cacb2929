"""Vision-language and omni checkpoints are served as the text models that they contain.

The towers are tiny; what is under test is that the text part's experts are found in the composite checkpoint and that
text alone gives the logits that transformers' composite model gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from expert_store.store import Store
from extractor.errors import UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from tests.families.checkpoints import NUM_EXPERTS, moe_blocks, randomise, tiny_config
from tests.families.pruning import pruned_model
from tests.families.test_whole_model import PROMPTS, assembled, assert_same, checkpoint_of, served_logits, stock_logits

_TOWER: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 8,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    # of audio towers
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
TEXT_PARTS = {
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "aria": "aria_text",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
}


def tiny_tower(config: Any) -> dict[str, Any]:
    sizes = config.to_dict()
    sizes.pop("head_dim", None)
    return {**sizes, **{key: value for key, value in _TOWER.items() if key in sizes}}


def composite_model(model_type: str) -> Any:
    """A random composite model in float32."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    towers = {
        name: tiny_tower(getattr(default, name)) for name in ("vision_config", "audio_config") if hasattr(default, name)
    }
    text = tiny_config(TEXT_PARTS[model_type]).to_dict()
    config = config_class(text_config=text, **towers)
    torch.manual_seed(0)
    return randomise(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class](config).eval().float())


def as_omni(directory: Path) -> None:
    """Make a thinker's checkpoint what Qwen3-Omni ships: keys below `thinker.`, beside those of the other parts."""
    tensors = {f"thinker.{name}": value for name, value in load_file(directory / "model.safetensors").items()}
    tensors["talker.model.norm.weight"] = torch.ones(4)
    tensors["code2wav.head.weight"] = torch.ones(4)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_omni_moe", "thinker_config": thinker}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in TEXT_PARTS if name in CONFIG_MAPPING])
def test_text_part_is_served_as_the_composite_model_computes_it(
    model_type: str, tmp_path: Path, repository: Path
) -> None:
    model = composite_model(model_type)
    directory = tmp_path / "checkpoint"
    checkpoint = checkpoint_of(model, directory, repository)
    if model_type == "qwen3_omni_moe_thinker":
        as_omni(directory)
        checkpoint = type(checkpoint).open(directory)
    try:
        prepare(checkpoint, tmp_path / "store", SelectionRequest()).run()
    except UnsupportedFamilyError as error:
        if transformers.__version__.startswith("5.17."):
            pytest.skip(str(error))
        raise
    store = Store.open(tmp_path / "store")
    trunk = {path.name for path in store.trunk_path.iterdir()}
    assert "config.json" in trunk
    assert not any(
        name.startswith(("talker", "code2wav")) for name in load_file(store.trunk_path / "model.safetensors")
    )
    num_layers = store.manifest.model.num_layers
    selective = assembled(store, NUM_EXPERTS // 2)
    for ours, prompt in zip(served_logits(selective, [None] * len(PROMPTS)), PROMPTS, strict=True):
        assert_same(ours, stock_logits(model, prompt))
    kept = [1, 3, 5, 6]
    if not hasattr(moe_blocks(model)[0][1], "num_group"):
        mask = ExpertMask.same_in_every_layer(kept, num_layers, NUM_EXPERTS)
        pruned = pruned_model(model, [kept] * num_layers)
        assert pruned is not None
        assert_same(served_logits(selective, [mask] * len(PROMPTS))[0], stock_logits(pruned, PROMPTS[0]))
    selective.close()
