"""From a transformers model in memory to the tensors that the captured decode step reads.

Accepts decoders whose attention is standard grouped-query attention with rotary embedding over whole heads and whose
layers are all MoE with a softmax top-k router; anything else is refused with the reason, and is then run uncaptured.
Families are not named: the modules' own names, shapes and attributes decide, and a module that is not known here is a
reason to refuse. What modules cannot tell is found by comparing a few steps (`server.model.device.trial`). Projections
are packed once (q, k, v rows in one matrix).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from server.model.device.weights import DecodeShape, LayerWeights, TrunkWeights, rotary_tables

MOST_ROWS = 32
"""The largest batch that the kernels have been run with."""


class NotCapturableError(Exception):
    """The model needs something that the captured decode step does not do; the message says what."""


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise NotCapturableError(reason)


def _linear_bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return bias if isinstance(bias, Tensor) else None


_BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb")
_BLOCK = ("experts", "gate")
_SCALES = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
    "final_logit_softcapping", "attn_logit_softcapping", "router_logit_softcapping", "routed_scaling_factor",
    "clip_qkv",
)  # fmt: skip
"""Keys of configs that multiply or bound something on the way, which the step does not do."""


def _only(module: nn.Module, known: tuple[str, ...], where: str) -> None:
    """Every child of the module is one that the step computes."""
    names = [name for name, child in module.named_children() if not isinstance(child, nn.Dropout)]
    unknown = [name for name in names if name not in known]
    _need(not unknown, f"{where} has {', '.join(unknown)}, which the captured step does not compute")


def _check_layer(layer: Any, index: int, head_dim: int, eps: float) -> None:
    where = f"layer {index}"
    _only(layer, _LAYER, where)
    attention: Any = getattr(layer, "self_attn", None)
    block: Any = getattr(layer, "mlp", None)
    _need(attention is not None and block is not None, f"{where}: has no attention and experts of its own")
    _need(hasattr(block, "experts") and hasattr(block, "gate"), f"{where}: is not a plain MoE layer")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _need(isinstance(getattr(attention, name, None), nn.Linear), f"{where}: attention has no linear {name}")
    _only(attention, _ATTENTION, f"{where}: attention")
    _only(block, _BLOCK, where)
    _need(getattr(attention, "sliding_window", None) is None, f"{where}: attention has a sliding window")
    _need(not hasattr(attention, "sinks"), f"{where}: attention has sinks")
    _need(
        tuple(block.gate.weight.shape)[1] == attention.q_proj.in_features,
        f"{where}: gate does not read the hidden state",
    )
    plain = not hasattr(block.gate, "e_score_correction_bias") and not any(True for _ in block.gate.children())
    _need(plain and getattr(block.gate, "bias", None) is None, f"{where}: the router is not a plain softmax top-k")
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name, None)
        if norm is not None:
            _need(tuple(norm.weight.shape) == (head_dim,), f"{where}: {name} is not per head")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _check_norm(norm, eps, where)


def _check_norm(norm: Any, eps: float, where: str) -> None:
    _need(
        getattr(norm, "bias", None) is None and getattr(norm, "variance_epsilon", eps) == eps,
        f"{where}: {type(norm).__name__} is no root-mean-square norm with the config's epsilon",
    )


def decode_shape(model: Any, *, intermediate: int, max_rows: int, max_tokens: int) -> DecodeShape:
    """The step's sizes for a transformers `*ForCausalLM`; `intermediate` is I of its experts.

    Raises NotCapturableError where the model needs more than the step does.
    """
    _need(max_rows <= MOST_ROWS, f"batches of {max_rows} rows: wanted at most {MOST_ROWS}, by max_batch_size")
    try:
        return _shape(model, intermediate, max_rows, max_tokens)
    except AttributeError as error:  # a config or module that is named otherwise, or not there
        raise NotCapturableError(f"the model is built otherwise: {error}") from error


def _shape(model: Any, intermediate: int, max_rows: int, max_tokens: int) -> DecodeShape:
    config, body = model.config, model.model
    layers = list(body.layers)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope = getattr(config, "rope_parameters", None) or {}
    _need(
        rope.get("rope_type", "default") in ("default", "linear"),
        f"rotary type {rope.get('rope_type')!r} varies with length",
    )
    _need(float(rope.get("partial_rotary_factor", 1.0)) == 1.0, "rotary embedding covers only a part of each head")
    _need(getattr(config, "hidden_act", "silu") == "silu", f"activation {config.hidden_act!r} is not silu")
    _need(hasattr(body.rotary_emb, "inv_freq"), "rotary embedding differs between layers")
    scales = [name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    _need(not scales, f"the model's {', '.join(scales)} is not part of the captured step")
    _need(hasattr(config, "rms_norm_eps"), "the norms are not root-mean-square norms")
    _only(body, _BODY, "the model")
    for index, layer in enumerate(layers):
        _check_layer(layer, index, head_dim, float(config.rms_norm_eps))
    _need(
        head_dim & (head_dim - 1) == 0 and head_dim >= 32,
        f"heads of {head_dim} elements: wanted a power of two from 32",
    )
    first = layers[0]
    return DecodeShape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=model.lm_head.weight.shape[0],
        num_experts=first.mlp.gate.weight.shape[0],
        top_k=config.num_experts_per_tok,
        intermediate=intermediate,
        max_rows=max_rows,
        max_tokens=max_tokens,
        eps=float(config.rms_norm_eps),
        scaling=float(first.self_attn.scaling),
        head_norm=getattr(first.self_attn, "q_norm", None) is not None,
        renormalise=bool(getattr(config, "norm_topk_prob", True)),
        dtype=model.lm_head.weight.dtype,
    )


@torch.no_grad()
def pack_trunk(model: Any, shape: DecodeShape) -> TrunkWeights:
    """Trunk tensors of a model that `decode_shape` accepted, on the model's device. Packed copies are new memory; the
    rest are the model's own tensors."""
    layers = []
    for layer in model.model.layers:
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [_linear_bias(part) for part in parts]
        norm = getattr(attention, "q_norm", None)
        layers.append(
            LayerWeights(
                input_norm=layer.input_layernorm.weight,
                qkv=torch.cat([part.weight for part in parts]),
                q_norm=layer.input_layernorm.weight if norm is None else attention.q_norm.weight,
                k_norm=layer.input_layernorm.weight if norm is None else attention.k_norm.weight,
                output=attention.o_proj.weight,
                post_norm=layer.post_attention_layernorm.weight,
                gate=layer.mlp.gate.weight,
                qkv_bias=None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None]),
                output_bias=_linear_bias(attention.o_proj),
            )
        )
    rotary = model.model.rotary_emb
    cos, sin = rotary_tables(rotary.inv_freq, shape.max_tokens, shape.dtype, float(rotary.attention_scaling))
    return TrunkWeights(
        embedding=model.model.embed_tokens.weight,
        layers=tuple(layers),
        norm=model.model.norm.weight,
        head=model.lm_head.weight,
        cos=cos,
        sin=sin,
    )
