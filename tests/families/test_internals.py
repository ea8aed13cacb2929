"""What the families lean on inside transformers: when a new release moves something, these tests say what.

The seam to its loading is guarded in tests/extractor/checkpoint/test_conversion.py.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import transformers
from torch import nn

from router.errors import UnsupportedGatingError
from router.gating import RULES, find_gating_rule
from tests.families.checkpoints import FAMILIES, is_experts, is_installed, moe_blocks, random_model

# module -> name -> parameters that are passed by name or by position
INTERNALS: dict[str, dict[str, list[str]]] = {
    "transformers.integrations.moe": {"ALL_EXPERTS_FUNCTIONS": [], "use_experts_implementation": []},
    "transformers.integrations.mxfp4": {"convert_moe_packed_tensors": ["blocks", "scales", "dtype"]},
    "transformers.cache_utils": {
        "Cache": ["layers"],
        "DynamicCache": ["config"],
        "DynamicLayer": [],
        "DynamicSlidingWindowLayer": [],
    },
    "transformers.models.auto.modeling_auto": {"MODEL_FOR_CAUSAL_LM_MAPPING": []},
}
WHY = "router/gating, server/model and extractor rely on it"
# Families of the registry that need no rule.
NO_DECODERS = {"openai_privacy_filter": "a token classifier"}


@pytest.mark.parametrize("module", INTERNALS)
def test_the_internals_are_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    for name, parameters in INTERNALS[module].items():
        assert hasattr(found, name), f"{module}.{name} is gone: {WHY}"
        if parameters:
            signature = inspect.signature(getattr(found, name)).parameters
            missing = [parameter for parameter in parameters if parameter not in signature]
            assert not missing, f"{module}.{name} no longer takes {missing}: {WHY}"


def test_experts_modules_carry_their_flags_and_look_up_their_implementation_at_each_call() -> None:
    model = random_model("qwen3_moe")
    (_, router, experts), *_ = moe_blocks(model)
    assert is_experts(experts), f"experts modules no longer have is_concatenated and is_transposed: {WHY}"
    for flag in ("has_gate", "has_bias"):
        assert hasattr(experts, flag), f"experts modules no longer have {flag}: {WHY}"
    assert hasattr(experts, "_apply_gate"), f"experts modules no longer have _apply_gate: {WHY}"
    assert list(inspect.signature(type(experts).forward).parameters)[:4] == [
        "self",
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ], f"the experts' forward takes other arguments: {WHY}"
    assert hasattr(model.config, "_experts_implementation"), f"config._experts_implementation is gone: {WHY}"
    assert hasattr(model, "_supports_sdpa"), f"PreTrainedModel._supports_sdpa is gone: {WHY}"
    assert hasattr(model, "_supports_default_dynamic_cache"), f"_supports_default_dynamic_cache is gone: {WHY}"
    assert isinstance(router, nn.Module)


def registered_folders() -> list[str]:
    """Model folders of the installed transformers whose experts go through its registry."""
    models = Path(transformers.__file__).parent / "models"
    return sorted(
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("folder", registered_folders())
def test_every_family_of_the_registry_has_a_gating_rule(folder: str) -> None:
    """By its record, or because its router is the same code as a known one's."""
    if folder in RULES or folder in NO_DECODERS:
        return
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    routers = [
        value for name, value in vars(module).items() if "Router" in name and value.__module__ == module.__name__
    ]
    for router in routers:
        try:
            find_gating_rule(folder, router.__new__(router))
        except UnsupportedGatingError as error:
            pytest.fail(f"transformers {transformers.__version__} has the new MoE family {folder!r}: {error}")


def test_every_rule_is_held_against_a_model_or_against_a_tested_router() -> None:
    """Families that cannot be built from a small config are tested through one with the same rule."""
    tested = {
        type(block).__module__.split(".")[2]
        for model_type in FAMILIES
        if is_installed(model_type)
        for block, _, _ in moe_blocks(random_model(model_type))[:1]
    }
    rules = [RULES[folder] for folder in tested if folder in RULES]
    untested = {folder for folder in RULES if folder not in tested and RULES[folder] not in rules}
    installed = set(registered_folders())
    assert not untested & installed, f"no test holds these rules: {sorted(untested & installed)}"
