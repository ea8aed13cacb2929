"""What a module's forward may name: children, functions and settings that the captured step computes or rightly leaves.

Names and shapes of children do not tell what a forward does with them (a layer without rotation, a gate on the output),
but its code names everything that it reads. A forward that names something else is a reason to refuse the model.
Source: the forwards of the captured families in transformers 5.17 to 5.23.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any, Literal

from server.model.device.capture.refusal import need

Role = Literal["model", "rotary", "layer", "attention", "block", "mlp", "norm"]

_KNOWN: dict[Role, str] = {
    "model": "BaseModelOutputWithPast DynamicCache MoeModelOutputWithPast ValueError arange config create_causal_mask "
    "create_sliding_window_causal_mask device dict embed_tokens enumerate get_seq_length has_sliding_layers isinstance "
    "layer_types layers norm num_hidden_layers rotary_emb set shape sliding_window torch unsqueeze",
    "rotary": "attention_scaling cat cos device dtype expand float inv_freq isinstance mps cpu sin str to torch "
    "transpose type maybe_autocast shape",
    "layer": "input_layernorm mlp post_attention_layernorm self_attn",
    "attention": "ALL_ATTENTION_FUNCTIONS _attn_implementation apply_rotary_pos_emb attention_dropout clamp_ clip_qkv "
    "config contiguous eager_attention_forward get_interface getattr head_dim k_norm k_proj layer_idx o_proj q_norm "
    "q_proj reshape scaling shape sliding_window training transpose update use_qk_norm v_proj view",
    "block": "F dtype e_score_correction_bias empty_like enable_moe_fp32_combine experts float gate jitter_noise "
    "reshape router shape shared_expert shared_expert_gate shared_experts sigmoid size to torch training uniform_ view",
    "mlp": "act_fn down_proj gate_proj up_proj",
    "norm": "dtype float32 mean pow rsqrt to torch variance_epsilon weight",
}


def check_code(module: Any, role: Role, where: str) -> None:
    """Raises NotCapturableError where the module's forward names what the step does not know."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    need(isinstance(code, CodeType), f"{where}: what {type(module).__name__} computes cannot be seen")
    assert isinstance(code, CodeType)
    unknown = sorted(set(code.co_names) - set(_KNOWN[role].split()))
    need(not unknown, f"{where}: {type(module).__name__} computes with {', '.join(unknown)}, unlike the step")
