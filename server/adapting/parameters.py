"""The trainable parameters of an adapter: which modules of a trunk it changes, and the values before training.

Invariant: before the first step the changed model equals the model. The modules are found by a short forward, since a
change goes token by token and some families' layers see their tokens in another order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from server.model.runner import SelectiveModel
from server.model.seam.changed import Kept, experts_modules
from server.model.seam.trunk import is_experts_module

Parameters = dict[str, dict[str, nn.Parameter]]
"""Module of the trunk → part of an adapter → float32 parameter."""
_TRIAL = (3, 5)
"""Sequences and tokens of the short forward: two numbers that no shape of a model is likely to have."""


def make_parameters(model: SelectiveModel, rank: int, seed: int, shared_width: int = 0) -> Parameters:
    """Parameters that change nothing yet, hooked into the model.

    Args:
        rank: of the changes of linear layers; 0 changes whole matrices.
        shared_width: intermediate columns of an expert that each layer gets for every token; 0: none.
    """
    generator = torch.Generator().manual_seed(seed)
    routers = {model.routing.router(layer): layer for layer in range(model.num_layers)}
    names = {module: name for name, module in model.model.named_modules()}
    found: Parameters = {}
    for router, layer in routers.items():
        parts = {"gain": torch.zeros(model.store.manifest.model.num_experts)}
        weight: Any = getattr(router, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and model.routing.takes_delta(layer):
            parts["delta"] = torch.zeros(tuple(weight.shape))
        found[names[router]] = _trainable(parts, model.device)
    for name, module in _by_token(model).items():
        weight = module.weight
        if isinstance(module, nn.Linear):
            parts = _linear(weight, rank, generator)
        else:
            parts = {"scale": torch.zeros(len(weight))}
        found[name] = _trainable(parts, model.device)
    if shared_width:
        hidden_size = int(model.model.config.get_text_config().hidden_size)
        for module, name in names.items():
            if is_experts_module(module):
                found[name] = _trainable(_shared(shared_width, hidden_size, generator), model.device)
    model.routing.install_adapters(model.model, found)
    return found


def expert_parameters(model: SelectiveModel, kept: Kept, rank: int, seed: int) -> Parameters:
    """Parameters that change nothing yet of the matrices of some experts, as `changed_experts` takes them.

    Args:
        rank: of the changes; 0 changes whole matrices.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    modules = experts_modules(model.model)
    found: Parameters = {}
    for spec, experts in zip(model.store.manifest.layers, kept, strict=True):
        for tensor in spec.tensors:
            if len(tensor.shape) != 2:
                continue
            is_turned = tensor.encoding is not None and bool(modules[spec.layer].is_transposed)
            shape = tensor.shape[::-1] if is_turned else tensor.shape
            parts = [_linear(torch.empty(shape, device="meta"), rank, generator) for _ in experts]
            stacked = {part: torch.stack([one[part] for one in parts]) for part in parts[0]}
            found[f"{spec.module}.{tensor.name}"] = _trainable(stacked, model.device)
    return found


def _linear(weight: Tensor, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    if rank == 0 or rank * (inputs + outputs) >= inputs * outputs:
        return {"delta": torch.zeros(outputs, inputs)}
    first = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
    return {"lora_A": first, "lora_B": torch.zeros(outputs, rank)}


def _shared(width: int, hidden_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    gate, up = torch.randn(2, width, hidden_size, generator=generator) / math.sqrt(hidden_size)
    return {"gate": gate.clone(), "up": up.clone(), "down": torch.zeros(hidden_size, width)}


def _trainable(parts: dict[str, Tensor], device: torch.device) -> dict[str, nn.Parameter]:
    return {part: nn.Parameter(tensor.to(device)) for part, tensor in parts.items()}


def _by_token(model: SelectiveModel) -> dict[str, Any]:
    """Linear layers and norms of the layers that see [sequences, tokens, ...] or [sequences × tokens, ...], by name."""
    head: nn.Module | None = model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    taken: dict[str, Any] = {}
    others: set[str] = set()
    num_sequences, num_tokens = _TRIAL

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        if shape[:2] == _TRIAL or (len(shape) == 2 and shape[0] == num_sequences * num_tokens):
            taken[name] = module
        else:
            others.add(name)

    hooks = []
    experts = tuple(f"{name}." for name, module in model.model.named_modules() if is_experts_module(module))
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = type(module).__name__.endswith("Norm") and isinstance(weight, Tensor) and weight.dim() == 1
        if (type(module) is nn.Linear or is_norm) and module is not head and not name.startswith(experts):
            hooks.append(module.register_forward_pre_hook(lambda one, args, name=name: note(name, one, args)))
    try:
        model.routing.begin(*_TRIAL)
        with torch.no_grad():
            model.model(input_ids=torch.zeros(_TRIAL, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        model.routing.abandon()
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in taken.items() if name not in others}
