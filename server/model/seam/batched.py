"""All experts of a layer in a few products, for training: nothing is looked up, nothing waits for the device.

Invariant: the products read the slots' weights as they were when `batched_experts` began, so every expert stays in its
slot while it is on. Sums round in another order than `ExpertsLayer`, and bits depend on the batch: not for serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from expert_store.residency.cache import ExpertCache
from server.model.seam.experts import LAYER_ATTRIBUTE, ExpertsLayer
from server.model.seam.trunk import is_experts_module

DENSE_COLUMNS = 4096
"""Layers with so few intermediate columns, of all experts together, compute every expert for every token."""

Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def batched_experts(model: nn.Module, cache: ExpertCache) -> Iterator[bool]:
    """Compute the experts of `model` so inside; yields False, and changes nothing, if they are not all plain numbers
    in slots."""
    everything = [pool.num_slots == cache.num_experts and not pool.encodings for pool in cache.pools]
    if not (all(everything) and bool((cache.page_table >= 0).all())):
        yield False
        return
    modules = [module for module in model.modules() if is_experts_module(module)]
    layers: list[ExpertsLayer] = [getattr(module, LAYER_ATTRIBUTE) for module in modules]
    for module, layer in zip(modules, layers, strict=True):
        params = cache.pools[layer.layer].params
        slots = torch.from_numpy(cache.page_table[layer.layer].astype(np.int64)).to(cache.device)
        layer.batched = together(module, params, slots)
    try:
        yield True
    finally:
        for layer in layers:
            layer.batched = None


def together(module: Any, params: dict[str, Tensor], places: Tensor) -> Forward:
    """The forward of an experts module with the parameters `params` [K, ..], in which `places` int64 [E] finds each
    expert; those of experts that no token has are of no matter."""
    return _dense(module, params, places) or _grouped(module, params, places)


def _dense(module: Any, params: dict[str, Tensor], slots: Tensor) -> Forward | None:
    """Every expert for every token; None for experts that are too large or of another form."""
    plain = module.has_gate and not (module.is_transposed or module.has_bias)
    is_usual = getattr(type(module), "_apply_gate", None) is _default_apply_gate  # act_fn(gate) * up
    if not (plain and is_usual) or getattr(module, "has_post_expert_norm", False):
        return None
    num_experts, hidden_size, width = params["down_proj"].shape
    if num_experts * width > DENSE_COLUMNS:
        return None
    gate, up = (half.reshape(-1, hidden_size) for half in params["gate_up_proj"].chunk(2, dim=1))  # [E·I, H]
    down = params["down_proj"].transpose(1, 2).reshape(-1, hidden_size)  # [E·I, H]
    places = functional.pad(slots, (0, 1), value=num_experts)  # a pick that does not exist has id E

    def forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        gates = weights.new_zeros(len(hidden), num_experts + 1).scatter(1, places[index], weights)[:, :num_experts]
        activated = self.act_fn(functional.linear(hidden, gate)) * functional.linear(hidden, up)  # [T, E·I]
        weighted: Tensor = activated.view(len(hidden), num_experts, -1) * gates.to(hidden.dtype).unsqueeze(-1)
        return weighted.flatten(1) @ down

    return forward


def _grouped(module: Any, params: dict[str, Tensor], slots: Tensor) -> Forward:
    """transformers' grouped products over the pairs of tokens and experts, sorted by expert."""
    names = ("has_gate", "has_bias", "is_transposed", "act_fn", "_apply_gate", "post_expert_norm")
    flags = {name: getattr(module, name) for name in names if hasattr(module, name)}
    flags["has_post_expert_norm"] = getattr(module, "has_post_expert_norm", False)
    experts: Any = SimpleNamespace(**params, **flags, num_experts=len(params["down_proj"]), _is_expert_parallel=False)

    def forward(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        places = slots[index.clamp(max=len(slots) - 1)]  # a pick that does not exist has weight 0
        result: Tensor = grouped_mm_experts_forward(experts, hidden, places, weights)
        return result

    return forward
