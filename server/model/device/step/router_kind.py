"""The captured router's switches: maps the family's gating rule to constants of the kernel.

The rules in `router.gating` define the host-driven path; this module maps those that the kernel computes, and refuses
the others with the reason. It finds the places of rounding by running the router itself in half precision on the meta
device. Invariant: a rule with an unknown function is refused, never guessed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from router.errors import UnsupportedGatingError
from router.gating import RouterCall, find_gating_rule, rules
from router.gating.rules import BiasArgument, Renormalised, TopKRule
from router.gating.special import SparseMixerRule
from server.errors import ServerError
from server.model.device.step.tuning import pow2

Scores = Literal["softmax", "sigmoid"]
_SCORES: dict[Any, Scores] = {
    rules.softmax: "softmax", rules.sigmoid: "sigmoid", rules.sigmoid_in_float32: "sigmoid",
    rules.logits_as_scores: "softmax",
}  # fmt: skip


class RouterRefusedError(ServerError):
    """The kernel does not compute this router; the message gives the reason."""


@dataclass(frozen=True)
class RouterKind:
    """The way from gate logits [B, E] to the top-k and their weights.

    Attributes:
        scores: softmax over the available experts, chosen by logits unless there is a bias; or sigmoid of each expert.
        renormalise: weights are divided by their sum, plus `eps`, or by `floor` if that is more.
        selection_bias: name of the attribute of router or block that is added to scores for the choice; None: none.
        groups, kept_groups: the choice is among the best `kept_groups` of `groups` groups of experts.
        group_best: number of best members whose scores sum to the group's score, 1 or 2.
        by_logits: the choice is by logits, plus the bias, though scores are a sigmoid of each.
        scale: factor of the weights.
        tolerance: weights are those of SparseMixer, with this relative distance of logits; 0: they are not.
        own_norm: the gate reads the hidden state normalised for it alone, times this factor; 0: as the experts do.
        expert_factors: name of the router's attribute [E] by which weights are multiplied; None: none.
        exact_logits, exact_scores, exact_weights: kept in float32 where the model's dtype is a half one.
    """

    scores: Scores = "softmax"
    renormalise: bool = True
    eps: float = 0.0
    floor: float = 0.0
    selection_bias: str | None = None
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 2
    by_logits: bool = False
    scale: float = 1.0
    tolerance: float = 0.0
    own_norm: float = 0.0
    expert_factors: str | None = None
    exact_logits: bool = False
    exact_scores: bool = True
    exact_weights: bool = False


SOFTMAX_TOP_K = RouterKind()


def router_kind(model_type: str, router: Any, block: Any) -> RouterKind:
    """The kind of the router module beside a layer's experts in `block`, which may be on the meta device.

    Raises RouterRefusedError if the kernel does not compute this router.
    """
    try:
        rule = find_gating_rule(model_type, router)
    except UnsupportedGatingError as error:
        raise RouterRefusedError(str(error)) from error
    if isinstance(rule, SparseMixerRule):
        logits, weights = _dtypes(router, block, None, TopKRule(), router_product(router)[0].shape[-1])
        return RouterKind(
            renormalise=False, tolerance=2 * float(router.router_jitter_noise), exact_logits=logits == torch.float32,
            exact_weights=weights == torch.float32,
        )  # fmt: skip
    has_norm = type(rule) is TopKRule and rule.logits is rules.logits_of_normed
    if type(rule) is not TopKRule or not (rule.scores_returned_logits or has_norm):
        raise RouterRefusedError(f"the router {type(router).__name__} is no plain scored top-k")
    if rule.scores not in _SCORES:
        raise RouterRefusedError(f"the router's scores are {getattr(rule.scores, '__name__', rule.scores)}")
    chosen_first = rule.scores is rules.logits_as_scores
    scores = _scores_of_chosen(rule, router) if chosen_first else _SCORES[rule.scores]
    width = router_product(router)[0].shape[-1]
    bias = _bias_name(rule, router, block)
    if bias is not None and chosen_first and scores == "softmax":
        raise RouterRefusedError("the router adds a selection bias to logits that it weighs by a softmax")
    renormalise, eps = _renormalised(rule, router, chosen_first)
    groups, kept, best = _groups(rule, router)
    if groups > 1 and scores != "sigmoid" and (best > 1 or bias is not None):
        raise RouterRefusedError("the router limits groups of experts by sums of softmax scores")
    logits_dtype, weights_dtype = _dtypes(router, block, bias, rule, width)
    return RouterKind(
        scores=scores,
        renormalise=renormalise,
        eps=eps,
        floor=_floor(rule, router),
        selection_bias=bias,
        groups=groups,
        kept_groups=kept,
        group_best=best,
        by_logits=chosen_first and scores == "sigmoid",
        scale=1.0 if rule.scale is None else float(getattr(router, rule.scale)),
        own_norm=float(router.scalar_root_size) if has_norm else 0.0,
        expert_factors=rule.expert_scale,
        exact_logits=logits_dtype == torch.float32,
        exact_scores=scores != "sigmoid" or rule.scores is rules.sigmoid_in_float32 or logits_dtype == torch.float32,
        exact_weights=weights_dtype == torch.float32,
    )


def router_product(router: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [E, H] and the bias [E] of a router, which holds them itself or in its one plain product.

    Raises RouterRefusedError if it does neither.
    """
    products = [child for child in router.children() if isinstance(child, nn.Linear)]
    owner = products[0] if len(products) == 1 else router
    weight, bias = getattr(owner, "weight", None), getattr(owner, "bias", None)
    if not isinstance(weight, torch.Tensor):
        raise RouterRefusedError(f"the router {type(router).__name__} is not one product")
    return weight, bias if isinstance(bias, torch.Tensor) else None


