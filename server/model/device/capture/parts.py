"""Finds out which part a module is by what it computes: norms and gated products.

A module of the family runs on a few random numbers, and the formulas of the known parts are compared with its results,
in half precision too, since parts that differ only by a rounding are different parts. So neither names nor families
matter. Invariant: a module that computes anything else is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.model.device.capture import NotCapturableError, need
from server.model.device.step.parts import GELU, GateKind

_PROBES = 8
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


def packed_norm(norm: nn.Module, where: str) -> Tensor:
    """The weight [H] of an RMS norm as the kernels take it: in its own dtype if the result is rounded before it is
    multiplied, in float32 if after, and with 1 added where the norm's weights are kept around 0. Of a layer norm, which
    subtracts the mean, weight and bias [2, H] in float32.

    Raises NotCapturableError for any other norm.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise NotCapturableError(f"{where}: {type(norm).__name__} has no weight")
    kind = _norm_kind(norm, where)
    if kind is None:
        bias = getattr(norm, "bias", None)
        return torch.stack([weight.float(), torch.zeros_like(weight).float() if bias is None else bias.float()])
    is_centred, is_last = kind
    if is_last:
        weight = weight.float()
    return 1.0 + weight if is_centred else weight


def check_unweighted(norm: nn.Module, size: int, where: str) -> None:
    """Raises NotCapturableError unless the module is an RMS norm over `size` elements without weights."""
    x = torch.randn((_PROBES, size), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    same = _ran(norm, x, where) == _normalised(x, norm_eps(norm)).to(torch.bfloat16)
    need(
        not list(norm.parameters()) and bool(same.float().mean() > 0.99),
        f"{where}: {type(norm).__name__} is no RMS norm without weights",
    )


def norm_eps(norm: nn.Module) -> float:
    """The number that an RMS norm adds to the mean of squares; 0 if it has none."""
    return next(iter(_floats(norm, ("variance_epsilon", "eps"))), 0.0)


def _norm_kind(norm: nn.Module, where: str) -> tuple[bool, bool] | None:
    """Whether an RMS norm's weights are kept around 0, and whether it rounds after the multiplication; None for a layer
    norm."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(norm).to_empty(device="cpu").to(torch.bfloat16)
    weight = probe.weight
    assert isinstance(weight, Tensor)
    weight.data = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
    bias = getattr(probe, "bias", None)
    if isinstance(bias, Tensor):
        bias.data = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
    x = torch.randn((_PROBES, *weight.shape), generator=generator).to(torch.bfloat16)
    eps = norm_eps(norm)
    with torch.no_grad():
        found = _ran(probe, x, where)
        value = _normalised(x, eps)
        for is_last, is_centred in product((False, True), repeat=2):
            factor = weight.float() + 1.0 if is_centred else weight.float()
            wanted = value if is_last else value.to(torch.bfloat16).float()
            wanted = (wanted * factor).to(torch.bfloat16)
            if (wanted != found).float().mean() < 0.01:  # sums of squares may differ in their order
                return is_centred, is_last
        wanted = _normalised(x - x.float().mean(-1, keepdim=True), eps) * weight.float()
        wanted = (wanted if bias is None else wanted + bias.float()).to(torch.bfloat16)
        if (wanted != found).float().mean() < 0.01:
            return None
    raise NotCapturableError(f"{where}: {type(norm).__name__} is no norm that the captured step computes")


@torch.no_grad()
def gated_norm(norm: nn.Module, where: str) -> tuple[Tensor, bool]:
    """The weight of a norm whose result is multiplied by a function of a gate, and whether that is its sigmoid, not its
    SiLU. The weight is in its own dtype if results are rounded before and after they are multiplied by it, in float32
    if only at the end. Raises NotCapturableError for others."""
    weight, given, x, gate, found = _gated(norm, torch.bfloat16, where)
    value = _normalised(x, norm_eps(norm))
    for is_sigmoid, is_last in product((False, True), repeat=2):
        scaled = given.float() * value if is_last else (given * value.to(torch.bfloat16)).float()
        factor = gate.float().sigmoid() if is_sigmoid else functional.silu(gate.float())
        # sums of squares may differ in their order
        if ((scaled * factor).to(torch.bfloat16) != found).float().mean() < 0.01:
            return weight.float() if is_last else weight, is_sigmoid
    raise NotCapturableError(f"{where}: {type(norm).__name__} is no gated norm that the captured step computes")


def forget_kind(forget: Any, where: str) -> tuple[float, bool]:
    """Of the module that makes a delta net's decays of products: the bound of their logarithms, 0 if they are minus a
    softplus, and whether they are rounded to the model's dtype. Raises NotCapturableError for others."""
    heads, dim = int(forget.num_heads), int(forget.head_dim)
    generator = torch.Generator().manual_seed(0)
    sizes = {name: tensor.shape for name, tensor in forget.named_parameters(recurse=False)}
    drawn = {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in sizes.items()}
    probe = copy.copy(forget)
    object.__setattr__(probe, "_modules", {name: nn.Identity() for name, _ in forget.named_children()})
    object.__setattr__(probe, "_parameters", drawn)
    x = torch.randn((1, _PROBES, heads * dim), generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        found = _ran(lambda value: probe(value).flatten(2), x, where)
        heat = x.float().view(-1, heads, dim) + drawn["dt_bias"].view(heads, dim)
        speed = drawn["A_log"].exp().view(heads, 1)
        for bound in (0.0, *_floats(forget, ("lower_bound", "gate_lower_bound"))):
            wanted = bound * torch.sigmoid(speed * heat) if bound else -speed * functional.softplus(heat)
            wanted = wanted.view(x.shape).to(found.dtype)
            if torch.allclose(wanted, found, rtol=1e-2 if found.dtype == x.dtype else 1e-4, atol=1e-5):
                return bound, found.dtype == x.dtype
    raise NotCapturableError(f"{where}: {type(forget).__name__} makes other decays than the captured step computes")


@torch.no_grad()
def grouped_norm(norm: nn.Module, groups: int, where: str) -> tuple[Tensor, int]:
    """The weight of an RMS norm of elements that are multiplied by the SiLU of a gate before, all in float32; and the
    number of parts that it takes apart, which is that of the groups or 1. Raises NotCapturableError for others."""
    weight, given, x, gate, found = _gated(norm, torch.float32, where)
    for parts in (groups, 1):
        value = _normalised((x * functional.silu(gate)).view(_PROBES, parts, -1), norm_eps(norm))
        if torch.allclose(value.flatten(-2) * given, found, rtol=1e-4, atol=1e-5):
            return weight, parts
    raise NotCapturableError(f"{where}: {type(norm).__name__} is no gated norm that the captured step computes")


def _gated(norm: nn.Module, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weight [H] of a norm that takes a gate; and in `dtype` a random weight [H], random elements and gates
    [_PROBES, H], and the norm's result of these. Raises NotCapturableError if it has no weight or does not run."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise NotCapturableError(f"{where}: {type(norm).__name__} has no weight")
    probe = copy.deepcopy(norm).to_empty(device="cpu").to(dtype)
    drawn = torch.randn((3, _PROBES, *weight.shape), generator=torch.Generator().manual_seed(0))
    given, x, gate = drawn.to(dtype)
    assert isinstance(probe.weight, Tensor)
    probe.weight.data = given[0]
    return weight, given[0], x, gate, _ran(lambda value: probe(value, gate), x, where)


def gate_kind(module: Any, intermediate: int, where: str) -> GateKind:
    """The gated product of an experts module, or of one that every token goes through.

    Raises NotCapturableError if it is not one of `GateKind`.
    """
    alternates = not getattr(module, "is_concatenated", True)
    gate, up = torch.randn((2, _PROBES, intermediate), generator=torch.Generator().manual_seed(0)) * 10.0
    rows = torch.stack([gate, up], dim=-1).flatten(-2) if alternates else torch.cat([gate, up], dim=-1)
    found = _ran(getattr(module, "_apply_gate", None) or _without_products(module, intermediate), rows, where)
    alphas, limits = ((1.0, *_floats(module, _ALPHAS)), (0.0, *_floats(module, _LIMITS)))
    slopes = [*((alpha, 0.0) for alpha in alphas), (GELU.alpha, GELU.cubic)]
    for (alpha, cubic), limit, shift in product(slopes, limits, (0.0, 1.0)):
        low, high = (gate.clamp(max=limit), up.clamp(-limit, limit)) if limit else (gate, up)
        wanted = (high + shift) * low * torch.sigmoid(alpha * (low + cubic * low**3))
        if wanted.shape == found.shape and torch.allclose(wanted, found, rtol=1e-4, atol=1e-5):
            return GateKind(alpha, limit, shift, cubic)
    raise NotCapturableError(
        f"{where}: {type(module).__name__} gates by a product that the captured step does not compute"
    )


def _without_products(mlp: nn.Module, intermediate: int) -> nn.Module:
    """The module as a function of what its first products give: it gets them side by side, and gives what its last
    product would get."""
    probe = copy.copy(mlp)
    kinds = {name: nn.Identity() for name in ("gate_up_proj", "input_linear", "down_proj", "output_linear", "w2")}
    first, second = _Part(slice(None, intermediate)), _Part(slice(intermediate, None))
    halves = {"gate_proj": first, "up_proj": second, "w1": first, "w3": second}
    found = {name: part for name, part in (kinds | halves).items() if name in mlp._modules}
    object.__setattr__(probe, "_modules", mlp._modules | found)
    return probe


class _Part(nn.Module):
    """A part of the last dimension."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self._part = part

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self._part]


def _normalised(x: Tensor, eps: float) -> Tensor:
    """[.., H] in float32, divided by the root of its mean square."""
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _floats(module: Any, names: tuple[str, ...]) -> list[float]:
    return [float(value) for name in names if (value := getattr(module, name, None)) is not None]


def _ran(part: Callable[[Tensor], Any], x: Tensor, where: str) -> Tensor:
    try:
        found = part(x)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise NotCapturableError(f"{where}: a part of the model does not run alone: {error}") from error
    need(isinstance(found, Tensor) and found.ndim == x.ndim, f"{where}: a part of the model gives no plain result")
    result: Tensor = found
    return result
