"""The families that the captured step takes, as tiny random models, and the shape that the step must find in each."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from server.model.device.step.parts import (
    GELU,
    AttentionKind,
    ConvolutionKind,
    DeltaKind,
    ExpertKind,
    GateKind,
    LatentKind,
    MambaKind,
    PairOrder,
    Scales,
)
from tests.families.checkpoints import is_installed, random_model
from tests.families.composites import TEXT_PARTS, composite_model

SIZES = {
    "hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "sliding_window": None,
}  # fmt: skip


@dataclass(frozen=True)
class Captured:
    """A family's config on top of the common sizes, and what of it the step must have seen.

    `is_whole`: its checkpoints are captured; else they have layers of another kind too.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    is_whole: bool = True
    takes_temperature: bool = True


_GRANITE = {
    "hidden_size": 128, "intermediate_size": 16,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "attention_multiplier": 0.1,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]
_DELTA = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
_CHANNELS = {"linear_head_dim": 16, "linear_num_heads": 4}
_DENSE_FIRST = {"dense_layers": frozenset({0})}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip
_LATENTS = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 32, "v_head_dim": 40, "head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip


def _latents(heads: int, query_rank: int, pairs: PairOrder) -> dict[str, Any]:
    return {"attentions": (LatentKind(heads, 16, 24, 32, 40, query_rank, pairs),) * 2, **_DENSE_FIRST}


