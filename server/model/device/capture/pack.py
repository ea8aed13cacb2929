"""Packs a transformers model in memory into the shape and the tensors of the captured decode step.

Accepts decoders of grouped-query or latent attention, layers that keep a state, and gated products. `capture.modules`
finds the modules, `capture.parts`, `capture.latent`, `capture.states` and `step.router_kind` find out which parts they
are, and gating rules come from `router.gating`; `capture.families` adds what neither shows. Invariant: a model with an
unknown module or part is refused. Modules do not describe everything that a forward computes, so `capture.proof`
compares the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from expert_store.encoding import RowEncoding
from server.model.device.capture import NotCapturableError, need
from server.model.device.capture.families import FamilyParts, family_parts
from server.model.device.capture.latent import latent_kind, packed_latent
from server.model.device.capture.modules import (
    Attention,
    DeltaNet,
    LatentAttention,
    Layer,
    Mlp,
    StateNet,
    attention_of,
    embedding_of,
    last_norm,
    layers_of,
    rotary_embedding,
    rotary_name,
    text_body,
)
from server.model.device.capture.parts import check_unweighted, gate_kind, packed_norm
from server.model.device.capture.states import packed_state, state_kind
from server.model.device.step.parts import SILU, AttentionKind, ExpertKind, LatentKind, OutputGate, Scales, StateKind
from server.model.device.step.router_kind import (
    RouterKind,
    RouterRefusedError,
    router_kind,
    router_product,
    selection_bias,
)
from server.model.device.step.tuning import pow2
from server.model.device.step.weights import (
    DecodeShape,
    LayerKind,
    LayerWeights,
    Matrix,
    MlpWeights,
    NormKind,
    QkNorm,
    ScaledMatrix,
    TrunkWeights,
    rotary_tables,
)
from server.model.seam.attention_mask import layer_windows

MOST_ROWS = 64
"""The largest batch with which the kernels were tested."""
MOST_CHOICES = 16 << 10
"""Rows of a batch times experts, both as powers of two, which one program of the router holds: more of them take more
shared memory than many GPUs have."""

EightBits = Mapping[nn.Linear, tuple[Tensor, Tensor]]
"""Codes [O, N] and scales [O, groups of columns] of linear layers: see `seam.trunk.eight_bits`."""

_Value = TypeVar("_Value")
_LEAST_GROUP = 16
"""Columns that share a scale: the fewest that a tile of a product takes."""
_PROBED = 16
"""Elements on which gated products are probed."""
_ROUTED = "routed_scaling_factor"
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
_SETTINGS = ("hidden_size", "num_attention_heads", _EPSILONS[0], "model_type")
_TOP_K = ("num_experts_per_tok", "top_k_experts")


def decode_shape(
    model: Any,
    *,
    intermediate: int,
    max_rows: int,
    max_tokens: int,
    dtype: torch.dtype | None = None,
    packed: tuple[RowEncoding, RowEncoding] | None = None,
    bias: torch.dtype | None = None,
) -> DecodeShape:
    """The step's sizes for a transformers model that `text_body` finds the decoder of.

    Args:
        intermediate: I of the experts.
        dtype: of the computation; None: the model's.
        packed: encodings of gate_up and down in the experts' spans; None: they are plain.
        bias: dtype of the biases in the spans, if experts have biases; None: that of the computation.

    Raises NotCapturableError for a model with another structure.
    """
    config = _complete_config(model)
    layers = layers_of(model)
    family = family_parts(config.model_type)
    attentions, first, norm, scaling = _attentions(model, layers)
    (kv_heads, _), _ = first.vectors
    moe, dense = ([layer for layer in layers if (layer.block is None) == is_dense] for is_dense in (False, True))
    need(bool(moe), "no layer has routed experts")
    dtype = dtype or model.lm_head.weight.dtype
    router, experts, top_k, num_experts, shared = _only(
        {_block_kind(config, layer, bias or dtype) for layer in moe},
        "routers, experts or shared experts differ between layers",
    )
    most_rows = min(MOST_ROWS, MOST_CHOICES // pow2(num_experts))
    need(max_rows <= most_rows, f"batches of {max_rows} rows: wanted at most {most_rows}, by max_batch_size")
    gates = {gate_kind(layer.mlp.module, _PROBED, layer.where) for layer in layers if layer.mlp is not None}
    shape = DecodeShape(
        num_layers=len(layers),
        hidden=config.hidden_size,
        num_heads=first.num_heads,
        num_kv_heads=kv_heads,
        head_dim=first.head_dim,
        vocab=model.lm_head.weight.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        intermediate=intermediate,
        max_rows=max_rows,
        max_tokens=max_tokens,
        eps=_epsilon(config),
        scaling=scaling,
        norm=_norm_kind(last_norm(model)),
        is_parallel=_only({layer.is_parallel for layer in layers}, "only some layers have parallel branches"),
        qk_norm=_qk_norm(norm, family),
        output_gate=first.gate,
        rotary=first.rotary,
        attentions=attentions,
        neighbours=family.neighbours,
        windows=layer_windows(config, len(layers)),
        dense_layers=frozenset(at for at, layer in enumerate(layers) if layer.block is None),
        dense_intermediate=_only({_mlp_size(layer.mlp) for layer in dense} or {0}, "dense layers differ in size"),
        shared_intermediate=shared,
        router=router,
        experts=experts,
        mlp_gate=_only(gates or {SILU}, "shared experts and dense layers have several gated products"),
        scales=_scales(config, embedding_of(model), moe[0]),
        dtype=dtype,
        packed=packed,
    )
    sizes = (shape.hidden, intermediate)
    need(all(size % 16 == 0 for size in sizes), f"experts of {sizes} elements: wanted multiples of 16")
    return shape


def _complete_config(model: Any) -> Any:
    """The config of the model's text part. Raises NotCapturableError if a setting is missing that a shape needs."""
    config = model.config.get_text_config()
    absent = [name for name in _SETTINGS if getattr(config, name, None) is None]
    if any(getattr(config, name, None) is not None for name in _EPSILONS):
        absent = [name for name in absent if name != _EPSILONS[0]]
    need(not absent, f"the model's config has no {', '.join(absent)}")
    return config


