"""Tensors outside the experts that are missing, left over, of another shape or dtype are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.errors import CheckpointError
from tests.extractor.checkpoints import save_checkpoint

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3_moe: 3 layers, the middle one dense, 6 experts, tied embeddings of 64 rows and width 32."""
    return save_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint", "qwen3_moe")


def spoiled(
    whole: Path, directory: Path, edit: Callable[[Tensors], object] = lambda tensors: None, **config: Any
) -> Checkpoint:
    """A copy with other tensors, and other keys in config.json."""
    directory.mkdir()
    tensors = load_file(whole / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
    described = json.loads((whole / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(described))
    return Checkpoint.open(directory)


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


REFUSED: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "a missing norm": (
        lambda t: t.pop(f"{LAYER}.self_attn.q_norm.weight"),
        {},
        r"no tensor for model.layers.0.self_attn.q_norm.weight \[8\], which Qwen3MoeForCausalLM needs",
    ),
    "a missing embedding": (
        lambda t: t.pop("model.embed_tokens.weight"),
        {},
        r"no tensor for lm_head.weight \[64, 32\], model.embed_tokens.weight",
    ),
    "a missing head": (lambda t: None, {"tie_word_embeddings": False}, r"no tensor for lm_head.weight \[64, 32\]"),
    "a missing router": (lambda t: t.pop(f"{LAYER}.mlp.gate.weight"), {}, r"no tensor for model.layers.0.mlp.gate"),
    "fewer layers than the config says": (
        lambda t: None,
        {"num_hidden_layers": 4, "mlp_only_layers": [1, 3], "layer_types": None},
        r"no tensor for model.layers.3.input_layernorm.weight \[32\], .* and 8 more",
    ),
    "more rows than the vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": bf16(72, 32)}),
        {},
        r"model.embed_tokens.weight is \[72, 32\] and config.json wants \[64, 32\]; config.json and weights are",
    ),
    "a router of more experts": (
        lambda t: t.update({f"{LAYER}.mlp.gate.weight": bf16(8, 32)}),
        {},
        r"mlp.gate.weight is \[8, 32\] and config.json wants \[6, 32\]",
    ),
    "a wider attention": (lambda t: None, {"head_dim": 16}, r"self_attn.* and config.json wants"),
    "a vector for a matrix": (
        lambda t: t.update({f"{LAYER}.self_attn.o_proj.weight": bf16(1024)}),
        {},
        r"o_proj.weight is \[1024\] and config.json wants \[32, 32\]",
    ),
    "integers for a norm": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        {},
        r"the tensors of model.norm \(weight I32 \[32\]\) are of no encoding known",
    ),
    "fp8 without scales": (
        lambda t: t.update({f"{LAYER}.self_attn.o_proj.weight": bf16(32, 32).to(torch.float8_e4m3fn)}),
        {},
        r"the tensors of model.layers.0.self_attn.o_proj .* need .*scale",
    ),
    "scales without codes": (
        lambda t: t.update({f"{LAYER}.self_attn.o_proj.weight_scale": bf16(1)}),
        {},
        r"the tensors of model.layers.0.self_attn.o_proj \(.*weight_scale .*no encoding known",
    ),
    "a bias that the config does not have": (
        lambda t: t.update({f"{LAYER}.self_attn.q_proj.bias": bf16(32)}),
        {},
        r"has no place for model.layers.0.self_attn.q_proj.bias",
    ),
    "a norm that the model does not have": (
        lambda t: t.update({f"{LAYER}.post_moe_norm.weight": bf16(32)}),
        {},
        r"has no place for model.layers.0.post_moe_norm.weight",
    ),
    "a norm of the whole model that it does not have": (
        lambda t: t.update({"model.embed_norm.weight": bf16(32)}),
        {},
        r"has no place for model.embed_norm.weight",
    ),
    "more layers than the config says": (
        lambda t: None,
        {"num_hidden_layers": 2, "layer_types": None},
        r"has no place for model.layers.2\..* and \d+ more",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_is_refused_that_has(name: str, whole: Path, tmp_path: Path) -> None:
    edit, config, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        ExpertsLayout.of(spoiled(whole, tmp_path / "checkpoint", edit, **config))


def test_integers_for_a_bias_are_refused(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path / "whole", "qwen2_moe")
    name = f"{LAYER}.self_attn.q_proj.bias"
    with pytest.raises(CheckpointError, match=rf"{name} has the dtype I64, the model wants BF16, F16, F32, F64 for"):
        ExpertsLayout.of(spoiled(whole, tmp_path / "spoiled", lambda t: t.update({name: torch.ones(32).long()})))


TAKEN: dict[str, tuple[Callable[[Tensors], object], dict[str, Any]]] = {
    "a head beside tied embeddings": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        {},
    ),
    "the head alone of tied embeddings": (
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        {},
    ),
    "rotary frequencies of old releases": (
        lambda t: t.update({f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        {},
    ),
    "scales of a quantised KV cache": (lambda t: t.update({f"{LAYER}.self_attn.k_scale": torch.ones(1)}), {}),
    "norms in float32": (lambda t: t.update({"model.norm.weight": torch.ones(32)}), {}),
    "a vision tower": (lambda t: t.update({"visual.blocks.0.norm1.weight": bf16(8)}), {}),
    "a head that predicts further tokens": (lambda t: t.update({"mtp.layers.0.norm.weight": bf16(8)}), {}),
    "a layer that predicts further tokens": (
        lambda t: t.update({"model.layers.3.input_layernorm.weight": bf16(32)}),
        {"num_nextn_predict_layers": 1},
    ),
    "an empty quantization_config": (lambda t: None, {"quantization_config": {}}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_checkpoint_is_taken_that_has(name: str, whole: Path, tmp_path: Path) -> None:
    edit, config = TAKEN[name]
    layout = ExpertsLayout.of(spoiled(whole, tmp_path / "checkpoint", edit, **config))
    assert layout.model.num_layers == 2
