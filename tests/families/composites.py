"""Tiny random vision-language and omni checkpoints around a text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tests.families.checkpoints import randomise, tiny_config

_TOWER: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_attention_heads": 2,
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
    "downsample_hidden_size": 8,
}


TEXT_PARTS = {
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "glm4v_moe": "glm4v_moe_text",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "aria": "aria_text",
    "kimi_k25": "deepseek_v3",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
}


def tiny_tower(config: Any, hidden: int) -> dict[str, Any]:
    sizes = config.to_dict()
    sizes.pop("head_dim", None)
    tower = _TOWER | {"out_hidden_size": hidden, "output_dim": hidden}
    return {**sizes, **{key: value for key, value in tower.items() if key in sizes}}


def composite_model(model_type: str, **overrides: Any) -> Any:
    """A random composite model in float32; `overrides` are keys of its text part's config."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    text = tiny_config(TEXT_PARTS[model_type], **overrides).to_dict()
    towers = {
        name: tiny_tower(getattr(default, name), text["hidden_size"])
        for name in ("vision_config", "audio_config")
        if hasattr(default, name)
    }
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