CAPTURED = {
    "mixtral": Captured({"head_dim": 32}, {"qk_norm": "none"}),
    "mixtral in a window": Captured({"head_dim": 32, "sliding_window": 3}, {"windows": (3, 3)}, "mixtral"),
    "qwen3_moe": Captured({"decoder_sparse_step": 2}, {"qk_norm": "head", "dense_layers": frozenset({0})}),
    "olmoe": Captured({"hidden_size": 128}, {"qk_norm": "row"}),
    "qwen2_moe": Captured({"hidden_size": 128, "mlp_only_layers": [1]}, {"shared_intermediate": 16, "rotary": 32}),
    "qwen2_moe partly in windows": Captured(
        {"hidden_size": 128, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"windows": (3, 0)}, "qwen2_moe",
    ),
    "glm4_moe": Captured({"use_qk_norm": True, "n_group": 1}, {"rotary": 16, "qk_norm": "head", **_DENSE_FIRST}),
    "glm4_moe in groups": Captured({"n_group": 4, "topk_group": 2, "norm_topk_prob": False}, {}, "glm4_moe"),
    "minimax_m2": Captured(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"qk_norm": "row", "rotary": 16},
    ),
    "dots1": Captured({}, {"qk_norm": "head", **_DENSE_FIRST}),
    "hy_v3": Captured({}, {"qk_norm": "head", **_DENSE_FIRST}),
    "solar_open": Captured({}, {"shared_intermediate": 16}),
    "flint": Captured({"sliding_window": 3, "layer_types": _MIXED}, {"windows": (3, 0)}),
    "exaone_moe": Captured({"sliding_window": 3, "layer_types": _MIXED}, {"windows": (3, 0), **_DENSE_FIRST}),
    "mellum": Captured({"sliding_window": 3, "layer_types": _MIXED}, {"windows": (3, 0)}),
    "ernie4_5_moe": Captured({"moe_layer_start_index": 1}, {"neighbours": True, **_DENSE_FIRST}),
    "hunyuan_v1_moe": Captured({"intermediate_size": 16}, {"qk_norm": "head, rotated", "shared_intermediate": 16}),
    "granitemoe": Captured(_GRANITE, {"scales": Scales(3.0, 0.5, 0.25)}),
    "granitemoeshared": Captured({"shared_intermediate_size": 16, **_GRANITE}, {"shared_intermediate": 16}),
    "minimax_m3_vl_text": Captured(
        {"layer_types": ["full_attention"] * 2, "dense_intermediate_size": 32, "shared_intermediate_size": 16},
        {"shared_intermediate": 16, "mlp_gate": GateKind(1.702, 7.0, 1.0), "scales": Scales(routed=1.5)},
        is_whole=False,
    ),
    "mimo_v2_flash": Captured(
        {
            "head_dim": 48, "v_head_dim": 32, "num_key_value_heads": 1, "sliding_window": 3,
            "layer_types": _MIXED[::-1], "mlp_layer_types": ["sparse", "sparse"],
        },
        {
            "windows": (0, 3),
            "attentions": tuple(AttentionKind(4, heads, 48, 32, 16, value_scale=0.707) for heads in (1, 2)),
        },
    ),
    "deepseek_v2": Captured(
        {
            **_LATENTS, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "num_experts_per_tok": 2,
        },
        _latents(4, 0, "neighbours"),
    ),
    "deepseek_v3": Captured(
        {**_LATENTS, "q_lora_rank": 48, "rope_parameters": _YARN}, _latents(4, 48, "neighbours to halves")
    ),
    "deepseek_v3 in halves": Captured(
        {**_LATENTS, "q_lora_rank": None, "rope_interleave": False, "n_group": 1}, _latents(4, 0, "halves"),
        "deepseek_v3",
    ),
    "glm4_moe_lite": Captured(
        {**_LATENTS, "q_lora_rank": 16, "num_attention_heads": 5, "num_key_value_heads": 5},
        _latents(5, 16, "neighbours to halves"),
    ),
    "gemma4_text": Captured(
        {
            "hidden_size_per_layer_input": 0, "global_head_dim": 64, "num_global_key_value_heads": 1,
            "attention_k_eq_v": True, "sliding_window": 3, "layer_types": _MIXED, "final_logit_softcapping": 3.0,
            "intermediate_size": 48,
        },
        {
            "windows": (3, 0), "mlp_gate": GELU, "experts": ExpertKind(GELU), "shared_intermediate": 48,
            "attentions": (
                AttentionKind(4, 2, 32, 32, 32, value_norm=True), AttentionKind(4, 1, 64, 64, 64, True, True),
            ),
            "scales": Scales(8.0, rounds_embedding=True, cap=3.0),
        },
    ),
    "afmoe": Captured(
        {"sliding_window": 3, "layer_types": _MIXED, "mup_enabled": True},
        {"windows": (3, 0), "output_gate": "sigmoid", "scales": Scales(8.0), **_DENSE_FIRST},
    ),
    "kolibri1": Captured({"sliding_window": 3, "layer_types": _MIXED}, {"windows": (3, 0)}),
    "laguna": Captured(
        {"sliding_window": 3, "layer_types": _MIXED, "num_attention_heads_per_layer": [4, 8]},
        {"windows": (3, 0), "output_gate": "softplus by head"},
    ),
    "laguna, gates by element": Captured(
        {"gating": "per-element", "sliding_window": 3}, {"output_gate": "softplus"}, "laguna"
    ),
    "cohere2_moe": Captured(
        {
            "sliding_window": 3, "layer_types": _MIXED, "num_shared_experts": 1, "logit_scale": 0.25,
            "intermediate_size": 16,
        },
        {"is_parallel": True, "norm": "layer", "neighbours": True, "scales": Scales(logits=0.25, mixed=0.5)},
    ),
    "cohere2_moe by sigmoids": Captured(
        {"expert_selection_fn": "sigmoid", "rms_norm_eps": 1e-6, "intermediate_size": 16, "sliding_window": 3},
        {"is_parallel": True, "norm": "rms"}, "cohere2_moe",
    ),
    "granitemoe_swa": Captured(
        {
            **_GRANITE, "shared_intermediate_size": 16, "sliding_window": 3, "layer_types": _MIXED,
            "layer_rope_theta": [1e4, 0],
        },
        {"windows": (3, 0), "scales": Scales(3.0, 0.5, 0.25), "shared_intermediate": 16},
    ),
    "phimoe": Captured(
        {
            "hidden_size": 128, "intermediate_size": 16, "attention_bias": True, "lm_head_bias": True,
            "num_experts_per_tok": 2,
        },
        {"norm": "layer"}, takes_temperature=False,
    ),
    "flex_olmo": Captured({"intermediate_size": 16}, {"qk_norm": "row"}),
    "axk1": Captured({**_LATENTS, "q_lora_rank": 48, "n_group": 1}, _latents(4, 48, "neighbours to halves")),
    "kimi_k25": Captured({**_LATENTS, "q_lora_rank": 48}, _latents(4, 48, "neighbours to halves")),
    "qwen3_vl_moe": Captured({}, {"qk_norm": "head"}),
    "qwen3_omni_moe_thinker": Captured({}, {"qk_norm": "head"}),
    "qwen3_next in full attention": Captured(
        {"hidden_size": 128, "layer_types": ["full_attention"] * 2},
        {"output_gate": "sigmoid", "rotary": 8, "shared_intermediate": 16}, "qwen3_next", is_whole=False,
    ),
    "qwen3_next": Captured(
        {"layer_types": ["linear_attention", "full_attention"], **_DELTA}, {"stateful": {0: DeltaKind(2, 4, 16, 16, 4)}}
    ),
    "qwen3_5_moe_text": Captured(
        {
            "layer_types": ["full_attention", "linear_attention"], "linear_conv_kernel_dim": 3, **_DELTA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        {"stateful": {1: DeltaKind(2, 4, 16, 16, 3)}, "rotary": 16, "output_gate": "sigmoid"},
    ),
    "lfm2_moe": Captured(
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        {"stateful": {0: ConvolutionKind(64, 3)}, "qk_norm": "head", **_DENSE_FIRST},
    ),
    "lfm2_moe with biases": Captured(
        {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0, "conv_bias": True, "conv_L_cache": 4},
        {"stateful": {1: ConvolutionKind(64, 4)}}, "lfm2_moe",
    ),
    "granitemoehybrid": Captured(
        {**_GRANITE, "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 4, "mamba_d_state": 16},
        {"stateful": {0: MambaKind(1, 4, 16, 64, 4)}, "scales": Scales(3.0, 0.5, 0.25), "shared_intermediate": 24},
    ),
    "granitemoehybrid in groups": Captured(
        {
            **_GRANITE, "layer_types": ["full_attention", "linear_attention"], "position_embedding_type": "rope",
            "mamba_n_groups": 2, "mamba_n_heads": 8, "mamba_d_conv": 3, "mamba_proj_bias": True,
            "time_step_limit": (0.5, 1.0),
        },
        {"rotary": 32}, "granitemoehybrid",
    ),
    "kimi_linear": Captured(
        {
            "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["sparse"] * 2,
            "q_lora_rank": None, **_LATENTS, **_CHANNELS,
        },
        {
            "attentions": (
                DeltaKind(4, 4, 16, 16, 4, by_channel=True, sigmoid=True, rank=16),
                LatentKind(4, 16, 24, 32, 40, pairs="halves"),
            ),
        },
    ),
    "bailing_hybrid": Captured(
        {"layer_types": ["full_attention", "linear_attention"], **_LATENTS, **_CHANNELS},
        {
            "attentions": (
                LatentKind(4, 16, 24, 32, 40, gated=True),
                DeltaKind(4, 4, 16, 16, 4, by_channel=True, bound=-5.0, rounds=True, sigmoid=True),
            ),
            **_DENSE_FIRST,
        },
    ),
    "bailing_hybrid, decays without a bound": Captured(
        {"layer_types": ["linear_attention", "full_attention"], **_LATENTS, **_CHANNELS, "kda_safe_gate": False},
        {"stateful": {0: DeltaKind(4, 4, 16, 16, 4, by_channel=True, rounds=True, sigmoid=True)}, **_DENSE_FIRST},
        "bailing_hybrid",
    ),
    "gpt_oss": Captured(
        {"sliding_window": 3, "intermediate_size": 16},
        {"windows": (3, 0), "experts": ExpertKind(GateKind(1.702, 7.0, 1.0), True, torch.float32)},
    ),
}  # fmt: skip


EVERYDAY = (
    "qwen2_moe partly in windows", "glm4_moe in groups", "minimax_m2", "deepseek_v3", "gemma4_text",
)  # fmt: skip
"""One of each kind of router and attention, between them with every kind of norm, window, dense layer and shared
expert, and heads of other sizes by layer."""
BY_BATCH = [
    "gemma4_text", "mimo_v2_flash", "flex_olmo", "afmoe", "kolibri1", "laguna", "cohere2_moe", "granitemoe_swa",
    "phimoe", "kimi_linear", "bailing_hybrid",
]  # fmt: skip
"""Families with parts that the others do not have."""
ALONE_TOO = ["olmoe", "qwen2_moe", "glm4_moe in groups", "minimax_m2"]


_SHARING = ("granitemoe", "granitemoe_swa", "granitemoeshared", "olmoe", "phimoe", "qwen2_moe")
"""Families whose heads share the hidden size."""


def model_of(name: str) -> Any:
    """The family's tiny random model in float32."""
    wanted = CAPTURED[name]
    family = wanted.family or name
    if family in TEXT_PARTS:
        return composite_model(family, **{**SIZES, **wanted.overrides})
    if not is_installed(family):
        pytest.skip(f"this transformers has no {family}")
    overrides = {**SIZES, **wanted.overrides}
    if family in _SHARING:
        overrides.pop("head_dim")
    return random_model(family, **overrides)


def everyday(names: Iterable[str], *more: Any, quick: Container[str] = EVERYDAY) -> list[Any]:
    """Parameters of a test: each name with `more`, exhaustive unless it is one of `quick`."""
    return [pytest.param(name, *more, marks=() if name in quick else pytest.mark.exhaustive) for name in names]