def _only(values: set[_Value], problem: str) -> _Value:
    """The one value; several are a refusal."""
    need(len(values) == 1, problem)
    return values.pop()


def _epsilon(config: Any) -> float:
    found = (getattr(config, name, None) for name in _EPSILONS)
    return next(float(one) for one in found if one is not None)


def _norm_kind(norm: nn.Module) -> NormKind:
    return "layer" if packed_norm(norm, "the model").ndim == 2 else "rms"


def _attentions(model: Any, layers: Sequence[Layer]) -> tuple[tuple[LayerKind, ...], LayerKind, QkNorm, float]:
    """The attention of each layer, or what stands in its place; the first attention; the norms of queries and keys
    and the factor of scores of all attentions."""
    names = frequencies_of(model, len(layers))
    attentions = tuple(_attention_kind(model, layer, name) for layer, name in zip(layers, names, strict=True))
    states = {kind for kind in attentions if isinstance(kind, StateKind)}
    need(len(states) <= 1, "layers that keep a state differ from one another")
    attending = [pair for pair in zip(layers, attentions, strict=True) if not isinstance(pair[1], StateKind)]
    need(bool(attending), "no layer has attention")
    norms = {_attention_norms(layer, kind) for layer, kind in attending}
    norm = _only(norms, "norms of queries and keys differ between layers")
    scalings = {_scaling(layer) for layer, _ in attending}
    scaling = _only(scalings, "layers scale the scores of attention by different factors")
    return attentions, attending[0][1], norm, scaling


