"""Packs a transformers model in memory into the shape and the tensors of the captured decode step.

Accepts decoders with grouped-query attention and gated products whose routers the kernel computes. The names and shapes
of modules decide, not the family's name; gating rules come from `router.gating`. Invariant: a model with an unknown
module is refused. Names do not describe everything that a forward computes, so `capture.proof` compares the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from server.model.device.capture import NotCapturableError, need
from server.model.device.step.router_kind import RouterKind, RouterRefusedError, router_kind, selection_bias
from server.model.device.step.weights import DecodeShape, LayerWeights, MlpWeights, TrunkWeights, rotary_tables
from server.model.seam.attention_mask import layer_windows

MOST_ROWS = 32
"""The largest batch with which the kernels were tested."""

_MODEL = ("model", "lm_head")
_BODY = ("embed_tokens", "layers", "norm", "rotary_emb")
_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SHARED = ("shared_expert", "shared_experts")
_BLOCK = ("gate", "router", "shared_expert_gate", *_SHARED)
_SETTINGS = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "rms_norm_eps", "model_type"
)  # fmt: skip


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

    Raises NotCapturableError for a model with another structure.
    """
    need(max_rows <= MOST_ROWS, f"batches of {max_rows} rows: wanted at most {MOST_ROWS}, by max_batch_size")
    config = model.config
    absent = [name for name in _SETTINGS if getattr(config, name, None) is None]
    need(not absent, f"the model's config has no {', '.join(absent)}")
    _children(model, "the model", _MODEL)
    body = model.model
    _children(body, "the model", _BODY)
    layers = list(body.layers)
    for index, layer in enumerate(layers):
        _children(layer, f"layer {index}", _LAYER)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    norms = {_attention_norms(layer.self_attn, config, head_dim, f"layer {at}") for at, layer in enumerate(layers)}
    need(len(norms) == 1, "norms of queries and keys differ between layers")
    dense = {index: layer.mlp for index, layer in enumerate(layers)}
    blocks = [(dense.pop(index), router, f"layer {index}") for index, _, router in moe_blocks(model)]
    kinds = {_block_kind(config, block, router, where) for block, router, where in blocks}
    need(bool(kinds), "no layer has routed experts")
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
        eps=float(config.rms_norm_eps),
        scaling=float(getattr(layers[0].self_attn, "scaling", head_dim**-0.5)),
        qk_norm=norms.pop(),
        rotary=_rotary_elements(body.rotary_emb, head_dim),
        windows=layer_windows(config, len(layers)),
        dense_layers=frozenset(dense),
        dense_intermediate=inner.pop() if inner else 0,
        shared_intermediate=shared,
        router=kind,
        dtype=model.lm_head.weight.dtype,
    )
    sizes = (shape.hidden, intermediate)
    need(all(size % 16 == 0 for size in sizes), f"experts of {sizes} elements: wanted multiples of 16")
    return shape


