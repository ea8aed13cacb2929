"""Finds the modules of a transformers model by their roles: decoder, layers, attention, routers, experts.

A role has a few names among all families. Invariant: a module or a tensor without a role is a refusal, so nothing that
holds weights is left out of a step; `capture.proof` finds what a forward computes without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from server.model.device.capture import need

_MODEL = ("model", "lm_head")
TOWERS = ("visual", "vision_tower", "audio_tower", "multi_modal_projector", "mm_projector")
"""Modules for images and sound, which no text goes through."""
_EMBEDDING, _LAST_NORM = ("embed_tokens", "embeddings"), ("norm", "embedding_norm", "norm_f")
_ROTARY = ("rotary_emb", "pos_emb")
_MIXERS = ("self_attn", "linear_attn", "conv", "mamba")
_ALONE = "mixer"
"""A layer's only part, as Nemotron-H has it."""
_NORMS_BEFORE = (("input_layernorm", "operator_norm"), ("post_attention_layernorm", "ffn_norm"))
_BEFORE = ("pre_mlp_layernorm", "pre_feedforward_layernorm")
_AFTER = ("post_mlp_layernorm", "post_feedforward_layernorm")
_APART = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm_1")
"""Norms before the routed experts, after them, and after the product beside them."""
_AROUND = (*_NORMS_BEFORE[0], *_NORMS_BEFORE[1], "post_self_attn_layernorm", *_BEFORE, *_AFTER, *_APART)
_BLOCK = ("mlp", "block_sparse_moe", "feed_forward")
_ROUTER = ("gate", "router")
_BIASES = ("expert_bias", "e_score_correction_bias")
"""A block's parameters that it hands to its router."""
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
_OUTPUT = ("o_proj", "out_proj")
_LATENT = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
_QUERIES = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj")
_GATES = ("gate_proj", "g_proj")
_NORMS = (("q_norm", "query_layernorm", "q_layernorm"), ("k_norm", "key_layernorm", "k_layernorm"))
_DELTA_TENSORS = ("conv1d", "A_log", "dt_bias", "norm")
_DELTA_PRODUCTS = (("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"))
_FORGET = "forget_gate"
"""The module of a delta net's decays, where it has one."""
_FORGET_PRODUCTS = {"f_proj": ("g_proj",), "f_a_proj": ("g_a_proj", "g_b_proj")}
"""The products of the norm's gate by the decays' first product: one, or one to a latent and one of it."""
_MAMBA_TENSORS = ("conv1d", "A_log", "dt_bias", "D", "norm")
_MLP = (("gate_proj", "up_proj"), ("gate_up_proj",), ("input_linear",), ("w1", "w3"))
_DOWN = ("down_proj", "output_linear", "w2")