def _attention_kind(model: Any, layer: Layer, frequencies: str) -> LayerKind:
    """The attention of a layer whose frequencies are that attribute of the model's rotary embedding; refuses attention
    without grouped queries or latents."""
    attention, config, where = layer.attention, model.config.get_text_config(), f"{layer.where}: attention"
    if isinstance(attention, LatentAttention):
        return latent_kind(attention, config, rotary_embedding(model), where)
    if isinstance(attention, StateNet):
        return state_kind(attention, _epsilon(config), layer.where)
    q, k, v, o = attention.projections
    head_dim = int(getattr(attention.module, "head_dim", config.hidden_size // config.num_attention_heads))
    need(head_dim % 2 == 0, f"{where} has heads of {head_dim} elements: wanted an even number")
    kv_heads = max(1, k.out_features // head_dim)
    value_rows = (k if v is None else v).out_features
    value_dim = value_rows // kv_heads
    heads = o.in_features // max(1, value_dim)
    is_apart = attention.gate is not None
    gate: OutputGate = "sigmoid" if is_apart or q.out_features == 2 * heads * head_dim else "none"
    if gate != "none" and family_parts(config.model_type).softplus:
        gate = "softplus by head" if attention.gate is not None and attention.gate.out_features == heads else "softplus"
    sizes = [q.out_features, k.out_features, value_rows, o.in_features, o.out_features]
    wanted = [heads * head_dim, kv_heads * head_dim, kv_heads * value_dim, heads * value_dim, config.hidden_size]
    wanted[0] *= 1 if is_apart or gate == "none" else 2  # gates follow on each head's queries
    fits = sizes == wanted and heads % kv_heads == 0
    need(fits, f"{where} projects to {sizes}, wanted {wanted} by heads of {head_dim} elements")
    rotary = 2 * len(getattr(*rotary_of(model, frequencies))) if frequencies else head_dim
    need(rotary <= head_dim, f"{where} rotates {rotary} of {head_dim} elements of a head")
    if attention.value_norm is not None:
        check_unweighted(attention.value_norm, value_dim, where)
    scale = float(getattr(attention.module, "v_scale", 1.0))
    kind = AttentionKind(
        heads, kv_heads, head_dim, value_dim, rotary, v is None, attention.value_norm is not None, scale, gate
    )
    if attention.gate is not None:
        rows = attention.gate.out_features
        need(rows == kind.gates, f"{where}: its output gate has {rows} rows, wanted {kind.gates}")
    return kind


def _scaling(layer: Layer) -> float:
    """The factor of the scores of attention."""
    module = layer.attention.module
    return float(getattr(module, "scaling", None) or module.head_dim**-0.5)


def _attention_norms(layer: Layer, kind: LayerKind) -> QkNorm:
    """The kind of a layer's norms of queries and keys."""
    if not isinstance(kind, AttentionKind) or not isinstance(layer.attention, Attention):
        return "none"
    where = f"{layer.where}: attention"
    kinds: set[QkNorm] = set()
    for norm, projection in zip(layer.attention.norms or (), layer.attention.projections[:2], strict=False):
        assert projection is not None
        size = packed_norm(norm, where).shape.numel()
        is_plain = kind.gate == "none" or layer.attention.gate is not None
        sizes = (kind.head_dim, projection.out_features if is_plain else kind.head_dim)
        need(size in sizes, f"{where} has a norm over {size} elements, wanted one of {sizes}")
        kinds.add("head" if size == kind.head_dim else "row")
    need(len(kinds) <= 1, f"{where} normalises queries and keys differently")
    return kinds.pop() if kinds else "none"


def _qk_norm(kind: QkNorm, family: FamilyParts) -> QkNorm:
    return "head, rotated" if kind == "head" and family.norms_rotated else kind


def _scales(config: Any, table: Any, layer: Layer) -> Scales:
    """The multipliers that configs have, of the embedding also its module, and a factor that the block multiplies by
    instead of the router."""
    routed = 1.0 if hasattr(layer.router, _ROUTED) else float(getattr(layer.block, _ROUTED, 1.0))
    embedding, residual, divisor, factor = (
        float(getattr(config, name, None) or 1.0)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
    )
    own = getattr(table, "scalar_embed_scale", None)
    if getattr(config, "mup_enabled", False):
        embedding = float(config.hidden_size) ** 0.5
    is_mean = layer.mlp is not None and getattr(layer.block, "shared_expert_combination_strategy", "") == "average"
    return Scales(
        embedding if own is None else float(own), residual, factor / divisor, routed, 0.5 if is_mean else 1.0,
        own is not None, float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )  # fmt: skip


def frequencies_of(model: Any, num_layers: int) -> list[str]:
    """For each layer the name of its frequencies, which `rotary_of` finds; empty: the layer does not rotate."""
    config, rotary = model.config.get_text_config(), rotary_embedding(model)
    if hasattr(text_body(model), "rotary_embs"):  # one for each base of angles, the lowest first; base 0: none
        bases = sorted({base for base in config.layer_rope_theta if base})
        return [f"rotary_embs.{bases.index(base)}.inv_freq" if base else "" for base in config.layer_rope_theta]
    if rotary is None:
        return [""] * num_layers
    types = getattr(config, "layer_types", None) or [""] * num_layers
    attentions = [attention_of(layer) for layer in text_body(model).layers]
    still = family_parts(config.model_type).unrotated if getattr(config, "sliding_window", None) else ""
    names = [
        "" if own is None or (still and kind == still and not getattr(own, "force_rope", False)) else f"{kind}_inv_freq"
        for kind, own in zip(types, attentions, strict=False)
    ]
    if hasattr(rotary, "inv_freq"):
        names = ["inv_freq" if name else "" for name in names]
    absent = sorted({name for name in names if name and not hasattr(rotary, name)})
    need(not absent, f"{type(rotary).__name__} has no {', '.join(absent)}")
    return names


def rotary_of(model: Any, name: str) -> tuple[Any, str]:
    """The rotary embedding that has frequencies of this name, and its attribute."""
    owner, _, attribute = name.rpartition(".")
    return text_body(model).get_submodule(owner or rotary_name(model)), attribute


def _block_kind(config: Any, layer: Layer, bias: torch.dtype) -> tuple[RouterKind, ExpertKind, int, int, int]:
    """The kinds of router and experts, top-k, number of experts and the shared expert's size of one MoE layer."""
    try:
        kind = router_kind(config.model_type, layer.router, layer.block)
        weight, _ = router_product(layer.router)
    except RouterRefusedError as error:
        raise NotCapturableError(f"{layer.where}: {error}") from error
    num_experts, width = weight.shape
    need(width == config.hidden_size, f"{layer.where}: gate does not read the hidden state")
    found = [getattr(layer.router, "top_k", None), *(getattr(config, name, None) for name in _TOP_K)]
    top_k = next((int(one) for one in found if one), 0)
    need(top_k > 0, f"{layer.where}: neither router nor config tells top-k")
    shared = _mlp_size(layer.mlp) if layer.mlp is not None else 0
    return kind, _expert_kind(layer, bias), top_k, int(num_experts), shared


def _expert_kind(layer: Layer, bias: torch.dtype) -> ExpertKind:
    experts = layer.experts
    need(experts.has_gate, f"{layer.where}: experts have no gate")
    need(not getattr(experts, "has_post_expert_norm", False), f"{layer.where}: experts have a norm of their own")
    gate = gate_kind(experts, _PROBED, layer.where)
    return ExpertKind(gate, not experts.is_concatenated, bias if experts.has_bias else None)


def _mlp_size(mlp: Mlp | None) -> int:
    """I of a gated product that every token uses."""
    assert mlp is not None
    return int(mlp.down.in_features)


@torch.no_grad()
def pack_trunk(model: Any, shape: DecodeShape, eight_bits: EightBits | None = None) -> TrunkWeights:
    """Trunk tensors of a model that `decode_shape` accepted, on the model's device. Packed copies are new memory; the
    rest are the model's own tensors.

    Args:
        eight_bits: codes and scales of linear layers, as `seam.trunk.eight_bits` finds them. The projections of
            attention and the head are multiplied as they are, other layers in the model's dtype.
    """
    eight_bits = eight_bits or {}
    layers, tables = layers_of(model), rotary_tables_of(model, shape)
    return TrunkWeights(
        embedding=embedding_of(model).weight,
        layers=tuple(
            _packed(layer, shape, kind, table, eight_bits)
            for layer, kind, table in zip(layers, shape.each_attention, tables, strict=True)
        ),
        norm=packed_norm(last_norm(model), "the model"),
        head=_matrix([model.lm_head], eight_bits) or model.lm_head.weight,
        head_bias=_bias(model.lm_head),
    )


def packed_trunk_bytes(model: Any, weights: TrunkWeights) -> int:
    """Bytes of a model's trunk and of its packed `weights`, which stand for the products of layers with a state."""
    nets = [layer.attention for layer in layers_of(model) if isinstance(layer.attention, StateNet)]
    products = [product for net in nets for product in net.projections[:-1]]
    products += [product for net in nets if isinstance(net, DeltaNet) for product in net.expands]
    replaced = {id(product.weight) for product in products}
    packed = {id(tensor): tensor for tensor in weights.tensors}
    others = {id(tensor): tensor for tensor in model.parameters() if id(tensor) not in replaced}
    return sum(tensor.nbytes for tensor in (packed | others).values())


def attention_and_head(model: Any) -> list[nn.Linear]:
    """The linear layers that a step multiplies by their codes if they are in 8 bits."""
    attentions = [layer.attention for layer in layers_of(model) if not isinstance(layer.attention, StateNet)]
    parts = (part for attention in attentions for part in attention.projections)
    return [*(part for part in parts if part is not None), model.lm_head]


def _matrix(
    parts: Sequence[nn.Linear], eight_bits: EightBits, joined: Callable[[list[Tensor]], Tensor] = torch.cat
) -> Matrix | None:
    """The layers as one matrix in 8 bits; None if one of them is plain, or its groups of columns are none that the
    kernels take.

    Args:
        joined: makes the rows of the matrix of those of each.
    """
    found = [eight_bits[part] for part in parts if part in eight_bits]
    groups = {part.in_features // scales.shape[1] for part, (_, scales) in zip(parts, found, strict=False)}
    if len(found) < len(parts) or len(groups) != 1:
        return None
    (group,) = groups
    is_row = group == parts[0].in_features
    if not is_row and (group & (group - 1) or group < _LEAST_GROUP):
        return None
    device = parts[0].weight.device
    codes = joined([codes.view(torch.uint8) for codes, _ in found]).to(device).view(torch.float8_e4m3fn)
    scales = joined([scales for _, scales in found]).to(device)
    return ScaledMatrix(codes, scales, pow2(group) if is_row else group)


def _packed(
    layer: Layer,
    shape: DecodeShape,
    kind: LayerKind,
    table: tuple[Tensor, Tensor],
    eight_bits: EightBits,
) -> LayerWeights:
    attention = layer.attention
    if isinstance(attention, StateNet):
        own: dict[str, Any] = packed_state(attention, layer.where) | dict.fromkeys(("q_norm", "k_norm"), table[0])
    else:
        own = _packed_attention(attention, kind, table, eight_bits, layer.where)
    gate, gate_bias = (None, None) if layer.router is None else router_product(layer.router)
    names = ("input_norm", "post_norm", "attention_norm", "branch_norm", "routed_norm")
    norms: dict[str, Any] = {name: _norm(getattr(layer, name), layer.where) for name in names}
    kinds = {"layer" if norm.ndim == 2 else "rms" for norm in norms.values() if norm is not None}
    need(kinds <= {shape.norm}, f"{layer.where} has norms of several kinds")
    factors = shape.router.expert_factors
    return LayerWeights(
        **norms,
        **own,
        gate=gate,
        cos=table[0],
        sin=table[1],
        gate_bias=None if gate_bias is None else gate_bias.float(),
        selection_bias=None if gate is None else selection_bias(shape.router, layer.router, layer.block),
        mlp=None if layer.mlp is None else _packed_mlp(layer.mlp, layer.where),
        changes=None,
        gate_norm=layer.router.scale if gate is not None and shape.router.own_norm else None,
        expert_factors=None if gate is None or factors is None else getattr(layer.router, factors).float(),
        factor=layer.factor,
    )


def _packed_attention(
    attention: Attention | LatentAttention,
    kind: LayerKind,
    table: tuple[Tensor, Tensor],
    eight_bits: EightBits,
    where: str,
) -> dict[str, Any]:
    """The fields of `LayerWeights` that are attention's own."""
    *found, output = attention.projections
    parts = [part for part in found if part is not None]
    gate, sinks = attention.gate, attention.sinks if isinstance(attention, Attention) else None
    parts += [] if gate is None else [gate]
    biases = [bias for part in parts if (bias := _bias(part)) is not None]
    norms = [packed_norm(norm, where) for norm in attention.norms or ()] or [table[0]] * 2
    joined = partial(gate_last, kind=kind, is_apart=gate is not None)
    return {
        "qkv": _matrix(parts, eight_bits, joined) or joined([part.weight for part in parts]),
        "qkv_bias": joined(biases) if biases else None,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "output": _matrix([output], eight_bits) or output.weight,
        "output_bias": output.bias,
        "sinks": None if sinks is None else sinks.float(),
        "latent": packed_latent(attention) if isinstance(attention, LatentAttention) else None,
    }


def _norm(norm: nn.Module | None, where: str) -> Tensor | None:
    return None if norm is None else packed_norm(norm, where)


def gate_last(parts: Sequence[Tensor], kind: LayerKind, is_apart: bool) -> Tensor:
    """The rows of q, k and v, and then those of the output gate, each head's of which follow on its rows of q, unless
    the gate has a product of its own."""
    if kind.gate == "none" or is_apart:
        return torch.cat(list(parts))
    q, *others = parts
    heads = q.view(kind.num_heads, 2, kind.head_dim, *q.shape[1:])
    return torch.cat([heads[:, 0].flatten(0, 1), *others, heads[:, 1].flatten(0, 1)])


def _bias(linear: nn.Linear) -> Tensor | None:
    return linear.bias  # which torch's types never have as None


def _packed_mlp(mlp: Mlp, where: str) -> MlpWeights:
    return MlpWeights(
        up=torch.cat([part.weight for part in mlp.ups]),
        down=mlp.down.weight,
        switch=None if mlp.switch is None else mlp.switch.weight.view(-1),
        norm=_norm(mlp.norm, where),
        after=_norm(mlp.after, where),
    )


def rotary_tables_of(model: Any, shape: DecodeShape) -> list[tuple[Tensor, Tensor]]:
    """For each layer cos and sin [max_tokens, head_dim / 2] of its rotary embedding: see `rotary_tables`. Layers of one
    kind share their tables."""
    device = model.lm_head.weight.device
    names = frequencies_of(model, shape.num_layers)
    keys = [(name, kind.head_dim // 2) for name, kind in zip(names, shape.each_attention, strict=True)]
    latents = [kind for kind in shape.each_attention if isinstance(kind, LatentKind)]
    exact = any(kind.pairs == "neighbours" for kind in latents)  # complex numbers are never rounded
    tables = {}
    for name, half in set(keys):
        frequencies, scaling = torch.zeros(half, device=device), 1.0
        if name:
            rotary, attribute = rotary_of(model, name)
            frequencies = getattr(rotary, attribute)
            scaling = float(getattr(rotary, attribute.replace("inv_freq", "attention_scaling"), 1.0))
        dtype = torch.float32 if exact else shape.dtype
        tables[name, half] = rotary_tables(frequencies, shape.max_tokens, dtype, scaling, half)
    return [tables[key] for key in keys]