def _children(module: Any, where: str, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises NotCapturableError unless the module has every needed child and no unknown one."""
    absent = [name for name in needed if getattr(module, name, None) is None]
    need(not absent, f"{where} has no {', '.join(absent)}")
    no_weights = (name for name, child in module.named_children() if next(child.parameters(), None) is None)
    known = {*needed, *optional, *no_weights}
    unknown = [name for name, _ in module.named_children() if name not in known]
    need(not unknown, f"{where} has {', '.join(unknown)}, which the captured step does not compute")


def _attention_norms(attention: Any, config: Any, head_dim: int, where: str) -> Literal["none", "head", "row"]:
    """The kind of a layer's norms of queries and keys; refuses attention without grouped queries."""
    where = f"{where}: attention"
    _children(attention, where, _PROJECTIONS, _NORMS)
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    need(all(isinstance(one, nn.Linear) for one in projections), f"{where} projects otherwise than by plain products")
    heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = [one.out_features for one in projections]
    wanted = [heads, kv_heads, kv_heads, config.hidden_size]
    need(sizes == wanted and projections[3].in_features == heads, f"{where} projects to {sizes}, wanted {wanted}")
    need(len({one.bias is None for one in projections[:3]}) == 1, f"{where}: only some of q, k and v have biases")
    kinds: set[Literal["none", "head", "row"]] = set()
    for name, projection in zip(_NORMS, projections, strict=False):
        norm = getattr(attention, name, None)
        size = None if norm is None else norm.weight.shape.numel()
        need(size in (None, head_dim, projection.out_features), f"{where}: {name} is over {size} elements")
        kinds.add("none" if size is None else "head" if size == head_dim else "row")
    need(len(kinds) == 1, f"{where} normalises queries and keys differently")
    return kinds.pop()


def _rotary_elements(rotary: Any, head_dim: int) -> int:
    """The number of rotated elements of a head; they are its first ones."""
    need(
        head_dim & (head_dim - 1) == 0 and head_dim >= 32,
        f"heads of {head_dim} elements: wanted a power of two from 32",
    )
    need(hasattr(rotary, "inv_freq"), "rotary embedding differs between layers")
    elements = 2 * int(rotary.inv_freq.shape[0])
    need(elements <= head_dim and elements % 4 == 0, f"{elements} of {head_dim} elements of a head are rotated")
    return elements


def _block_kind(config: Any, block: Any, router: Any, where: str) -> tuple[RouterKind, int, int, int]:
    """The router's kind, top-k, number of experts and the shared expert's size of one MoE block."""
    need(isinstance(router, nn.Module), f"{where}: is not a plain MoE layer")
    _children(block, where, (), ("experts", *_BLOCK))
    try:
        kind = router_kind(config.model_type, router, block)
    except RouterRefusedError as error:
        raise NotCapturableError(f"{where}: {error}") from error
    need(not any(True for _ in router.children()), f"{where}: the router is not one product")
    num_experts, width = router.weight.shape
    need(width == config.hidden_size, f"{where}: gate does not read the hidden state")
    experts = block.experts
    plain = experts.is_concatenated and not experts.is_transposed and experts.has_gate and not experts.has_bias
    need(bool(plain), f"{where}: experts' weights are not gate_up [2I, H] and down [H, I] alone")
    shared = [getattr(block, name) for name in _SHARED if getattr(block, name, None) is not None]
    need(len(shared) <= 1, f"{where}: has several shared experts")
    switch = getattr(block, "shared_expert_gate", None)
    need(
        switch is None or (isinstance(switch, nn.Linear) and switch.out_features == 1 and switch.bias is None),
        f"{where}: the shared expert's gate is not one plain product",
    )
    top_k = getattr(router, "top_k", None) or config.num_experts_per_tok
    return kind, int(top_k), int(num_experts), _mlp_size(shared[0], where) if shared else 0


def _mlp_size(mlp: Any, where: str) -> int:
    """I of a gated product that every token uses."""
    where = f"{where}: {type(mlp).__name__}"
    _children(mlp, where, _MLP)
    parts = [getattr(mlp, name) for name in _MLP]
    need(all(isinstance(part, nn.Linear) and part.bias is None for part in parts), f"{where} is no plain gated product")
    return int(mlp.up_proj.out_features)


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
    cos, sin = rotary_tables_of(model, shape)
    return TrunkWeights(
        embedding=model.model.embed_tokens.weight,
        layers=tuple(layers),
        norm=model.model.norm.weight,
        head=model.lm_head.weight,
        cos=cos,
        sin=sin,
    )


def rotary_tables_of(model: Any, shape: DecodeShape) -> tuple[Tensor, Tensor]:
    """cos and sin [max_tokens, head_dim / 2] of the model's rotary embedding: see `rotary_tables`."""
    rotary = model.model.rotary_emb
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    return rotary_tables(rotary.inv_freq, shape.max_tokens, shape.dtype, scaling, shape.head_dim // 2)


def _mlp_weights(owner: Any, shape: DecodeShape, is_block: bool) -> MlpWeights | None:
    """The gated product of a dense layer, or the shared expert of a MoE block; None if it has none."""
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
