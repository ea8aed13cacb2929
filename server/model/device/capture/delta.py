"""Finds the sizes of a gated delta net's modules, and packs their weights. See `kernels.delta`.

Source: transformers' `modeling_qwen3_next.py`, whose products have their rows by key heads, `modeling_qwen3_5_moe.py`,
which has a product for each part, and `modeling_kimi_linear.py` and `modeling_bailing_hybrid.py`, whose decays are by
channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.model.device.capture import need
from server.model.device.capture.modules import DeltaNet
from server.model.device.capture.parts import forget_kind, gated_norm, norm_eps
from server.model.device.step.parts import DeltaKind
from server.model.device.step.weights import ConvolutionWeights, DeltaWeights


def delta_kind(net: DeltaNet, eps: float, where: str) -> DeltaKind:
    """The sizes and parts of a delta net; `eps` is that of the model's norms. Raises NotCapturableError for one whose
    products, convolution, norm or decays are others."""
    where = f"{where}: delta net"
    kind = _kind(net, where)
    *products, output = net.projections
    sizes = [sum(one.out_features for one in products), len(net.conv.weight), output.in_features]
    wanted = [kind.qkv, kind.channels, kind.width]
    need(sizes == wanted, f"{where} has products and a convolution of {sizes} elements, wanted {wanted}")
    expands = [tuple(one.weight.shape) for one in net.expands]
    wanted_expands = [(rows, kind.rank) for rows in (kind.width, kind.decays)] if kind.rank else []
    need(expands == wanted_expands, f"{where} has products of latents {expands}, wanted {wanted_expands}")
    need(kind.value_heads % kind.key_heads == 0, f"{where} has {kind.value_heads} heads of values for {kind.key_heads}")
    for size in (kind.key_dim, kind.value_dim):
        need(size & (size - 1) == 0, f"{where} has heads of {size} elements: wanted a power of two")
    own = norm_eps(net.norm)
    need(own == eps, f"{where} has a norm with {own}, the other norms {eps}")
    return kind


def delta_rows(net: DeltaNet, products: Sequence[Tensor]) -> Tensor:
    """The rows [qkv, ..] of a delta net's products, given those of each product, in the order of `DeltaKind.qkv`."""
    parts = list(products)
    if len(parts) == 2:  # each key head's rows of q, k, v, gate; and of b, a
        of = net.module
        group = of.num_v_heads // of.num_k_heads
        sizes = ([of.head_k_dim] * 2 + [group * of.head_v_dim] * 2, [group] * 2)
        by_head = [part.view(of.num_k_heads, -1, *part.shape[1:]) for part in parts]
        split = [part for one, size in zip(by_head, sizes, strict=True) for part in torch.split(one, size, dim=1)]
        *others, betas, rates = (part.flatten(0, 1) for part in split)
        parts = [*others, rates, betas]
    return torch.cat(parts)


def packed_delta(net: DeltaNet, where: str) -> DeltaWeights:
    """The small tensors of a delta net."""
    expands = [product.weight for product in net.expands]
    return DeltaWeights(
        conv=ConvolutionWeights(net.conv.weight[:, 0].T.contiguous()),
        norm=gated_norm(net.norm, where)[0],
        decay=-net.decay.float().exp().flatten(),
        shift=net.shift.float(),
        expand=torch.block_diag(*expands) if expands else None,  # type: ignore[no-untyped-call]
    )


def _kind(net: DeltaNet, where: str) -> DeltaKind:
    of, kernel = net.module, net.conv.weight.shape[-1]
    _, is_sigmoid = gated_norm(net.norm, where)
    if net.forget is None:
        sizes = (of.num_k_heads, of.num_v_heads, of.head_k_dim, of.head_v_dim)
        return DeltaKind(*sizes, kernel, sigmoid=is_sigmoid)
    bound, rounds = forget_kind(net.forget, where)
    rank = net.expands[0].in_features if net.expands else 0
    sizes = (of.num_heads, of.num_heads, of.head_dim, of.head_dim)
    return DeltaKind(*sizes, kernel, True, bound, rounds, is_sigmoid, rank)
