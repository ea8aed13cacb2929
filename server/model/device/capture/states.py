"""Finds the sizes of the layers that keep a state, and packs their weights: Mamba-2 and short convolutions; `delta` has
gated delta nets.

Source: transformers' `modeling_granitemoehybrid.py` and `modeling_nemotron_h.py` for Mamba-2, `modeling_lfm2_moe.py`
for convolutions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from server.model.device.capture import need
from server.model.device.capture.delta import delta_kind, delta_rows, packed_delta
from server.model.device.capture.modules import DeltaNet, Mamba, ShortConvolution, StateNet
from server.model.device.capture.parts import grouped_norm
from server.model.device.step.parts import ConvolutionKind, MambaKind, StateKind
from server.model.device.step.weights import ConvolutionWeights, MambaWeights

_SILU = ("silu", "swish")


def state_kind(net: StateNet, eps: float, where: str) -> StateKind:
    """The kind of a layer that keeps a state; `eps` is that of the model's norms. Raises NotCapturableError for one
    whose products, norm or convolution are others."""
    if isinstance(net, DeltaNet):
        return delta_kind(net, eps, where)
    kind = _mamba_kind(net, eps, where) if isinstance(net, Mamba) else _convolution_kind(net)
    given, output = net.projections
    sizes, wanted = (
        [given.out_features, len(net.conv.weight), output.in_features],
        [kind.qkv, kind.channels, kind.width],
    )
    need(sizes == wanted, f"{where} has products and a convolution of {sizes} elements, wanted {wanted}")
    return kind


def packed_state(net: StateNet, where: str) -> dict[str, Any]:
    """The fields of `LayerWeights` that are the layer's own."""
    if isinstance(net, DeltaNet):
        weights = [product.weight for product in net.projections[:-1]]
        return {
            "qkv": delta_rows(net, weights),
            "output": net.projections[-1].weight,
            "delta": packed_delta(net, where),
        }
    given, output = net.projections
    own: dict[str, Any] = {
        "output": output.weight,
        "output_bias": output.bias,
        "qkv": given.weight,
        "qkv_bias": given.bias,
    }
    if isinstance(net, ShortConvolution):
        return own | {"convolution": ConvolutionWeights(_by_token(net.conv), net.conv.bias)}
    kind = _mamba_sizes(net)
    own |= {name: None if own[name] is None else _last_first(own[name], kind) for name in ("qkv", "qkv_bias")}
    bias = net.conv.bias
    conv = ConvolutionWeights(
        _values_last(_by_token(net.conv).T, kind).T.contiguous(), None if bias is None else _values_last(bias, kind)
    )
    return own | {
        "mamba": MambaWeights(
            conv,
            norm=grouped_norm(net.norm, kind.groups, where)[0],
            decay=-net.decay.float().exp(),
            shift=net.shift.to(given.weight.dtype).float(),
            skip=net.skip.float(),
        )
    }


def _mamba_kind(net: Mamba, eps: float, where: str) -> MambaKind:
    kind, where = _mamba_sizes(net), f"{where}: Mamba-2"
    need(kind.heads % kind.groups == 0, f"{where} has {kind.heads} heads in {kind.groups} groups")
    for what, size in (("a state", kind.key_dim), ("a head", kind.value_dim)):
        need(size & (size - 1) == 0, f"{where} has {what} of {size} elements: wanted a power of two")
    own = float(getattr(net.norm, "variance_epsilon", 0.0))
    need(own == eps, f"{where} has a norm with {own}, the other norms {eps}")
    activation = getattr(net.module, "activation", None)
    need(activation in _SILU, f"{where} activates its convolution by {activation}, wanted one of {', '.join(_SILU)}")
    return replace(kind, norms=grouped_norm(net.norm, kind.groups, where)[1])


def _mamba_sizes(net: Mamba) -> MambaKind:
    of = net.module
    least, most = map(float, getattr(of, "time_step_limit", None) or (0.0, float("inf")))
    return MambaKind(of.n_groups, of.num_heads, of.ssm_state_size, of.head_dim, net.conv.weight.shape[-1], least, most)


def _convolution_kind(net: ShortConvolution) -> ConvolutionKind:
    channels, _, kernel = net.conv.weight.shape
    return ConvolutionKind(channels, kernel)


def _by_token(conv: nn.Conv1d) -> Tensor:
    """[kernel, channels]."""
    return conv.weight[:, 0].T.contiguous()


def _values_last(rows: Tensor, kind: MambaKind) -> Tensor:
    """Rows of values, keys and queries in the order of queries, keys and values."""
    keys = kind.groups * kind.key_dim
    return torch.cat(torch.split(rows, [kind.width, keys, keys])[::-1])


def _last_first(rows: Tensor, kind: MambaKind) -> Tensor:
    """Rows of the norm's gate, of values, keys and queries, and of dt, in the order of `MambaKind.qkv`."""
    gate, mixed, dt = torch.split(rows, [kind.width, kind.channels, kind.heads])
    return torch.cat([_values_last(mixed, kind), gate, dt])