@dataclass(frozen=True)
class Mlp:
    """A gated product that every token uses: the module; products whose rows side by side are [2I, H], gate first;
    down; the product that a sigmoid makes a factor of the result; and norms of its own, before and after."""

    module: nn.Module
    ups: tuple[nn.Linear, ...]
    down: nn.Linear
    switch: nn.Linear | None = None
    norm: nn.Module | None = None
    after: nn.Module | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: q, k, v, o, where v is None if values are what k gives; norms of queries and keys; the
    norm of values; the product for output gates, if it is one of its own; sinks [heads]; the module itself."""

    projections: tuple[nn.Linear, nn.Linear, nn.Linear | None, nn.Linear]
    norms: tuple[nn.Module, nn.Module] | None
    value_norm: nn.Module | None
    gate: nn.Linear | None
    sinks: Tensor | None
    module: Any


@dataclass(frozen=True)
class LatentAttention:
    """Latent attention (MLA): products of queries or of their latent, of the latent with the shared key, and of the
    output; norms of both latents, the second one in place of a missing first; the product that expands a latent to keys
    and values, and that of the queries' latent, if they have one; the product for output gates, if it has them; the
    module itself."""

    projections: tuple[nn.Linear, nn.Linear, nn.Linear]
    norms: tuple[nn.Module, nn.Module]
    expand: nn.Linear
    queries: nn.Linear | None
    gate: nn.Linear | None
    module: Any


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net: the products of its input, of which there are two, with rows by key heads, or one for each
    part of `DeltaKind.qkv` in its order, and that of the output; the convolution, A and its bias, the gated norm; the
    module itself, which has the sizes; the module that makes decays of products, if it has one, and then the products
    of the latents of the norm's gate and of the decays, if there are latents."""

    projections: tuple[nn.Linear, ...]
    conv: nn.Conv1d
    decay: Tensor
    shift: Tensor
    norm: nn.Module
    module: Any
    forget: Any = None
    expands: tuple[nn.Linear, ...] = ()


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 layer: the products of its input, whose rows are the norm's gate, x, B, C and dt, and of the output;
    the convolution over x, B and C; A, the bias of dt, D, the gated norm; the module itself, which has the sizes."""

    projections: tuple[nn.Linear, nn.Linear]
    conv: nn.Conv1d
    decay: Tensor
    shift: Tensor
    skip: Tensor
    norm: nn.Module
    module: Any


@dataclass(frozen=True)
class ShortConvolution:
    """A convolution between two gates: the products of its input, whose rows are the input's gate, the result's gate
    and the input, and of the output; the convolution, and the module itself."""

    projections: tuple[nn.Linear, nn.Linear]
    conv: nn.Conv1d
    module: Any


StateNet = DeltaNet | Mamba | ShortConvolution


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `block`, `router` and `experts` are None without routed experts; `mlp` is then the layer's own
    product, else its shared expert. Norms before attention and before the others; after attention, after the others,
    and after the routed experts alone; a factor [1] of the result. `is_parallel`: the others read what attention reads.
    """

    where: str
    input_norm: nn.Module | None
    attention: Attention | LatentAttention | StateNet
    post_norm: nn.Module | None
    mlp: Mlp | None
    block: Any = None
    router: Any = None
    experts: Any = None
    attention_norm: nn.Module | None = None
    branch_norm: nn.Module | None = None
    routed_norm: nn.Module | None = None
    factor: Tensor | None = None
    is_parallel: bool = False


def text_body(model: Any) -> Any:
    """The decoder of a model; of one with towers, that of its text part; None if it is found nowhere."""
    body = getattr(model, "model", None)
    return getattr(body, "language_model", body)


def embedding_of(model: Any) -> Any:
    """The table of the tokens' embeddings."""
    return _first(text_body(model), _EMBEDDING)


def last_norm(model: Any) -> Any:
    """The norm before the head."""
    return _first(text_body(model), _LAST_NORM)


def rotary_name(model: Any) -> str:
    """The name of the body's rotary embedding; empty: it has none."""
    return next((name for name in _ROTARY if getattr(text_body(model), name, None) is not None), "")


def rotary_embedding(model: Any) -> Any:
    """The rotary embedding of all layers; None if there is none."""
    return getattr(text_body(model), rotary_name(model), None)


def mixer_name(layer: Any) -> str:
    """The name of a layer's attention, or of what stands in its place."""
    return next((name for name in _MIXERS if isinstance(getattr(layer, name, None), nn.Module)), _MIXERS[0])


def attention_of(layer: Any) -> Any:
    """A layer's attention; None if it has none."""
    mixer = getattr(layer, mixer_name(layer), None)
    is_one = any(hasattr(mixer, name) for name in ("k_proj", "kv_b_proj")) and not hasattr(mixer, _FORGET)
    return mixer if is_one else None


def moe_blocks(model: Any) -> list[tuple[int, Any, Any]]:
    """(layer of the model, its MoE block, the router in it), first layer first."""
    found = []
    for index, layer in enumerate(getattr(text_body(model), "layers", ())):
        block = layer if hasattr(layer, "experts") else _first(layer, _BLOCK)
        if hasattr(block, "experts"):
            found.append((index, block, _first(block, _ROUTER)))
    return found


