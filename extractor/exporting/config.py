"""The config.json of a pruned checkpoint: fewer experts, perhaps fewer picks, and no heads for further tokens.

Owns the keys that a family has for these numbers. Invariant: a config is returned only if transformers builds a model
of the wanted number of experts from it, whose router chooses what the masked router chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_store.manifest import ModelSpec
from extractor.checkpoint.conversion import TOP_K_KEYS, build_model, experts_shapes
from extractor.checkpoint.families import EXPERT_COUNT_KEYS, router_beside
from extractor.checkpoint.text_model import read_config, text_model
from extractor.errors import CheckpointError, SelectionError, UnsupportedFamilyError
from router.gating import find_gating_rule
from router.gating.rules import GroupLimit, TopKRule
from router.gating.special import SparseMixerRule

DTYPE_KEYS = ("dtype", "torch_dtype")
_FURTHER_LAYERS = re.compile(r"(?=.*(^|_)num_).*(nextn|mtp)")
"""Keys for the number of layers that predict further tokens, which a pruned checkpoint does not have."""


def pruned_config(trunk: Path, model: ModelSpec, num_kept: int, dtype: str | None) -> dict[str, Any]:
    """config.json in `trunk` for `num_kept` experts a layer, and with `dtype` (torch's name) unless that is None.

    Of a model with towers it is the text part's alone if the store has that part alone.

    Raises UnsupportedFamilyError for an omni model, of which a store has the thinker alone.
    """
    document: dict[str, Any] = json.loads((trunk / "config.json").read_bytes())
    config = read_config(trunk)
    if hasattr(config, "thinker_config"):
        raise UnsupportedFamilyError(
            f"the family {model.family!r} cannot be exported: the store has the part that answers text alone, and its "
            "config.json describes the others too"
        )
    text = config.get_text_config()
    part = document
    if text is not config:
        part = document.setdefault(next(key for key in config.sub_configs if getattr(config, key) is text), {})
    found = text_model(config)
    if found is not None and found[1] is not config:  # the store has nothing of the other parts
        part["architectures"] = [found[0].__name__]
        document = part = {"model_type": text.model_type, "tie_word_embeddings": text.tie_word_embeddings} | part
    for key in _names(text, part, EXPERT_COUNT_KEYS):
        _replace(part, text, key, {model.num_experts: num_kept})
    for key in _names(text, part, TOP_K_KEYS):
        _replace(part, text, key, dict.fromkeys(range(num_kept + 1, model.num_experts + 1), num_kept))
    for key, value in part.items():
        if _FURTHER_LAYERS.match(key) and type(value) is int:
            part[key] = 0
    for holder in (document, part):
        for key in DTYPE_KEYS:
            if dtype is not None and key in holder:
                holder[key] = dtype
    return document


def _names(text: Any, part: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that are in config.json; if none is, the names that the config's class has for them."""
    found = [key for key in keys if key in part]
    return found or list({text.attribute_map.get(key, key) for key in keys if hasattr(text, key)})


def _replace(part: dict[str, Any], text: Any, key: str, numbers: dict[int, int]) -> None:
    """Replace the number under `key`, or those in the list of layers there."""
    value = part.get(key, getattr(text, key, None))
    if isinstance(value, list):
        part[key] = [numbers.get(one, one) for one in value]
    elif type(value) is int and value in numbers:
        part[key] = numbers[value]


def check_choice(whole: Any, model: ModelSpec, kept: Sequence[Sequence[int]]) -> None:
    """Check that the routers of a model without the other experts choose as the masked ones of `whole` do.

    Raises UnsupportedFamilyError where a router needs more experts, SelectionError where groups lose different numbers.
    """
    for layer, module in enumerate(experts_shapes(whole)):
        router = router_beside(whole, module, model.family)
        rule = find_gating_rule(model.family, router)
        if not rule.takes_mask and len(kept[layer]) < model.num_experts:
            raise UnsupportedFamilyError(
                f"the family {model.family!r} cannot be exported with {len(kept[layer])} of {model.num_experts} "
                f"experts: MoE layer {layer} routes by token id, and needs each of them"
            )
        if isinstance(rule, SparseMixerRule) and len(kept[layer]) < model.top_k:
            raise UnsupportedFamilyError(
                f"the family {model.family!r} cannot be exported with {len(kept[layer])} experts: its router always "
                f"makes {model.top_k} picks; keep at least as many"
            )
        if isinstance(rule, TopKRule) and rule.groups is not None and rule.groups.when(router):
            _check_groups(rule.groups, router, model, layer, kept[layer])


def pruned_model(directory: Path, model: ModelSpec, num_kept: int) -> Any:
    """The model that the config.json in `directory` describes, on the meta device, with `num_kept` experts a layer.

    Raises UnsupportedFamilyError if transformers builds no such model.
    """
    refused = f"the family {model.family!r} cannot be exported with {num_kept} of {model.num_experts} experts"
    try:
        built, _ = build_model(directory)
    except CheckpointError as error:
        raise UnsupportedFamilyError(f"{refused}: {error.__cause__ or error}") from error
    for module, shapes in experts_shapes(built).items():
        counts = {shape[0] for shape in shapes.values()}
        if counts != {num_kept}:
            raise UnsupportedFamilyError(
                f"{refused}: its config gives {module} {counts} experts, however {', '.join(EXPERT_COUNT_KEYS)} are set"
            )
    return built


def _check_groups(limit: GroupLimit, router: Any, model: ModelSpec, layer: int, kept: Sequence[int]) -> None:
    """An expert's group follows from its place: each group must keep as many, and the chosen ones enough for top-k."""
    num_groups, topk_groups = int(router.num_group), int(router.topk_group)
    size = model.num_experts // num_groups
    counts = [sum(expert // size == group for expert in kept) for group in range(num_groups)]
    if len(set(counts)) > 1:
        raise SelectionError(
            f"the family {model.family!r} chooses {topk_groups} of {num_groups} groups of experts, and layer {layer} "
            f"keeps {counts} of {size} in each: a pruned checkpoint needs the same number in every group; plan so, or "
            "serve the store, which masks any experts"
        )
    least = max(2 if limit.score == "top2" else 1, -(-min(model.top_k, len(kept)) // topk_groups))
    if counts[0] < least:
        raise SelectionError(
            f"layer {layer} keeps {counts[0]} experts in each of {num_groups} groups, wanted at least {least}: the "
            f"family {model.family!r} takes {model.top_k} experts from {topk_groups} groups; keep more"
        )
