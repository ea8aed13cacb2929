"""From a transformers model in memory to the shape and the tensors of the captured decode step.

Accepts decoders of grouped-query attention and gated products whose routers the kernel computes; anything else is
refused with the reason, and is then run uncaptured. Families are not named: the modules' own names, shapes and
attributes decide, gating rules come from `router.gating`, and a module that is not known here is a reason to refuse.
What modules cannot tell is found by comparing a few steps (`running.trial`). Projections are packed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.model.device.capture.known_code import check_code
from server.model.device.capture.pack_attention import check_attention, qk_norm, rotary_elements
from server.model.device.capture.refusal import NotCapturableError, need
from server.model.device.step.router_kind import RouterKind, RouterRefusedError, router_kind, selection_bias
from server.model.device.step.tuning import divisor
from server.model.device.step.weights import DecodeShape, LayerWeights, MlpWeights, TrunkWeights, rotary_tables
from server.model.seam.attention_mask import layer_windows

MOST_ROWS = 32
"""The largest batch that the kernels have been run with."""

_BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
_SHARED = ("shared_expert", "shared_experts")
_BLOCK = ("experts", "gate", "router", "shared_expert_gate", *_SHARED)
_SCALES = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale",
    "final_logit_softcapping", "attn_logit_softcapping", "router_logit_softcapping", "clip_qkv",
)  # fmt: skip
"""Keys of configs that multiply or bound something on the way, which the step does not do."""


def moe_blocks(model: Any) -> list[tuple[int, Any, Any]]:
    """(layer of the model, its MoE block, the router in it), first layer first."""
    found = []
    for index, layer in enumerate(model.model.layers):
        block = getattr(layer, "mlp", None)
        if hasattr(block, "experts"):
            router = getattr(block, "gate", None)
            found.append((index, block, router if isinstance(router, nn.Module) else getattr(block, "router", None)))
    return found


def decode_shape(model: Any, *, intermediate: int, max_rows: int, max_tokens: int) -> DecodeShape:
    """The step's sizes for a transformers `*ForCausalLM`; `intermediate` is I of its experts.

    Raises NotCapturableError where the model needs more than the step does.
    """
    need(max_rows <= MOST_ROWS, f"batches of {max_rows} rows: wanted at most {MOST_ROWS}, by max_batch_size")
    try:
        return _shape(model, intermediate, max_rows, max_tokens)
    except NotCapturableError:
        raise
    except Exception as error:  # a config or module that is named otherwise, or not there
        raise NotCapturableError(f"the model is built otherwise: {error}") from error


def _shape(model: Any, intermediate: int, max_rows: int, max_tokens: int) -> DecodeShape:
    config, body = model.config, model.model
    layers, blocks = list(body.layers), moe_blocks(model)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    need(getattr(config, "hidden_act", "silu") == "silu", f"activation {config.hidden_act!r} is not silu")
    scales = [name for name in _SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    need(not scales, f"the model's {', '.join(scales)} is not part of the captured step")
    need(hasattr(config, "rms_norm_eps"), "the norms are not root-mean-square norms")
    need(bool(blocks), "no layer has routed experts")
    eps = float(config.rms_norm_eps)
    _only(body, _BODY, "the model")
    check_code(body, "model", "the model")
    for index, layer in enumerate(layers):
        where = f"layer {index}"
        _only(layer, _LAYER, where)
        check_code(layer, "layer", where)
        check_attention(layer.self_attn, config, head_dim, eps, where)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _check_norm(norm, eps, where)
    dense = {index: layer.mlp for index, layer in enumerate(layers)}
    kinds = set()
    for index, block, router in blocks:
        dense.pop(index)
        kinds.add(_check_block(model, block, router, f"layer {index}"))
    need(len(kinds) == 1, "routers or shared experts differ between layers")
    kind, top_k, num_experts, shared = kinds.pop()
    inner = {_mlp_size(mlp, f"layer {index}") for index, mlp in dense.items()}
    need(len(inner) <= 1, "layers without routed experts differ in size")
    shape = DecodeShape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=model.lm_head.weight.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        intermediate=intermediate,
        max_rows=max_rows,
        max_tokens=max_tokens,
        eps=eps,
        scaling=float(layers[0].self_attn.scaling),
        qk_norm=qk_norm(layers[0].self_attn, head_dim),
        rotary=rotary_elements(body, layers[0].self_attn, config, head_dim),
        windows=layer_windows(config, len(layers)),
        dense_layers=frozenset(dense),
        dense_intermediate=inner.pop() if inner else 0,
        shared_intermediate=shared,
        router=kind,
        dtype=model.lm_head.weight.dtype,
    )
    sizes = (shape.hidden, intermediate, shape.dense_intermediate or 16, shared or 16)
    need(max_rows == 1 or min(divisor(size, 16) for size in sizes) == 16, f"sizes {sizes} are no multiples of 16")
    return shape


def _check_block(model: Any, block: Any, router: Any, where: str) -> tuple[RouterKind, int, int, int]:
    """The router's kind, top-k, number of experts and the shared expert's size of one MoE block."""
    need(isinstance(router, nn.Module), f"{where}: is not a plain MoE layer")
    _only(block, _BLOCK, where)
    check_code(block, "block", where)
    try:
        kind = router_kind(model.config.model_type, router, block)
    except RouterRefusedError as error:
        raise NotCapturableError(f"{where}: {error}") from error
    need(not any(True for _ in router.children()), f"{where}: the router is not one product")
    _check_experts(block.experts, where)
    num_experts, width = router.weight.shape
    need(width == model.config.hidden_size, f"{where}: gate does not read the hidden state")
    shared = [getattr(block, name) for name in _SHARED if getattr(block, name, None) is not None]
    need(len(shared) <= 1, f"{where}: has several shared experts")
    switch = getattr(block, "shared_expert_gate", None)
    need(
        switch is None or (isinstance(switch, nn.Linear) and switch.out_features == 1 and switch.bias is None),
        f"{where}: the shared expert's gate is not one plain product",
    )
    top_k = getattr(router, "top_k", None) or model.config.num_experts_per_tok
    return kind, int(top_k), int(num_experts), _mlp_size(shared[0], where) if shared else 0


def _check_experts(experts: Any, where: str) -> None:
    """Experts are gate and up, [2I, H] together, silu, and down [H, I]."""
    plain = experts.is_concatenated and not experts.is_transposed and experts.has_gate and not experts.has_bias
    need(bool(plain), f"{where}: experts' weights are not gate_up [2I, H] and down [H, I] alone")
    gate = getattr(type(experts), "_apply_gate", None)
    need(getattr(gate, "__name__", "") == "_default_apply_gate", f"{where}: experts have a gate of their own")
    act = getattr(experts, "act_fn", None)
    need(act is None or "silu" in type(act).__name__.lower(), f"{where}: activation {act} is not silu")


def _mlp_size(mlp: Any, where: str) -> int:
    """I of a gated product that every token passes."""
    _only(mlp, _MLP, where)
    check_code(mlp, "mlp", where)
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    plain = all(isinstance(part, nn.Linear) and part.bias is None for part in parts)
    need(plain, f"{where}: {type(mlp).__name__} is no plain gated product")
    act = getattr(mlp, "act_fn", None)
    need(act is None or "silu" in type(act).__name__.lower(), f"{where}: activation {act} is not silu")
    return int(mlp.up_proj.out_features)


def _only(module: nn.Module, known: Sequence[str], where: str) -> None:
    """Every child of the module is one that the step computes."""
    names = [name for name, child in module.named_children() if not isinstance(child, nn.Dropout)]
    unknown = [name for name in names if name not in known]
    need(not unknown, f"{where} has {', '.join(unknown)}, which the captured step does not compute")


def _check_norm(norm: Any, eps: float, where: str) -> None:
    need(
        getattr(norm, "bias", None) is None and getattr(norm, "variance_epsilon", eps) == eps,
        f"{where}: {type(norm).__name__} is no root-mean-square norm with the config's epsilon",
    )
    check_code(norm, "norm", where)


@torch.no_grad()
def pack_trunk(model: Any, shape: DecodeShape) -> TrunkWeights:
    """Trunk tensors of a model that `decode_shape` accepted, on the model's device. Packed copies are new memory; the
    rest are the model's own tensors."""
    blocks = {index: (block, router) for index, block, router in moe_blocks(model)}
    layers = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [_linear_bias(part) for part in parts]
        norm = layer.input_layernorm.weight
        block, router = blocks.get(index, (None, None))
        gate_bias = None if router is None else _linear_bias(router)
        layers.append(
            LayerWeights(
                input_norm=norm,
                qkv=torch.cat([part.weight for part in parts]),
                q_norm=norm if shape.qk_norm == "none" else attention.q_norm.weight,
                k_norm=norm if shape.qk_norm == "none" else attention.k_norm.weight,
                output=attention.o_proj.weight,
                post_norm=layer.post_attention_layernorm.weight,
                gate=None if router is None else router.weight,
                qkv_bias=None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None]),
                output_bias=_linear_bias(attention.o_proj),
                gate_bias=None if gate_bias is None else gate_bias.float(),
                selection_bias=None if router is None else selection_bias(shape.router, router, block),
                mlp=_mlp_weights(layer.mlp if block is None else block, shape, block is not None),
            )
        )
    rotary = model.model.rotary_emb
    scaling = float(rotary.attention_scaling)
    cos, sin = rotary_tables(rotary.inv_freq, shape.max_tokens, shape.dtype, scaling, shape.head_dim // 2)
    return TrunkWeights(
        embedding=model.model.embed_tokens.weight,
        layers=tuple(layers),
        norm=model.model.norm.weight,
        head=model.lm_head.weight,
        cos=cos,
        sin=sin,
    )


def _mlp_weights(owner: Any, shape: DecodeShape, is_block: bool) -> MlpWeights | None:
    """Of a dense layer's product, or of the shared expert in a MoE block; None where it has none."""
    if is_block and not shape.shared_intermediate:
        return None
    mlp = owner
    if is_block:
        mlp = next(getattr(owner, name) for name in _SHARED if getattr(owner, name, None) is not None)
    switch = getattr(owner, "shared_expert_gate", None)
    return MlpWeights(
        up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
        switch=None if switch is None else switch.weight.view(-1),
    )


def _linear_bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return bias if isinstance(bias, Tensor) else None
