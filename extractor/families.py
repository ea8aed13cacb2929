"""Which checkpoints are taken, and the reason given for those that are not.

The table is about what was tested, not about code: how a checkpoint's tensors become expert spans comes from
transformers (`conversion.py`), without family names. Quantised checkpoints are refused in one place, which is where
dequantisation belongs.
"""

from __future__ import annotations

from typing import Any

from extractor.errors import UnsupportedFamilyError

SUPPORTED_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""`model_type` of the families whose stores were compared bit for bit with what transformers loads."""

_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def check_family(config: dict[str, Any], where: str) -> str:
    """The family (`model_type`) of a config.json, if it is supported.

    Raises UnsupportedFamilyError for dense models, other families and quantised checkpoints; `where` names the input.
    """
    family = str(config.get("model_type", ""))
    supported = f"supported are {', '.join(SUPPORTED_FAMILIES)}"
    if family not in SUPPORTED_FAMILIES:
        if not has_experts(config):
            raise UnsupportedFamilyError(
                f"{where} is a dense model (model_type {family!r}): it has no experts to extract; "
                f"use a Mixture-of-Experts checkpoint, {supported}"
            )
        raise UnsupportedFamilyError(f"{where} is of the family {family!r}, which is not supported; {supported}")
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedFamilyError(
            f"{where} is quantised ({method}); only checkpoints in a plain dtype are extracted: "
            "use the bfloat16 or float16 release of the model"
        )
    return family


def has_experts(config: dict[str, Any]) -> bool:
    """Whether a config.json mentions routed experts, at its top or in its text part."""
    parts = [config, *(config[key] for key in ("text_config", "llm_config", "ffn_config") if key in config)]
    return any(part.get(key) for part in parts if isinstance(part, dict) for key in _EXPERT_COUNT_KEYS)
