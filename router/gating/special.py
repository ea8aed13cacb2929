"""Gating rules that are no plain scored top-k: SparseMixer, shared experts in the normalisation, a class "skip", and
picks by token id.

Invariant, as in `rules.py`: the result equals the output of the router in a checkpoint without the unavailable experts.
Source: transformers' `phimoe`, `inkling`, `zaya` and `deepseek_v4`; SparseMixer is arXiv 2409.12136.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from router.gating.call import Output, RouterCall


@dataclass(frozen=True)
class SparseMixerRule:
    """Phi-3.5-MoE: the router picks experts one after the other by the highest logit.

    A pick's weight is its softmax among the experts that are not picked yet and whose logits are close enough to its
    own. With one expert available, only the first pick exists.
    """

    takes_temperature: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        picks = call.picks
        tolerance = 2 * cast(float, call.module.router_jitter_noise)
        scores = picks.logits.masked_fill(~mask, -torch.inf)  # [T, E]
        left = scores  # −inf at unavailable and at picked experts
        index, weights = [], []
        for _ in range(picks.index.shape[-1]):
            best, pick = left.max(dim=-1, keepdim=True)
            too_far = (best - scores) / scores.abs().clamp(min=best) > tolerance
            weights.append(torch.softmax(left.masked_fill(too_far, -torch.inf), dim=-1).gather(-1, pick))
            index.append(pick)
            left = left.scatter(-1, pick, -torch.inf)
        picked = torch.cat(index, dim=-1)
        nth = torch.arange(picked.shape[-1], device=mask.device)
        exists = nth < mask.sum(dim=-1, keepdim=True)
        return picks.replaced(torch.cat(weights, dim=-1), picked, exists, mask)


@dataclass(frozen=True)
class SharedSoftmaxRule:
    """Inkling: the chosen experts' weights and the shared experts' gammas share one normalisation.

    The router chooses by sigmoid plus correction bias. Its fourth output, the gammas, changes under a mask too.
    """

    takes_temperature: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        picks, router = call.picks, cast(Any, call.module)
        k, num_shared = picks.index.shape[-1], int(router.n_shared_experts)
        hidden, gate = call.hidden_states, router.weight
        # The router does not return the shared experts' logits: compute them in the precision of the returned logits.
        shared = functional.linear(hidden.to(picks.logits.dtype), gate[-num_shared:].to(picks.logits.dtype))
        choice = (picks.logits.sigmoid() + router.e_score_correction_bias).masked_fill(~mask, -torch.inf)
        index = choice.topk(k, dim=-1).indices  # [T, K]
        exists = mask.gather(-1, index)
        chosen = functional.logsigmoid(picks.logits.gather(-1, index)).masked_fill(~exists, -torch.inf)
        log_probs = torch.cat([chosen, functional.logsigmoid(shared)], dim=-1)
        weights = torch.softmax(log_probs, dim=-1) * router.route_scale * router.global_scale
        gammas = torch.where(mask.all(dim=-1, keepdim=True), picks.rest[0], weights[:, k:].to(picks.rest[0].dtype))
        return picks.replaced(weights[:, :k], index, exists, mask, rest=(gammas, *picks.rest[1:]))


@dataclass(frozen=True)
class SkipClassRule:
    """Zaya: the last router class is "skip" instead of an expert; it is always available.

    The weights are the probabilities of the chosen classes; a chosen "skip" is a pick that does not exist.
    """

    takes_temperature: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        picks = call.picks
        classes = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)  # [T, E + 1]
        probs = torch.softmax(picks.logits.masked_fill(~classes, -torch.inf), dim=-1)
        choice = (probs.float() + cast(Tensor, call.module.balancing_biases)).masked_fill(~classes, -torch.inf)
        index = choice.topk(picks.index.shape[-1], dim=-1).indices
        exists = functional.pad(mask, (0, 1)).gather(-1, index)
        return picks.replaced(probs.gather(-1, index), index, exists, mask)


@dataclass(frozen=True)
class TokenIdRule:
    """DeepSeek-V4's first layers: the picks come from a table by token id, and no score tells what else to pick.

    Such a layer has no masked counterpart: all its experts must be available, and the stock picks stay.
    """

    takes_temperature: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = False

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`; the caller hides no expert."""
        picks = call.picks
        return picks.replaced(picks.weights, picks.index, torch.ones_like(picks.index, dtype=torch.bool), mask)
