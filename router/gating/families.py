"""The gating rule of each model family of transformers: one small record for each family.

A rule is looked up by the model folder that defines the router's class. A family outside the table gets the rule of a
known family whose router has the same forward code. Invariant: a router without a known rule is refused, never guessed.
Source: the routers' forwards in transformers 5.17 to 5.23.
"""

from __future__ import annotations

import importlib
from types import CodeType
from typing import Any

from torch import nn

from router.errors import UnsupportedGatingError
from router.gating import rules
from router.gating.call import GatingRule
from router.gating.rules import BiasArgument, GroupLimit, Renormalised, TopKRule
from router.gating.special import SharedSoftmaxRule, SkipClassRule, SparseMixerRule, TokenIdRule

_SOFTMAX = TopKRule(weights=Renormalised(when="norm_topk_prob"))
_SOFTMAX_RENORMALISED = TopKRule(weights=Renormalised())
_SOFTMAX_KEPT = TopKRule()
_GROUPED_SOFTMAX = TopKRule(
    groups=GroupLimit("max", when=lambda router: router.topk_method == "group_limited_greedy"),
    scale="routed_scaling_factor",
)
_GROUPED_SIGMOID = TopKRule(
    scores=rules.sigmoid,
    bias=rules.correction_bias,
    groups=GroupLimit("top2"),
    weights=Renormalised(eps=1e-20, when="norm_topk_prob"),
    scale="routed_scaling_factor",
)
_SOFTMAX_OF_CHOSEN = TopKRule(scores=rules.logits_as_scores, weights=rules.softmax_of_chosen)
_ERNIE = TopKRule(bias=rules.statics_bias, weights=Renormalised(floor="norm_min"))
_GEMMA = TopKRule(logits=rules.logits_of_normed, weights=Renormalised(), expert_scale="per_expert_scale")
_CONFIGURED_SCORE = TopKRule(
    scores=rules.configured_score,
    bias=rules.correction_bias,
    weights=Renormalised(eps=1e-20),
    scale="routed_scaling_factor",
)

