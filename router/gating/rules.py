"""Gating rules: top-k picks and weights from a router's logits when only some experts are available.

One `TopKRule` lists the steps of a family's router: score, add a selection bias, limit the groups, choose, weigh.
Invariant: the result equals the output of the same router in a checkpoint without the unavailable experts' rows and
biases, with k' = min(k, available) picks. The rules use tensor operations only and never synchronise with the host, so
they may run inside graph capture. Source: the router modules of transformers 5.17 to 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from router.gating.call import Output, RouterCall

# -- scores: logits [T, E] with −inf at unavailable experts -> scores [T, E], 0 there ----------------------------------


def softmax(call: RouterCall, logits: Tensor) -> Tensor:
    """Softmax in float32 over the available experts."""
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def softmax_in_logits_dtype(call: RouterCall, logits: Tensor) -> Tensor:
    """Softmax over the available experts in the dtype of the logits; rounds as a bfloat16 router does."""
    return torch.softmax(logits, dim=-1)


def sigmoid(call: RouterCall, logits: Tensor) -> Tensor:
    """Sigmoid in the dtype of the logits."""
    return torch.sigmoid(logits)


def sigmoid_in_float32(call: RouterCall, logits: Tensor) -> Tensor:
    """Sigmoid in float32."""
    return torch.sigmoid(logits.float())


def configured_score(call: RouterCall, logits: Tensor) -> Tensor:
    """The activation that the router holds as `score_fn` (sigmoid, softplus then square root, ...)."""
    scores: Tensor = cast(Any, call.module).score_fn(logits)
    return scores


def logits_as_scores(call: RouterCall, logits: Tensor) -> Tensor:
    """The logits themselves; the weights are computed from the chosen logits."""
    return logits


# -- logits [T, E], where the router does not return them --------------------------------------------------------------


def logits_of_normed(call: RouterCall) -> Tensor:
    """Of a router that returns probabilities, and normalises and scales the hidden states by itself (Gemma's)."""
    router = cast(Any, call.module)
    logits: Tensor = router.proj(router.norm(call.hidden_states) * router.scale * router.scalar_root_size)
    return logits


# -- selection bias: added to the scores for the choice alone ----------------------------------------------------------


def no_bias(call: RouterCall) -> Tensor | None:
    """No bias: the scores decide the choice."""
    return None


def correction_bias(call: RouterCall) -> Tensor | None:
    """`e_score_correction_bias` of the router, [E]."""
    return cast(Tensor, call.module.e_score_correction_bias)


def statics_bias(call: RouterCall) -> Tensor | None:
    """The bias [E] that ERNIE keeps in `moe_statics`."""
    return cast(Tensor, cast(Any, call.module).moe_statics.e_score_correction_bias).reshape(-1)


@dataclass(frozen=True)
class BiasArgument:
    """The selection bias [E] (or None) that the block hands to the router as its second forward argument."""

    name: str

    def __call__(self, call: RouterCall) -> Tensor | None:
        bias: Tensor | None = call.argument(1, self.name)
        return bias


# -- weights: chosen scores [T, K], 0 where the pick does not exist -> weights [T, K] ----------------------------------


def kept(call: RouterCall, chosen: Tensor, exists: Tensor) -> Tensor:
    """The chosen scores, unchanged."""
    return chosen


@dataclass(frozen=True)
class Renormalised:
    """The scores divided by their sum. A family adds `eps` to the sum, or clamps it at the router's attribute `floor`.

    `when` names the router's switch.
    """

    eps: float = 0.0
    floor: str | None = None
    when: str | None = None

    def __call__(self, call: RouterCall, chosen: Tensor, exists: Tensor) -> Tensor:
        if self.when is not None and not getattr(call.module, self.when):
            return chosen
        total = chosen.sum(dim=-1, keepdim=True)
        if self.floor is not None:
            total = total.clamp(min=getattr(call.module, self.floor))
        return chosen / (total + self.eps if self.eps else total)


def softmax_of_chosen(call: RouterCall, chosen: Tensor, exists: Tensor) -> Tensor:
    """Softmax over the chosen logits, in their dtype."""
    return torch.softmax(chosen.masked_fill(~exists, -torch.inf), dim=-1)


def renormalised_sigmoid_of_chosen(call: RouterCall, chosen: Tensor, exists: Tensor) -> Tensor:
    """Sigmoid of the chosen logits, divided by their sum if the router's `norm_topk_prob` is set."""
    weights = torch.sigmoid(chosen.masked_fill(~exists, -torch.inf))
    return weights / weights.sum(dim=-1, keepdim=True) if call.module.norm_topk_prob else weights


def configured_weights_of_chosen(call: RouterCall, chosen: Tensor, exists: Tensor) -> Tensor:
    """Softmax in float32 or sigmoid over the chosen logits, by the router's `expert_selection_fn`."""
    if call.module.expert_selection_fn == "softmax":
        return softmax_of_chosen(call, chosen.float(), exists)
    return renormalised_sigmoid_of_chosen(call, chosen, exists)


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupLimit:
    """Choose `topk_group` of `num_group` groups of experts first (attributes of the router).

    `score` is a group's score: the sum of its best two members or its best one. `outside` replaces the choice scores of
    experts in the other groups. A group is scored by its available members, and an empty group is never chosen. While
    the chosen groups hold fewer than k' available experts, the next best group is chosen too.
    """

    score: Literal["top2", "max"] = "top2"
    outside: float = -torch.inf
    when: Callable[[nn.Module], bool] = field(default=lambda module: getattr(module, "num_group", None) is not None)

    def limit(self, module: nn.Module, choice: Tensor, mask: Tensor, k: int) -> Tensor:
        """Choice scores [T, E] (−inf at unavailable experts) -> the same with experts of the other groups replaced."""
        num_groups, topk_groups = int(module.num_group), int(module.topk_group)  # type: ignore[arg-type]
        grouped = choice.view(len(choice), num_groups, -1)  # [T, G, E/G]
        available = mask.view(len(mask), num_groups, -1).sum(dim=-1)  # [T, G]
        best = grouped.topk(min(2 if self.score == "top2" else 1, grouped.shape[-1]), dim=-1).values
        scores = best.masked_fill(best == -torch.inf, 0.0).sum(dim=-1).masked_fill(available == 0, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)  # [T, G], best group first
        ordered = available.gather(-1, order)
        held_before = ordered.cumsum(dim=-1) - ordered
        rank = torch.arange(num_groups, device=choice.device)
        chosen = (rank < topk_groups) | (held_before < mask.sum(dim=-1, keepdim=True).clamp(max=k))
        chosen = torch.zeros_like(chosen).scatter(-1, order, chosen)
        outside = ~chosen.unsqueeze(-1).expand_as(grouped).flatten(-2)
        return choice.masked_fill(outside & mask, self.outside)


@dataclass(frozen=True)
class TopKRule:
    """The rule of a router that scores every expert, chooses the top k and weighs them.

    Each field is a step; the defaults are the softmax routers'. `scale` and `expert_scale` (by expert, [E]) name the
    router's attributes that multiply the weights. `logits` recomputes the logits if the router does not return them.
    """

    scores: Callable[[RouterCall, Tensor], Tensor] = softmax
    bias: Callable[[RouterCall], Tensor | None] = no_bias
    groups: GroupLimit | None = None
    weights: Callable[[RouterCall, Tensor, Tensor], Tensor] = kept
    scale: str | None = None
    logits: Callable[[RouterCall], Tensor] = field(default=lambda call: call.picks.logits)
    expert_scale: str | None = None
    takes_temperature: ClassVar[bool] = True
    takes_mask: ClassVar[bool] = True

    @property
    def scores_returned_logits(self) -> bool:
        """Whether it scores the logits of the call's output, so that other logits there give another choice."""
        return self.logits is TopKRule.logits

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """See `GatingRule.masked`."""
        module, picks = call.module, call.picks
        k = picks.index.shape[-1]
        logits = self.logits(call)
        if temperature is not None:
            logits = logits / temperature[:, None].to(logits.dtype)
        scores = self.scores(call, logits.masked_fill(~mask, -torch.inf))  # [T, E]
        bias = self.bias(call)
        choice = (scores if bias is None else scores + bias).masked_fill(~mask, -torch.inf)
        if self.groups is not None and self.groups.when(module):
            choice = self.groups.limit(module, choice, mask, k)
        index = choice.topk(k, dim=-1).indices  # [T, K]
        exists = mask.gather(-1, index)
        chosen = scores.gather(-1, index).masked_fill(~exists, 0.0)
        weights = self.weights(call, chosen, exists)
        if self.scale is not None:
            weights = weights * getattr(module, self.scale)
        if self.expert_scale is not None:
            weights = weights * getattr(module, self.expert_scale)[index]
        return picks.replaced(weights, index, exists, mask, temperature=temperature)
