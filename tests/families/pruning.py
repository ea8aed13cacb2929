"""Physically pruned copies of routers and models: rows, biases and correction biases of the other experts deleted.

This is what masked routing is held against. Nothing of `router` is used here; transformers' own forward runs on fewer
experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.families.checkpoints import NUM_EXPERTS, moe_blocks

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")


def _kept_rows(tensor: Tensor, keep: Sequence[int]) -> Tensor | None:
    """`tensor` without the rows of experts that are not kept; rows after the experts' stay. None if it has none."""
    for dim, size in enumerate(tensor.shape[:2]):
        if size in (NUM_EXPERTS, NUM_EXPERTS + 1, NUM_EXPERTS + 2) and (dim == 0 or tensor.shape[0] == 1):
            return tensor.index_select(dim, torch.tensor([*keep, *range(NUM_EXPERTS, size)]))
    return None


def _prune_tensors(module: nn.Module, keep: Sequence[int]) -> None:
    for owner in module.modules():
        _prune_own_tensors(owner, keep)


def _prune_own_tensors(module: nn.Module, keep: Sequence[int]) -> None:
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        kept = _kept_rows(tensor.data, keep)
        if kept is not None:
            store = module._parameters if name in module._parameters else module._buffers
            store[name] = nn.Parameter(kept, requires_grad=False) if name in module._parameters else kept


def _shrink_counts(module: nn.Module, num_experts: int) -> None:
    """Set the numbers of experts and of picks, also in a copy of the config where the module reads them there."""
    if hasattr(module, "config"):
        module.config = copy.deepcopy(module.config)
    for holder in (module, getattr(module, "config", None)):
        for name in _COUNTS:
            if holder is not None and isinstance(getattr(holder, name, None), int):
                setattr(holder, name, num_experts)
        for name in _TOP_K:
            top_k = getattr(holder, name, None) if holder is not None else None
            if isinstance(top_k, int):
                setattr(holder, name, min(top_k, num_experts))
    if hasattr(module, "num_router_classes"):
        module.num_router_classes = num_experts + 1


def pruned_router(router: nn.Module, keep: Sequence[int]) -> nn.Module:
    """A copy of the router that knows the experts `keep` alone and picks at most as many."""
    pruned = copy.deepcopy(router)
    _prune_tensors(pruned, keep)
    _shrink_counts(pruned, len(keep))
    return pruned


def pruned_model(model: nn.Module, keep: Sequence[Sequence[int]]) -> nn.Module:
    """A copy of the model with the experts `keep[l]` alone in MoE layer l."""
    pruned = copy.deepcopy(model)
    for (block, router, experts), kept in zip(moe_blocks(pruned), keep, strict=True):
        _prune_tensors(router, kept)
        _shrink_counts(router, len(kept))
        _prune_tensors(experts, kept)
        for name in _COUNTS:
            if isinstance(getattr(experts, name, None), int):
                setattr(experts, name, len(kept))
        _prune_own_tensors(block, kept)
        if isinstance(getattr(block, "top_k", None), int):
            block.top_k = min(block.top_k, len(kept))
    return pruned