def layers_of(model: Any) -> list[Layer]:
    """The layers of a `*ForCausalLM`, or of a model around a text part. Raises NotCapturableError for others."""
    check_children(model, "the model", _MODEL, TOWERS)
    body = text_body(model)
    if body is not model.model:
        check_children(model.model, "the model", ("language_model",), TOWERS)
    check_children(body, "the model", ("layers",), (*_EMBEDDING, *_LAST_NORM, *_ROTARY))
    for names in (_EMBEDDING, _LAST_NORM):
        need(_first(body, names) is not None, f"the model has no {' or '.join(names)}")
    blocks = {index: (block, router) for index, block, router in moe_blocks(model)}
    return [_layer(layer, f"layer {at}", *blocks.get(at, (None, None))) for at, layer in enumerate(body.layers)]


def check_children(module: Any, where: str, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises NotCapturableError unless the module has every needed child, and no unknown one and no unknown tensor."""
    absent = [name for name in needed if getattr(module, name, None) is None]
    need(not absent, f"{where} has no {', '.join(absent)}")
    known = {*needed, *optional}
    held = [name for name, child in module.named_children() if next(child.parameters(), None) is not None]
    held += [name for name, _ in module.named_parameters(recurse=False)]
    unknown = [name for name in held if name not in known]
    need(not unknown, f"{where} has {', '.join(unknown)}, which the captured step does not compute")


def _first(owner: Any, names: Sequence[str]) -> Any:
    """The first of the named children that the owner has; None if it has none."""
    found = (getattr(owner, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def _layer(layer: Any, where: str, block: Any, router: Any) -> Layer:
    alone = getattr(layer, _ALONE, None)
    need(
        alone is None,
        f"{where} has one part, {type(alone).__name__}, and the captured step wants two: attention, or what stands in "
        "its place, and experts or a product",
    )
    beside = ("experts", *_ROUTER) if block is layer else ()
    name = mixer_name(layer)
    check_children(layer, where, (name,), (*_AROUND, *_BLOCK, *_SHARED, *beside))
    attention = _mixer(getattr(layer, name), where)
    mlp, norms = _first(layer, _BLOCK), _norms(layer)
    if block is None:
        need(mlp is not None, f"{where} has no {' or '.join(_BLOCK)}")
        return Layer(where, attention=attention, mlp=_mlp(mlp, where), **norms)
    if block is not layer:
        check_children(block, where, (), ("experts", "shared_expert_gate", *_BIASES, *_ROUTER, *_SHARED, *_AFTER))
        norms["branch_norm"] = norms["branch_norm"] or _first(block, _AFTER)
    need(router is not None, f"{where}: is not a plain MoE layer")
    owners = (layer,) if block is layer else (layer, block)
    names = (*_SHARED, *(_BLOCK if block is layer else ()))
    shared = [found for owner in owners for name in names if isinstance(found := getattr(owner, name, None), nn.Module)]
    need(len(shared) <= 1, f"{where}: has several shared experts")
    switch = getattr(block, "shared_expert_gate", None)
    need(
        switch is None or (isinstance(switch, nn.Linear) and switch.out_features == 1 and switch.bias is None),
        f"{where}: the shared expert's gate is not one plain product",
    )
    used = _mlp(shared[0], where, switch) if shared else None
    before, after, mlp_after = (_first(layer, (name,)) for name in _APART)
    if before is not None:
        need(used is not None, f"{where} has norms of a product beside its experts, and no such product")
        assert used is not None
        used, norms["post_norm"] = replace(used, norm=norms["post_norm"], after=mlp_after), before
    return Layer(
        where, attention=attention, mlp=used, block=block, router=router, experts=block.experts, routed_norm=after,
        **norms,
    )  # fmt: skip


def _norms(layer: Any) -> dict[str, Any]:
    """The norms around attention and around what follows it, and the factor of the result. The norm that is called one
    after attention is one before the others, unless there is another before them, or none before attention."""
    first, second = (_first(layer, names) for names in _NORMS_BEFORE)
    before, own = _first(layer, _BEFORE), getattr(layer, "post_self_attn_layernorm", None)
    if own is None and (before is not None or first is None):
        own, second = second, before
    is_parallel = own is None and second is None
    return {
        "is_parallel": is_parallel,
        "input_norm": first,
        "attention_norm": own,
        "post_norm": first if is_parallel else second,
        "branch_norm": _first(layer, _AFTER),
        "factor": getattr(layer, "layer_scalar", None),
    }


def _mixer(mixer: Any, where: str) -> Attention | LatentAttention | StateNet:
    if hasattr(mixer, "A_log") or hasattr(mixer, _FORGET):
        return _mamba(mixer, where) if hasattr(mixer, "D") else _delta_net(mixer, where)
    return _short_convolution(mixer, where) if hasattr(mixer, "conv") else _attention(mixer, where)


def _attention(attention: Any, where: str) -> Attention | LatentAttention:
    where = f"{where}: attention"
    if hasattr(attention, "kv_b_proj"):
        return _latent_attention(attention, where)
    output = next((name for name in _OUTPUT if hasattr(attention, name)), _OUTPUT[0])
    needed = ("q_proj", "k_proj", output)
    check_children(attention, where, needed, ("v_proj", *_GATES, *_NORMS[0], *_NORMS[1], "sinks"))
    q, k, o = (getattr(attention, name) for name in needed)
    v = getattr(attention, "v_proj", None)
    need(
        all(isinstance(one, nn.Linear) for one in (q, k, v or k, o)),
        f"{where} projects otherwise than by plain products",
    )
    need(len({one.bias is None for one in (q, k, v or k)}) == 1, f"{where}: only some of q, k and v have biases")
    q_norm, k_norm = (_first(attention, names) for names in _NORMS)
    need((q_norm is None) == (k_norm is None), f"{where} normalises queries and keys differently")
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    value_norm, gate = getattr(attention, "v_norm", None), _first(attention, _GATES)
    need(
        gate is None or (isinstance(gate, nn.Linear) and (gate.bias is None) == (q.bias is None)),
        f"{where} has an output gate that is no product like that of queries",
    )
    return Attention((q, k, v, o), norms, value_norm, gate, getattr(attention, "sinks", None), attention)


def _latent_attention(attention: Any, where: str) -> LatentAttention:
    check_children(attention, where, _LATENT, (*_QUERIES, "g_proj"))
    down, norm, expand, output = (getattr(attention, name) for name in _LATENT)
    queries = [getattr(attention, name, None) for name in _QUERIES]
    given = [one is not None for one in queries]
    need(given in ([True, False, False, False], [False, True, True, True]), f"{where} has no plain queries")
    whole, down_queries, query_norm, second = queries
    first: Any = whole if down_queries is None else down_queries
    need(
        all(isinstance(one, nn.Linear) for one in (first, second or first, down, expand, output)),
        f"{where} projects otherwise than by plain products",
    )
    need((first.bias is None) == (down.bias is None), f"{where}: only some products of the hidden state have biases")
    need(all(one is None or one.bias is None for one in (second, expand)), f"{where}: products of latents have biases")
    gate = getattr(attention, "g_proj", None)
    need(
        gate is None or (isinstance(gate, nn.Linear) and (gate.bias is None) == (down.bias is None)),
        f"{where} has an output gate that is no product like those of the hidden state",
    )
    return LatentAttention((first, down, output), (query_norm or norm, norm), expand, second, gate, attention)


def _delta_net(delta: Any, where: str) -> DeltaNet:
    where = f"{where}: delta net"
    if hasattr(delta, _FORGET):
        return _forgetting_net(delta, where)
    names = next((names for names in _DELTA_PRODUCTS if hasattr(delta, names[0])), _DELTA_PRODUCTS[0])
    check_children(delta, where, (*names, *_DELTA_TENSORS, "out_proj"))
    products = tuple(getattr(delta, name) for name in (*names, "out_proj"))
    conv, decay, shift, norm = (getattr(delta, name) for name in _DELTA_TENSORS)
    _check_plain(products, conv, where)
    return DeltaNet(products, conv, decay, shift, norm, delta)


def _forgetting_net(delta: Any, where: str) -> DeltaNet:
    """The delta net whose decays a module of its own makes of products, as it makes the norm's gate."""
    forget = delta.forget_gate
    gates = next((names for first, names in _FORGET_PRODUCTS.items() if hasattr(forget, first)), ("g_proj",))
    rates = [name.replace("g_", "f_", 1) for name in gates]
    plain = ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj")
    check_children(delta, where, (*plain, "conv1d", "o_norm", _FORGET, *gates))
    check_children(forget, f"{where}: {_FORGET}", ("A_log", "dt_bias", *rates))
    q, k, v, betas, output = (getattr(delta, name) for name in plain)
    gate, *expand_gate = (getattr(delta, name) for name in gates)
    rate, *expand_rate = (getattr(forget, name) for name in rates)
    products, expands = (q, k, v, gate, rate, betas, output), (*expand_gate, *expand_rate)
    _check_plain((*products, *expands), delta.conv1d, where)
    return DeltaNet(products, delta.conv1d, forget.A_log, forget.dt_bias, delta.o_norm, delta, forget, expands)


def _check_plain(products: Sequence[Any], conv: Any, where: str) -> None:
    plain = all(isinstance(one, nn.Linear) and one.bias is None for one in products)
    need(plain, f"{where} projects otherwise than by plain products without biases")
    need(isinstance(conv, nn.Conv1d) and conv.bias is None, f"{where} has no plain convolution without a bias")


def _mamba(mamba: Any, where: str) -> Mamba:
    where = f"{where}: Mamba-2"
    check_children(mamba, where, ("in_proj", "out_proj", *_MAMBA_TENSORS))
    conv, decay, shift, skip, norm = (getattr(mamba, name) for name in _MAMBA_TENSORS)
    return Mamba(_products(mamba, where), _convolution(conv, where), decay, shift, skip, norm, mamba)


def _short_convolution(module: Any, where: str) -> ShortConvolution:
    where = f"{where}: convolution"
    check_children(module, where, ("in_proj", "out_proj", "conv"))
    return ShortConvolution(_products(module, where), _convolution(module.conv, where), module)


def _products(module: Any, where: str) -> tuple[nn.Linear, nn.Linear]:
    """The products of a layer's input and of its output."""
    plain = isinstance(module.in_proj, nn.Linear) and isinstance(module.out_proj, nn.Linear)
    need(plain, f"{where} projects otherwise than by plain products")
    return module.in_proj, module.out_proj


def _convolution(conv: Any, where: str) -> nn.Conv1d:
    plain = (
        isinstance(conv, nn.Conv1d) and conv.groups == conv.in_channels == conv.out_channels and conv.dilation == (1,)
    )
    need(plain, f"{where} has no plain convolution of each channel")
    assert isinstance(conv, nn.Conv1d)
    return conv


def _mlp(mlp: Any, where: str, switch: nn.Linear | None = None) -> Mlp:
    where = f"{where}: {type(mlp).__name__}"
    names = next((names for names in _MLP if all(hasattr(mlp, name) for name in names)), _MLP[0])
    check_children(mlp, where, names, _DOWN)
    parts = [*(getattr(mlp, name) for name in names), _first(mlp, _DOWN)]
    for part in parts:
        need(isinstance(part, nn.Linear) and part.bias is None, f"{where} is no plain gated product")
    return Mlp(mlp, tuple(parts[:-1]), parts[-1], switch)
