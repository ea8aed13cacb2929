"""Finds the sizes of a gated delta net's modules, and packs their weights. See `kernels.delta`.

Source: transformers' `modeling_qwen3_next.py`, whose products have their rows by key heads, and
`modeling_qwen3_5_moe.py`, which has a product for each part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.model.device.capture import need
from server.model.device.capture.modules import DeltaNet
from server.model.device.capture.parts import gated_norm_weight, norm_eps
from server.model.device.step.parts import DeltaKind
from server.model.device.step.weights import DeltaWeights


def delta_kind(net: DeltaNet, config: Any, where: str) -> DeltaKind:
    """The sizes of a delta net. Raises NotCapturableError for one whose products, norm or convolution are others."""
    where = f"{where}: delta net"
    kind = _sizes(net)
    *products, output = net.projections
    sizes = [sum(one.out_features for one in products), len(net.conv.weight), output.in_features]
    wanted = [kind.qkv, kind.channels, kind.width]
    need(sizes == wanted, f"{where} has products and a convolution of {sizes} elements, wanted {wanted}")
    need(kind.value_heads % kind.key_heads == 0, f"{where} has {kind.value_heads} heads of values for {kind.key_heads}")
    for size in (kind.key_dim, kind.value_dim):
        need(size & (size - 1) == 0, f"{where} has heads of {size} elements: wanted a power of two")
    eps = norm_eps(net.norm)
    need(eps == float(config.rms_norm_eps), f"{where} has a norm with {eps}, the other norms {config.rms_norm_eps}")
    gated_norm_weight(net.norm, where)
    return kind


def delta_rows(net: DeltaNet) -> Tensor:
    """The rows [qkv, H] of the products of a delta net's input, in the order of `DeltaKind.qkv`."""
    kind, weights = _sizes(net), [product.weight for product in net.projections[:-1]]
    if len(weights) == 2:  # each key head's rows of q, k, v, gate; and of b, a
        group = kind.value_heads // kind.key_heads
        sizes = ([kind.key_dim] * 2 + [group * kind.value_dim] * 2, [group] * 2)
        by_head = [weight.view(kind.key_heads, -1, weight.shape[1]) for weight in weights]
        split = [part for one, size in zip(by_head, sizes, strict=True) for part in torch.split(one, size, dim=1)]
        weights = [part.flatten(0, 1) for part in split]
    return torch.cat(weights)


def packed_delta(net: DeltaNet, where: str) -> DeltaWeights:
    """The small tensors of a delta net."""
    return DeltaWeights(
        conv=net.conv.weight[:, 0].T.contiguous(),
        norm=gated_norm_weight(net.norm, where),
        decay=-net.decay.float().exp(),
        shift=net.shift.float(),
    )


def _sizes(net: DeltaNet) -> DeltaKind:
    of = net.module
    return DeltaKind(of.num_k_heads, of.num_v_heads, of.head_k_dim, of.head_v_dim, net.conv.weight.shape[-1])
