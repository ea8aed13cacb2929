"""The tensors outside the experts: are they all that the model needs, and does the model need all of them?

transformers loads tensors that do not fit with a warning at most: it makes up what is missing and drops what is left
over, and the answers are garbage. Here the same loading code runs on the meta device, with shapes and dtypes alone, and
its report is an error. Invariant: a checkpoint that passes loads without a warning, whichever release wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from extractor.checkpoint.tensor_file import TensorEntry
from extractor.checkpoint.text_model import MAX_LAYERS
from extractor.errors import CheckpointError

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": torch.bool}
_OTHER_PARTS = re.compile(
    r"(^|\.)(visual|vision|audio|image|video|speech|talker|token2wav|code2wav|projector|multi_modal|mm|mtp|nextn|draft"
    r"|eagle|medusa)(_\w+)?(\.|$)"
)
"""Parts that are not used to answer text with text: towers, and heads that predict further tokens."""
_OF_CACHES = ("k_scale", "v_scale", "q_scale")
"""Scales of a quantised KV cache, which stays in 16 bits here."""
_EXTRA_LAYERS = re.compile(r"nextn|mtp")
MAX_NAMED = 3


def check_trunk(
    model: Any,
    trunk: Mapping[str, str],
    tensors: Mapping[str, TensorEntry],
    experts: set[str],
    conversions: Any,
    directory: Path,
) -> None:
    """Compare the tensors outside the experts with the parameters and buffers of `model`, which is mutated.

    Args:
        model: on the meta device.
        trunk: checkpoint name → the model's name for it, of every tensor that belongs to no expert.
        tensors: of the checkpoint, quantised ones as plain ones.
        experts: the model's names of the experts' parameters.
        conversions: transformers' mapping from checkpoint to model.
        directory: of the checkpoint, for messages.

    Raises:
        CheckpointError: a tensor is missing, has another shape or kind of dtype, or is left over though it stands in a
            part that answers text.
    """
    needed = model.state_dict()
    kinds = {name: value.is_floating_point() for name, value in needed.items()}
    for key, name in trunk.items():
        if name in kinds and (tensors[key].dtype in _FLOATS) != kinds[name]:
            wanted = ", ".join(_FLOATS) if kinds[name] else "integers"
            raise CheckpointError(
                f"{tensors[key].path}: {key} has the dtype {tensors[key].dtype}, the model wants {wanted} for {name}: "
                "use a release of the model in a plain dtype, or in a quantisation that docs/families.md names"
            )
    values = {
        key: torch.empty(tensors[key].shape, dtype=_DTYPES.get(tensors[key].dtype, torch.uint8), device="meta")
        for key in trunk
    }
    with _no_progress_bar():
        report, _ = convert_and_load_state_dict_in_model(
            model,
            values,
            LoadStateDictConfig(
                device_map={"": "meta"}, dtype=torch.get_default_dtype(), weight_mapping=list(conversions)
            ),
        )
    model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(report)
    sources: dict[str, list[str]] = {}
    for key, name in trunk.items():
        sources.setdefault(name, []).append(key)
    wrong = [
        f"{name} is {list(got)}{_made_of(sources.get(name, []), name)} and config.json wants {list(wanted)}"
        for name, got, wanted in sorted(report.mismatched_keys)
    ]
    wrong += [f"{name} cannot be made ({' '.join(text.split())})" for name, text in report.conversion_errors.items()]
    if wrong:
        raise CheckpointError(
            f"{directory}: {_some(wrong)}; config.json and weights are of different models: use those that belong "
            "together"
        )
    missing = sorted(report.missing_keys - experts)
    if missing:
        told = [f"{name} {list(needed[name].shape)}" for name in missing]
        raise CheckpointError(
            f"{directory} has no tensor for {_some(told)}, which {type(model).__name__} needs: get the missing "
            "tensors, or the config.json that belongs to the weights"
        )
    left = [key for key, name in trunk.items() if name in report.unexpected_keys and _matters(model, name)]
    if left:
        raise CheckpointError(
            f"{directory}: the model that config.json describes has no place for {_some(sorted(left))}, and without "
            "them its answers would be wrong: use the config.json that belongs to the weights"
        )


def _matters(model: Any, name: str) -> bool:
    """Whether a tensor that the model has no place for stands in a part that answers text."""
    if _OTHER_PARTS.search(name) or name.rpartition(".")[2] in _OF_CACHES:
        return False
    layer = next(iter(re.findall(r"\.layers\.(\d+)\.", f".{name}")), None)
    config = model.config.get_text_config()
    num_layers = int(getattr(config, "num_hidden_layers", MAX_LAYERS))
    if layer is None or int(layer) < num_layers:
        return not _is_computed(model, name)
    counts = [value for key, value in config.to_dict().items() if _EXTRA_LAYERS.search(key) and isinstance(value, int)]
    return int(layer) >= num_layers + max(counts, default=0)


def _is_computed(model: nn.Module, name: str) -> bool:
    """Whether the model computes a buffer of this name itself."""
    return name in {buffer for buffer, _ in model.named_buffers()}


def _made_of(sources: list[str], name: str) -> str:
    """The tensors that become a parameter, in words, where they are not one of the same name."""
    return "" if sources in ([], [name]) else f" (from {_some(sources)})"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
