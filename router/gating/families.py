"""Which gating rule each model family of transformers has: one small record a family.

A rule is looked up by the model folder that defines the router's class. Invariant: a router whose rule is not known is refused, never guessed. Source: the routers' forwards in transformers
5.17 to 5.23.
"""

from __future__ import annotations

from torch import nn

from router.gating.rules import GatingRule, Renormalised, TopKRule

_SOFTMAX = TopKRule(weights=Renormalised(when="norm_topk_prob"))
_SOFTMAX_RENORMALISED = TopKRule(weights=Renormalised())

RULES: dict[str, GatingRule] = {
    "mixtral": _SOFTMAX_RENORMALISED,
    "olmoe": _SOFTMAX,
    "qwen2_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
}


class UnsupportedGatingError(ValueError):
    """No exact masked counterpart of this router is known."""


def family_of(module: nn.Module) -> str | None:
    """The model folder of transformers that defines the module's class; None where it comes from elsewhere."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def find_gating_rule(model_type: str, module: nn.Module) -> GatingRule:
    """The rule of the router `module` of a model whose config says `model_type`. Raises `UnsupportedGatingError`."""
    rule = RULES.get(family_of(module) or model_type)
    if rule is None:
        raise UnsupportedGatingError(
            f"no gating rule is known for the router {type(module).__name__} of model type {model_type!r}; "
            f"known families: {', '.join(sorted(RULES))}. Serve it without a mask, or add its rule to "
            "router/gating/families.py."
        )
    return rule