RULES: dict[str, GatingRule] = {
    # Softmax over all experts, then top-k; weights are renormalised by the config, always, or never.
    "qwen2_moe": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "qwen3_omni_moe": _SOFTMAX,
    "qwen4_exp": _SOFTMAX,
    "olmoe": _SOFTMAX,
    "flex_olmo": _SOFTMAX,
    "mellum": _SOFTMAX,
    "mixtral": _SOFTMAX_RENORMALISED,
    "minimax": _SOFTMAX_RENORMALISED,
    "qwen3_5_moe": _SOFTMAX_RENORMALISED,
    "qwen3_vl_moe": _SOFTMAX_RENORMALISED,
    "hunyuan_v1_moe": _SOFTMAX_RENORMALISED,
    "jamba": _SOFTMAX_KEPT,
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_vl_moe": _ERNIE,
    "gemma4": _GEMMA,
    "diffusion_gemma": _GEMMA,
    # Softmax, after a choice of groups.
    "deepseek_v2": _GROUPED_SOFTMAX,
    "deepseek_ocr2": _GROUPED_SOFTMAX,
    "unlimited_ocr": _GROUPED_SOFTMAX,
    "mistral4": TopKRule(
        scores=rules.softmax_in_logits_dtype,
        groups=GroupLimit("top2"),
        weights=Renormalised(eps=1e-20, when="norm_topk_prob"),
        scale="routed_scaling_factor",
    ),
    "mistral_large4": TopKRule(
        groups=GroupLimit("top2"), weights=Renormalised(eps=1e-20), scale="routed_scaling_factor"
    ),
    # Sigmoid; a correction bias and groups affect the choice, the weights exclude the bias.
    **dict.fromkeys(
        ["deepseek_v3", "deepseek_v32", "axk1", "bailing_hybrid", "dots1", "dots3_note", "exaone_moe", "glm4_moe"],
        _GROUPED_SIGMOID,
    ),
    **dict.fromkeys(
        [
            "glm4_moe_lite",
            "glm4v_moe",
            "glm5_next",
            "glm_moe_dsa",
            "hy_v4",
            "kimi_linear",
            "mimo_v2_flash",
            "solar_open",
        ],
        _GROUPED_SIGMOID,
    ),
    "nemotron_h": _GROUPED_SIGMOID,
    "axk2": TopKRule(
        scores=rules.sigmoid,
        bias=rules.correction_bias,
        groups=GroupLimit("top2", outside=0.0),
        weights=Renormalised(eps=1e-20, when="norm_topk_prob"),
        scale="routed_scaling_factor",
    ),
    "beam": TopKRule(
        scores=rules.sigmoid,
        bias=rules.correction_bias,
        groups=GroupLimit("top2"),
        weights=Renormalised(eps=1e-20, when="norm_topk_prob"),
    ),
    # Sigmoid with a selection bias, without groups.
    "afmoe": TopKRule(
        scores=rules.sigmoid,
        bias=BiasArgument("expert_bias"),
        weights=Renormalised(eps=1e-20),
        scale="route_scale",
    ),
    "hy_v3": TopKRule(
        scores=rules.sigmoid,
        bias=BiasArgument("e_score_correction_bias"),
        weights=Renormalised(eps=1e-20),
        scale="router_scaling_factor",
    ),
    "lfm2_moe": TopKRule(
        scores=rules.sigmoid,
        bias=BiasArgument("expert_bias"),
        weights=Renormalised(eps=1e-6, when="norm_topk_prob"),
        scale="routed_scaling_factor",
    ),
    "minimax_m2": TopKRule(
        scores=rules.sigmoid_in_float32, bias=BiasArgument("e_score_correction_bias"), weights=Renormalised()
    ),
    "minimax_m3_vl": TopKRule(scores=rules.sigmoid_in_float32, bias=rules.correction_bias, weights=Renormalised()),
    "laguna": TopKRule(scores=rules.sigmoid, bias=rules.correction_bias, weights=Renormalised()),
    "muse_spark": TopKRule(
        scores=rules.sigmoid,
        bias=rules.correction_bias,
        weights=Renormalised(eps=1e-15),
        scale="routed_scaling_factor",
    ),
    "flint": TopKRule(scores=rules.sigmoid, weights=Renormalised(when="norm_topk_prob")),
    "deepseek_v4": _CONFIGURED_SCORE,
    "inkling2": _CONFIGURED_SCORE,
    # Top-k of the logits; weights are computed afterwards.
    "aria": _SOFTMAX_OF_CHOSEN,
    "gpt_oss": _SOFTMAX_OF_CHOSEN,
    "granitemoe": _SOFTMAX_OF_CHOSEN,
    "granitemoe_swa": _SOFTMAX_OF_CHOSEN,
    "granitemoehybrid": _SOFTMAX_OF_CHOSEN,
    "granitemoeshared": _SOFTMAX_OF_CHOSEN,
    "cohere2_moe": TopKRule(scores=rules.logits_as_scores, weights=rules.configured_weights_of_chosen),
    "kolibri1": TopKRule(
        scores=rules.logits_as_scores, bias=rules.correction_bias, weights=rules.renormalised_sigmoid_of_chosen
    ),
    # Rules of single families.
    "phimoe": SparseMixerRule(),
    "inkling": SharedSoftmaxRule(),
    "zaya": SkipClassRule(),
}

# Rules of routers that stand beside another kind in a family, by class name.
_BY_CLASS: dict[str, GatingRule] = {"DeepseekV4HashRouter": TokenIdRule()}


def family_of(module: nn.Module) -> str | None:
    """The model folder of transformers that defines the module's class; None if transformers does not define it."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def find_gating_rule(model_type: str, module: nn.Module) -> GatingRule:
    """The rule of the router `module` of a model whose config says `model_type`. Raises `UnsupportedGatingError`."""
    name = type(module).__name__
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    if type(module) is nn.Linear:
        raise UnsupportedGatingError(
            f"model type {model_type!r} chooses its experts outside its router, which is a plain linear layer in this "
            "release of transformers: use a newer one"
        )
    rule = RULES.get(family_of(module) or "") or _rule_of_same_code(module)
    if rule is None:
        raise UnsupportedGatingError(
            f"no gating rule is known for the router {name} of model type {model_type!r}; known families: "
            f"{', '.join(sorted(RULES))}. Add its rule to the table in router/gating/families.py"
        )
    return rule


def _rule_of_same_code(module: nn.Module) -> GatingRule | None:
    """The rule of a known family whose router's forward compiles to the same instructions."""
    wanted = _instructions(type(module).forward)
    for family, rule in {id(rule): (family, rule) for family, rule in RULES.items()}.values():
        try:
            known = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        except ImportError:  # the family is newer or older than the installed transformers
            continue
        routers = (value for value in vars(known).values() if isinstance(value, type) and issubclass(value, nn.Module))
        if any(_instructions(router.forward) == wanted for router in routers):
            return rule
    return None


def _instructions(function: Any) -> object:
    """A function's code without its name, docstring and line numbers; a unique object if it is no plain function."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return object()
    constants = tuple(None if value == function.__doc__ else value for value in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, constants
