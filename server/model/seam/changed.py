"""Some experts of a model with trainable changes, which tokens with an adapter have; others have them as they are.

Invariant: a changed expert is rounded to the dtype of the computation, so it is the one that is written afterwards if
the store has that dtype. All of a layer's changed experts are computed in a few products, as in `batched`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expert_store.adapter import Changes
from expert_store.rows import plain_values
from expert_store.store import Store
from server.model.runner import SelectiveModel
from server.model.seam.batched import together
from server.model.seam.experts import LAYER_ATTRIBUTE, ExpertsLayer
from server.model.seam.trunk import is_experts_module

Kept = Sequence[Sequence[int]]
"""The experts of each MoE layer that may change."""


def changed(weights: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """weights [K, rows, columns] with their change, in their dtype: lora_A [K, R, columns] and lora_B [K, rows, R], or
    delta [K, rows, columns], all float32."""
    change = parts["delta"] if "delta" in parts else parts["lora_B"] @ parts["lora_A"]
    return (weights.float() + change).to(weights.dtype)


def read_experts(store: Store, layer: int, experts: Sequence[int], transposed: bool) -> dict[str, Tensor]:
    """The tensors [K, *shape] of some experts of a layer by name, as transformers' experts module has them; encoded
    ones are dequantised. Raises StoreError."""
    spec = store.manifest.layers[layer]
    found = []
    for expert in experts:
        span = torch.empty(spec.span_bytes, dtype=torch.uint8)
        store.read_expert(layer, expert, span)
        found.append(plain_values(spec, span, transposed=transposed))
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def experts_modules(model: nn.Module) -> dict[int, Any]:
    """The experts modules of a host-driven model by their MoE layer."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    return {getattr(module, LAYER_ATTRIBUTE).layer: module for module in modules}


@contextmanager
def changed_experts(model: SelectiveModel, kept: Kept, changes: Changes) -> Iterator[None]:
    """Inside, tokens with an adapter have the experts `kept` with `changes`, by experts module and tensor, such as
    `model.layers.0.mlp.experts.down_proj`; they may choose no other ones.

    Raises:
        StoreError: an expert cannot be read.
    """
    modules = experts_modules(model.model)
    layers: list[ExpertsLayer] = []
    before = []
    for at, experts in enumerate(kept):
        module, spec = modules[at], model.store.manifest.layers[at]
        layer: ExpertsLayer = getattr(module, LAYER_ATTRIBUTE)
        values = read_experts(model.store, at, experts, module.is_transposed)
        base = {name: value.to(model.device, model.dtype) for name, value in values.items()}
        own = {name: changes[f"{spec.module}.{name}"] for name in base if f"{spec.module}.{name}" in changes}
        places = np.zeros(model.store.manifest.model.num_experts, dtype=np.int64)
        places[list(experts)] = np.arange(len(experts))
        layers.append(layer)
        before.append(layer.batched)
        layer.batched = _Layer(model, layer, base, own, torch.from_numpy(places).to(model.device))
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.batched = forward


def copied_bytes(model: nn.Module) -> int:
    """Bytes of the copies of experts that `changed_experts` holds; 0 outside."""
    layers = [getattr(module, LAYER_ATTRIBUTE).batched for module in experts_modules(model).values()]
    return sum(layer.copied_bytes for layer in layers if isinstance(layer, _Layer))


class _Layer:
    """The forward of a layer's experts, with changes or without."""

    def __init__(
        self,
        model: SelectiveModel,
        layer: ExpertsLayer,
        base: dict[str, Tensor],
        changes: Mapping[str, Mapping[str, Tensor]],
        places: Tensor,
    ) -> None:
        self._adapters, self._layer, self._without = model.routing.adapters, layer, layer.batched
        self._base, self._changes, self._places = base, changes, places

    @property
    def copied_bytes(self) -> int:
        """Bytes of the experts as they were."""
        return sum(value.nbytes for value in self._base.values())

    def __call__(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if not self._adapters.is_on:
            if self._without is not None:
                return self._without(module, hidden, index, weights)
            return self._layer.forward(module, hidden, index, weights)
        params = {
            name: changed(value, self._changes[name]) if name in self._changes else value
            for name, value in self._base.items()
        }
        return together(module, params, self._places)(module, hidden, index, weights)