def selection_bias(kind: RouterKind, router: Any, block: Any) -> torch.Tensor | None:
    """The router's or block's bias [E] in float32; None if the kind has none."""
    if kind.selection_bias is None:
        return None
    owner = router if hasattr(router, kind.selection_bias.partition(".")[0]) else block
    found: torch.Tensor = attrgetter(kind.selection_bias)(owner)
    return found.detach().float().flatten().contiguous()


def _bias_name(rule: TopKRule, router: Any, block: Any) -> str | None:
    if rule.bias is rules.no_bias:
        return None
    if rule.bias is rules.statics_bias:
        return "moe_statics.e_score_correction_bias"
    name = rule.bias.name if isinstance(rule.bias, BiasArgument) else "e_score_correction_bias"
    owner = block if isinstance(rule.bias, BiasArgument) else router
    if rule.bias is not rules.correction_bias and not isinstance(rule.bias, BiasArgument):
        raise RouterRefusedError("the router's selection bias is kept elsewhere than in the router")
    bias = getattr(owner, name, None)
    if bias is None and isinstance(rule.bias, BiasArgument):
        raise RouterRefusedError(f"the block has no {name} for its router")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise RouterRefusedError(f"the router's {name} is no tensor")
    return None if bias is None else name


def _scores_of_chosen(rule: TopKRule, router: Any) -> Scores:
    """The function that weighs the chosen logits."""
    if rule.weights is rules.softmax_of_chosen:
        return "softmax"
    if rule.weights is rules.configured_weights_of_chosen:
        return "softmax" if router.expert_selection_fn == "softmax" else "sigmoid"
    if rule.weights is rules.renormalised_sigmoid_of_chosen:
        return "sigmoid"
    raise RouterRefusedError("the router weighs chosen logits otherwise than by a softmax or a sigmoid")


def _renormalised(rule: TopKRule, router: Any, chosen_first: bool) -> tuple[bool, float]:
    if chosen_first:
        return _scores_of_chosen(rule, router) == "softmax" or bool(router.norm_topk_prob), 0.0
    if rule.weights is rules.kept:
        return False, 0.0
    if not isinstance(rule.weights, Renormalised) or (
        rule.weights.floor is not None and rule.scores is not rules.softmax
    ):
        raise RouterRefusedError("the router's weights follow from the chosen scores in a way of their own")
    active = rule.weights.when is None or bool(getattr(router, rule.weights.when))
    return active, rule.weights.eps if active else 0.0


def _floor(rule: TopKRule, router: Any) -> float:
    named = isinstance(rule.weights, Renormalised) and rule.weights.floor
    return float(getattr(router, named)) if named else 0.0


def _groups(rule: TopKRule, router: Any) -> tuple[int, int, int]:
    limit = rule.groups
    if limit is None or not limit.when(router) or int(router.num_group) == 1:
        return 1, 1, 2
    if limit.outside != float("-inf"):
        raise RouterRefusedError("the router gives experts of other groups a score")
    return int(router.num_group), int(router.topk_group), 2 if limit.score == "top2" else 1


def _dtypes(router: Any, block: Any, bias: str | None, rule: TopKRule, width: int) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the logits that the rule scores, and of the weights, of the same router in bfloat16, on the meta
    device."""
    meta = copy.deepcopy(router).to("meta").to(torch.bfloat16)
    argument = isinstance(rule.bias, BiasArgument) and bias is not None
    more = (getattr(block, str(bias)).detach().to("meta"),) if argument else ()
    problem: Exception | None = None
    for size in ((1, width), (1, 1, width)):  # some routers take the tokens of each sequence apart
        given = (torch.empty(size, dtype=torch.bfloat16, device="meta"), *more)
        try:
            call = RouterCall.of(meta, given, {}, meta(*given))
            return rule.logits(call).dtype, call.picks.weights.dtype
        except (RuntimeError, TypeError, ValueError) as error:
            problem = error
    raise RouterRefusedError(f"the router cannot be asked for its dtypes: {problem}") from problem


def switches(kind: RouterKind, dtype: torch.dtype) -> dict[str, bool | int | float]:
    """The kind as compile-time constants of `kernels.routing.route`, for a model of `dtype`."""
    sigmoid = kind.scores == "sigmoid"
    return {
        "SIGMOID": sigmoid,
        "BY_LOGITS": kind.by_logits,
        "GATE_NORM": kind.own_norm,
        "TOLERANCE": kind.tolerance,
        "RENORMALISE": kind.renormalise,
        "EPS": kind.eps,
        "FLOOR": kind.floor,
        "SCALE": kind.scale,
        "GROUPS": kind.groups,
        "GP": pow2(kind.groups),
        "KEPT": kind.kept_groups,
        "BEST": kind.group_best,
        "SELECTION_BIAS": kind.selection_bias is not None,
        "EXACT_LOGITS": kind.exact_logits,
        "EXACT_SCORES": kind.exact_scores,
        "EXACT_WEIGHTS": kind.exact_weights,
        "NARROW": dtype == torch.bfloat16 and not sigmoid and not kind.exact_logits and kind.selection_bias is None,
    }
