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


def pruned_model(model: nn.Module, keep: Sequence[Sequence[int]]) -> nn.Module | None:
    """A copy of the model with the experts `keep[l]` alone in MoE layer l.

    Grouped routers ask for two experts at least: beside a single one stays another that a correction bias of −1e9 keeps
    from being picked. None where transformers cannot run so few experts (SparseMixer always makes two picks).
    """
    pruned = copy.deepcopy(model)
    for (block, router, experts), kept in zip(moe_blocks(pruned), keep, strict=True):
        if hasattr(router, "router_jitter_noise") and len(kept) < 2:
            return None
        alone = len(kept) == 1 and getattr(router, "num_group", None) is not None
        kept = [*kept, (kept[0] + 1) % NUM_EXPERTS] if alone and hasattr(router, "e_score_correction_bias") else kept
        for module in (router, experts):
            _prune_tensors(module, kept)
        _prune_own_tensors(block, kept)
        _shrink_counts(router, len(kept))
        for name in _COUNTS:
            if isinstance(getattr(experts, name, None), int):
                setattr(experts, name, len(kept))
        if len(kept) > len(keep[0]):
            router.e_score_correction_bias[1] = -1e9
            router.top_k = 1
    return pruned
