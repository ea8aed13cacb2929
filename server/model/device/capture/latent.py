"""Packs latent attention (MLA) for the captured step: its kind from modules and config, and its weights."""

from __future__ import annotations

from typing import Any

import torch

from server.model.device.capture import need
from server.model.device.capture.families import family_parts
from server.model.device.capture.modules import LatentAttention
from server.model.device.capture.parts import norm_eps, packed_norm
from server.model.device.step.parts import LatentKind, PairOrder
from server.model.device.step.weights import LatentWeights

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def latent_kind(attention: LatentAttention, config: Any, rotary: Any, where: str) -> LatentKind:
    """The kind of a layer's latent attention; `rotary` is the model's rotary embedding, None if nothing is rotated.
    Refuses other sizes than those of the config."""
    absent = [name for name in _SIZES if getattr(config, name, None) is None]
    need(not absent, f"the model's config has no {', '.join(absent)}, which latent attention has")
    rank, nope, rotated, value = (int(getattr(config, name)) for name in _SIZES)
    queries, down, output = attention.projections
    query_rank = 0 if attention.queries is None else int(attention.queries.in_features)
    heads, hidden, eps = int(config.num_attention_heads), int(config.hidden_size), norm_eps(attention.norms[1])
    is_gated = attention.gate is not None
    kind = LatentKind(heads, rank, nope, rotated, value, query_rank, _pairs(config, rotary), eps, is_gated)
    last = queries if attention.queries is None else attention.queries
    sizes = [tuple(one.weight.shape) for one in (last, queries, down, attention.expand, output)]
    wanted = [
        (heads * kind.query, query_rank or hidden), (kind.queries, hidden), (kind.token_elements, hidden),
        (heads * (nope + value), rank), (hidden, kind.width),
    ]  # fmt: skip
    if attention.gate is not None:
        sizes.append(tuple(attention.gate.weight.shape))
        wanted.append((heads, hidden))
    need(sizes == wanted, f"{where} has products {sizes}, wanted {wanted}")
    for name, size, least in (("a latent", rank, 16), ("a rotated key", rotated, 32)):
        fits = size >= least and size & (size - 1) == 0
        need(fits, f"{where}: {name} has {size} elements, wanted a power of two from {least}")
    need(query_rank <= hidden, f"{where}: latents of queries have {query_rank} elements, the hidden state {hidden}")
    for norm, size in zip(attention.norms, (query_rank or rank, rank), strict=True):
        need(packed_norm(norm, where).shape == (size,), f"{where} has a norm of latents of other than {size} elements")
        need(norm_eps(norm) == eps, f"{where}: the norms of latents differ in their epsilon")
    return kind


def _pairs(config: Any, rotary: Any) -> PairOrder:
    """The order of rotated elements: angles as complex numbers rotate neighbours in place, `rope_interleave`, or the
    family's record, moves them apart."""
    if rotary is None:
        return "halves"
    device = next(rotary.buffers()).device
    found = rotary(torch.zeros(1, 1, device=device), torch.zeros(1, 1, dtype=torch.long, device=device))
    if isinstance(found, torch.Tensor) and found.is_complex():
        return "neighbours"
    moves = getattr(config, "rope_interleave", family_parts(config.model_type).neighbours)
    return "neighbours to halves" if moves else "halves"


def packed_latent(attention: LatentAttention) -> LatentWeights:
    """The products between latents and heads, which are the model's own tensors."""
    queries = attention.queries
    return LatentWeights(attention.expand.weight, None if queries is None else queries.weight)
