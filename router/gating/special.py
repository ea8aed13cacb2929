"""Gating rules that are no plain scored top-k: SparseMixer, shared experts inside the softmax, a class that skips.

The invariant is that of `rules.py`: equal to the router of a checkpoint from which the unavailable experts were
deleted. Source: transformers' `phimoe`, `inkling` and `zaya`; SparseMixer is arXiv 2409.12136.
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
    """Phi-3.5-MoE: experts are picked one after the other by the highest logit.

    A pick's weight is its softmax among the experts not picked yet whose logit is close enough to it. With one expert
    available the first pick alone exists.
    """

    takes_temperature: ClassVar[bool] = False

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

    The choice is by sigmoid plus correction bias; the router's fourth output are the gammas, so it changes as well.
    """

    takes_temperature: ClassVar[bool] = False

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        picks, router = call.picks, cast(Any, call.module)
        k, num_shared = picks.index.shape[-1], int(router.n_shared_experts)
        hidden, gate = call.hidden_states, router.weight
        # The router returns no logits of the shared experts. They are scored in the precision of those that it returns.
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
    """Zaya: the last router class is no expert but "skip", which is always available.

    The probabilities of the chosen classes are the weights; a chosen skip counts as a pick that does not exist.
    """

    takes_temperature: ClassVar[bool] = False

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        picks = call.picks
        classes = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)  # [T, E + 1]
        probs = torch.softmax(picks.logits.masked_fill(~classes, -torch.inf), dim=-1)
        choice = (probs.float() + cast(Tensor, call.module.balancing_biases)).masked_fill(~classes, -torch.inf)
        index = choice.topk(picks.index.shape[-1], dim=-1).indices
        exists = functional.pad(mask, (0, 1)).gather(-1, index)
        return picks.replaced(probs.gather(-1, index), index, exists, mask)
