"""Tiny random checkpoints of every MoE family of transformers, with nothing degenerate in them.

A family is its model type and the few config keys that differ from the common small sizes. Every router sees spread-out
scores and every correction bias is random, so that a wrong masking rule changes the picks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

NUM_EXPERTS = 8
TOP_K = 3

# Sizes given to whichever of these keys a family's config has.
_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "route_scale": 1.5,
    "router_scaling_factor": 1.5,
    # multi-head latent attention and its indexer
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 6,
    "index_head_dim": 16,
    "index_n_heads": 16,
    # linear attention
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """One family: config keys on top of the common sizes.

    `causal`: transformers has a causal language model of it. `buildable`: it has a model of this config alone.
    `positive_bias`: its router fills experts of other groups with 0 instead of −inf, so that negative choice scores
    would lead to ties that any implementation breaks at will.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    causal: bool = True
    buildable: bool = True
    positive_bias: bool = False


# Sparse attention with an indexer counts as full attention in older transformers.
_INDEXED = "indexed_attention" if "indexed_attention" in ALLOWED_LAYER_TYPES else "full_attention"
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "aria_text": Family({"intermediate_size": 24}),
    "axk1": Family(),
    "axk2": Family({"n_group": 2, "topk_group": 1}, positive_bias=True),
    "bailing_hybrid": Family(_HYBRID),
    "beam": Family({"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "cohere2_moe": Family(),
    "deepseek_v2": Family(
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}
    ),
    "deepseek_v3": Family(),
    "deepseek_v32": Family(),
    "dots1": Family({"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3}),
    "dots3_note_text": Family({"layer_types": ["full_attention"] * 3, "head_dim": 16}),
    "ernie4_5_moe": Family({"moe_layer_end_index": 2}),
    "exaone_moe": Family(),
    "flex_olmo": Family(),
    "flint": Family({"mlp_only_layers": [0]}),
    "gemma4_text": Family(
        {
            "enable_moe_block": True,
            "num_experts": NUM_EXPERTS,
            "top_k_experts": TOP_K,
            "moe_intermediate_size": 24,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(),
    "glm5_next_text": Family(
        {
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", _INDEXED, "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        causal=False,
    ),
    "glm_moe_dsa": Family(),
    "gpt_oss": Family(),
    "granitemoe": Family(),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family({**_HYBRID, **_MAMBA}),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family({"head_dim": 8}),
    "hy_v3": Family(),
    "hy_v4": Family(),
    "inkling_text": Family(),
    "inkling2_text": Family(),
    "jamba": Family({"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "kimi_linear": Family(_HYBRID),
    "kolibri1": Family(),
    "laguna": Family(),
    "lfm2_moe": Family({"layer_types": ["conv", "full_attention", "conv"]}),
    "mellum": Family(),
    "mimo_v2_flash": Family(),
    "minimax": Family(),
    "minimax_m2": Family(),
    "minimax_m3_vl_text": Family(),
    "mistral4": Family(causal=False),
    "mistral_large4_text": Family(causal=False),
    "mixtral": Family(),
    "nemotron_h": Family(
        {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    ),
    "olmoe": Family(),
    "phimoe": Family({"num_experts_per_tok": 2}),
    "qwen2_moe": Family(),
    "qwen3_5_moe_text": Family(_HYBRID),
    "qwen3_moe": Family(),
    "qwen3_next": Family(_HYBRID),
    "qwen4_exp_text": Family(
        {
            "layer_types": ["linear_attention", _INDEXED, "linear_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        }
    ),
    "solar_open": Family(),
    "muse_spark_text": Family(causal=False),
    "deepseek_v4": Family({"mlp_layer_types": ["moe"] * 3}),
    "qwen3_vl_moe_text": Family(causal=False),
    "qwen3_omni_moe_text": Family(causal=False, buildable=False),
    "glm4v_moe_text": Family(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}, causal=False
    ),
    "zaya": Family({"num_experts_per_tok": 1}),
}


def is_installed(model_type: str) -> bool:
    """Whether the installed transformers has the family, as a model of its own."""
    return model_type in CONFIG_MAPPING and FAMILIES[model_type].buildable


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The family's config with small sizes; keys that the family does not have are left out."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class().to_dict()
    keys = {key for key, value in default.items() if value is not None} | set(config_class.attribute_map)
    sizes = {key: value for key, value in _COMMON.items() if key in keys}
    if "kv_lora_rank" in keys:
        sizes.pop("head_dim", None)
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return config_class(**{**sizes, **FAMILIES[model_type].overrides, **overrides})


def random_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The family's language model in float32 with random weights, norms, biases and correction biases."""
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if FAMILIES[model_type].causal else AutoModel
    model = auto.from_config(tiny_config(model_type, **overrides), dtype=torch.float32).eval()
    return randomise(model, FAMILIES[model_type].positive_bias)


def randomise(model: PreTrainedModel, positive_bias: bool = False) -> PreTrainedModel:
    """Make biases and norms of a freshly initialised model random, in place."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and tensor.is_floating_point():
                noise = torch.randn_like(tensor) * 0.2
                tensor.add_(noise.abs() if positive_bias else noise)
            elif tensor.ndim == 1 and "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds a layer's routed experts behind transformers' experts registry."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")


def moe_blocks(model: nn.Module) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """(block, router, experts) of every MoE layer, first layer first."""
    found = []
    for block in model.modules():
        for experts in block.children():
            if is_experts(experts):
                router = getattr(block, "gate", None)
                router = router if isinstance(router, nn.Module) else block.router
                found.append((block, router, experts))
    return found
