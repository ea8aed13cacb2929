"""Decides whether a checkpoint is supported; a refusal gives the reason.

There is no list of families: a checkpoint is supported if transformers has a causal language model for it whose routed
experts use its experts registry, and if the gating rule of each of its routers is known (`router.gating`), since only a
model that can be masked exactly can be served from part of its experts; layers without a masked counterpart are
extracted whole. Quantised checkpoints are supported if
`quantised.py` can dequantise them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from extractor.checkpoint.quantised import check_quantisation
from extractor.checkpoint.text_model import known_type
from extractor.errors import UnsupportedFamilyError
from router.errors import UnsupportedGatingError
from router.gating import find_gating_rule

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of config.json for the number of experts of a layer; a config may have several."""
_ROUTER_NAMES = ("gate", "router")


def check_family(config: dict[str, Any], where: str) -> str:
    """The family of a config.json, that is its `known_type` if it has one, after the checks that need no model.

    Raises UnsupportedFamilyError for dense models and for unknown quantisations; `where` names the input.
    """
    family = known_type(config) or str(config.get("model_type", ""))
    if not has_experts(config):
        raise UnsupportedFamilyError(
            f"{where} is a dense model (model_type {family!r}): it has no experts to extract; use a Mixture-of-Experts "
            "checkpoint"
        )
    check_quantisation(config, where)
    return family


def check_routers(model: nn.Module, experts_modules: Iterable[str], family: str, where: str) -> tuple[int, ...]:
    """The MoE layers whose routers take no mask, so that all their experts must be extracted.

    Raises UnsupportedFamilyError for a router without a known rule.
    """
    whole = []
    for layer, name in enumerate(experts_modules):
        try:
            rule = find_gating_rule(family, router_beside(model, name, where))
        except UnsupportedGatingError as error:
            raise UnsupportedFamilyError(f"{where}: {error}") from error
        if not rule.takes_mask:
            whole.append(layer)
    return tuple(whole)


def router_beside(model: nn.Module, experts_module: str, where: str) -> nn.Module:
    """The router of the block that has the experts module of this name. Raises UnsupportedFamilyError."""
    block = model.get_submodule(experts_module.rpartition(".")[0])
    routers = [getattr(block, router, None) for router in _ROUTER_NAMES]
    router = next((router for router in routers if isinstance(router, nn.Module)), None)
    if router is None:
        raise UnsupportedFamilyError(
            f"{where}: beside {experts_module} stands no router named {' or '.join(_ROUTER_NAMES)}; its family is not "
            "supported"
        )
    return router


def has_experts(config: dict[str, Any]) -> bool:
    """Whether a config.json mentions routed experts, at its top or in its text part."""
    nested = [config.get(key) for key in ("text_config", "llm_config", "ffn_config", "thinker_config")]
    return any(config.get(key) for key in (*EXPERT_COUNT_KEYS, "num_experts_per_tok", "moe_topk")) or any(
        has_experts(part) for part in nested if isinstance(part, dict)
    )
