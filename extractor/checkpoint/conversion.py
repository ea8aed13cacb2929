"""The conversion of a checkpoint's tensors into the experts' parameters, as transformers does it.

The model is built on the meta device from its config alone; transformers' own conversion mapping then gives, for every
checkpoint key, its parameter and the operations. Source: `conversion_mapping.py` and `core_model_loading.py` of
transformers 5. Invariant: `trace` reports the same conversion as `from_pretrained` performs;
tests/extractor/checkpoint/test_conversion.py checks the names used here.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from extractor.checkpoint.families import check_routers
from extractor.checkpoint.tensor_file import TensorEntry
from extractor.checkpoint.text_model import known_type, read_config, text_model
from extractor.checkpoint.trunk import check_trunk
from extractor.errors import CheckpointError, ExtractError, UnsupportedFamilyError
from router.gating import RULES

# transformers builds a model under a process-wide default dtype, which two threads would leave behind wrong.
_building = threading.Lock()
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Recipe:
    """The recipe for one parameter of an experts module.

    `keys[pattern]` are the checkpoint tensors that a source pattern of the converter collects, in transformers' order:
    either one per expert, or a single fused one whose first axis is the experts. If `is_transposed`, the module's
    matrices are [E, N, O], else [E, O, N].
    """

    parameter: str
    shape: tuple[int, ...]
    keys: Mapping[str, tuple[str, ...]]
    operations: tuple[Any, ...]
    source_patterns: tuple[str, ...]
    target_patterns: tuple[str, ...]
    config: Any
    is_transposed: bool

    @property
    def name(self) -> str:
        """The parameter's name in its module."""
        return self.parameter.rpartition(".")[2]

    @property
    def is_concatenation(self) -> bool:
        """Whether one expert's part is its source tensors' bytes, one after the other in pattern order."""
        steps = [step for step in self.operations if not (type(step) is MergeModulelist and step.dim == 0)]
        return not steps or (len(steps) == 1 and type(steps[0]) is Concatenate and steps[0].dim == 1)

    def convert(self, sources: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One expert's part of the parameter from its source tensors (without the expert axis), by pattern.

        Applies the converter's operations to a model of one expert. Raises CheckpointError if the result does not have
        the parameter's shape.
        """
        merges = any(type(step) is MergeModulelist for step in self.operations)
        values: dict[str, Any] = {
            pattern: [tensor] if merges else [tensor.unsqueeze(0)] for pattern, tensor in sources.items()
        }
        for step in self.operations:
            values = step.convert(
                values,
                source_patterns=list(self.source_patterns),
                target_patterns=list(self.target_patterns),
                full_layer_name=self.parameter,
                model=_OneExpert(self.shape),
                config=self.config,
                missing_keys=None,
            )
        result = next(iter(values.values()))
        tensor = result[0] if isinstance(result, list) else result
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != (1, *self.shape[1:]):
            raise CheckpointError(
                f"{self.parameter}: converting one expert gives {getattr(tensor, 'shape', tensor)}, wanted "
                f"{(1, *self.shape[1:])}; the checkpoint's tensors do not fit its config.json"
            )
        return tensor.squeeze(0).contiguous()


@dataclass(frozen=True)
class Trace:
    """The result of `trace`. `experts[module]` holds the recipes of an experts module in parameter order; `whole` are
    the MoE layers of which all experts must be extracted, `linears` the keys of the trunk that are weights of linear
    layers as they are."""

    architecture: str
    top_k: int
    experts: Mapping[str, tuple[Recipe, ...]]
    trunk: tuple[str, ...]
    whole: tuple[int, ...]
    linears: frozenset[str]


class _OneExpert:
    """A stand-in for the model, for operations that read a parameter's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._parameter = torch.empty((1, *shape[1:]), device="meta")

    def get_parameter(self, name: str) -> torch.Tensor:
        return self._parameter


def trace(directory: Path, tensors: Mapping[str, TensorEntry]) -> Trace:
    """Assign every checkpoint tensor to an experts parameter or to the trunk.

    Reads config.json in `directory` and nothing else. Raises UnsupportedFamilyError when the model has no experts
    module that transformers marks as one, CheckpointError when an experts parameter has no tensors, or the trunk is not
    the model's (see `check_trunk`).
    """
    model, ignored = build_model(directory)
    modules = experts_shapes(model)
    if not modules:
        raise unsupported(directory, f"no layer of {type(model).__name__} goes through transformers' experts registry")
    if len({tuple(re.findall(r"\d+", name)) for name in modules}) != len(modules):
        raise unsupported(directory, f"a layer of {type(model).__name__} has more than one set of routed experts")
    whole = check_routers(model, modules, model.config.model_type, str(directory))
    ignored += model._keys_to_ignore_on_load_unexpected or ()
    transforms = get_model_conversion_mapping(model)
    collected, trunk, converters = _assign(model, modules, tensors, ignored, transforms)
    experts = {
        module: tuple(
            _recipe(f"{module}.{parameter}", shape, collected, converters, model)
            for parameter, shape in parameters.items()
        )
        for module, parameters in modules.items()
    }
    with _building:
        check_trunk(model, trunk, tensors, set(collected), transforms, directory)
    linears = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    as_they_are = frozenset(key for key, name in trunk.items() if linears.get(name) == tensors[key].shape)
    return Trace(type(model).__name__, _top_k(model.config, directory), experts, tuple(trunk), whole, as_they_are)


def build_model(directory: Path) -> tuple[Any, list[str]]:
    """The model that config.json in `directory` describes, on the meta device, and patterns of keys that it ignores.

    Raises UnsupportedFamilyError when transformers has no such language model, CheckpointError when it cannot build it.
    """
    told = json.loads((directory / "config.json").read_bytes())
    if known_type(told) is None:
        family = told.get("model_type")
        raise unsupported(directory, f"transformers {version('transformers')} does not know the family {family!r}")
    try:
        config = read_config(directory)
        found = text_model(config)
        if found is None:
            raise unsupported(directory, f"transformers has no causal language model of {config.model_type!r}")
        ignored = _other_parts(config)
        model_class, config = found
        with _building, torch.device("meta"):
            # In another dtype transformers would change torch's default for the whole process while it builds, under
            # a server that generates meanwhile.
            model: Any = model_class._from_config(config, dtype=torch.get_default_dtype())  # type: ignore[no-untyped-call]
    except ExtractError:
        raise
    except Exception as error:  # a config can make transformers raise anything, its own validation errors included
        raise CheckpointError(
            f"transformers cannot build the model that {directory / 'config.json'} describes "
            f"({' '.join(str(error).split())}); "
            "check the file, or use another release of transformers"
        ) from error
    return model, ignored


def experts_shapes(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the parameters of every experts module, by the names of module and parameter."""
    return {
        name: {parameter: tuple(value.shape) for parameter, value in module.named_parameters(recurse=False)}
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "is_transposed")
    }


def model_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The model's name for each of a checkpoint's keys; a key that the model has no place for keeps one of its own."""
    return _assign(model, {}, keys, (), get_model_conversion_mapping(model))[1]


def publisher(model: Any, trunk: Iterable[str]) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A function that undoes transformers' conversion: from parameters by the model's names to a checkpoint's tensors.

    A prefix that the keys of the checkpoint's `trunk` have is put before the names. `model` is on the meta device.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    _assign(model, {}, trunk, (), transforms)
    # transformers keeps here what loading used; a prefix that no key had must not be added
    model._weight_conversions = [one for one in transforms if not isinstance(one, PrefixChange) or one.was_used()]
    return lambda values: revert_weight_conversion(model, dict(values))


def _other_parts(config: Any) -> list[str]:
    """Patterns of the keys of an omni model that belong to its talker and vocoder; its thinker alone is extracted."""
    if not hasattr(config, "thinker_config"):
        return []
    parts = (name.removesuffix("_config") for name in type(config).sub_configs if name != "thinker_config")
    return [rf"^{re.escape(part)}\." for part in parts]


def unsupported(directory: Path, reason: str) -> UnsupportedFamilyError:
    """The error for a family that cannot be extracted, with the families that can."""
    supported = sorted(set(RULES) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    return UnsupportedFamilyError(
        f"{directory} cannot be extracted: {reason}; use a checkpoint of a supported family: {', '.join(supported)}"
    )


def _assign(
    model: Any,
    modules: Mapping[str, Mapping[str, Any]],
    keys: Iterable[str],
    ignored: Iterable[str],
    transforms: Iterable[Any],
) -> tuple[dict[str, dict[str, list[str]]], dict[str, str], dict[str, Any]]:
    """The keys of every experts parameter by source pattern, the model's names of the trunk's keys, and the converters
    by pattern."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    names = model.state_dict()
    wanted = {f"{module}.{parameter}" for module, parameters in modules.items() for parameter in parameters}
    collected: dict[str, dict[str, list[str]]] = {name: {} for name in wanted}
    trunk: dict[str, str] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], model.base_model_prefix, names)
        if target in wanted:
            collected[target].setdefault(pattern or key, []).append(key)
        elif target in names or not any(re.search(pattern, target) for pattern in ignored):
            trunk[key] = target
    return collected, trunk, {pattern: item for item in converters for pattern in item.source_patterns}


def _recipe(
    parameter: str,
    shape: tuple[int, ...],
    collected: Mapping[str, Mapping[str, list[str]]],
    converters: Mapping[str, Any],
    model: Any,
) -> Recipe:
    found = collected[parameter]
    if not found:
        raise CheckpointError(
            f"no tensor of the checkpoint becomes {parameter} {list(shape)}; it is incomplete, its "
            "config.json is of another model, or transformers changed how it loads this family: get the missing "
            "tensors, the config.json that belongs to the weights, or another release of transformers"
        )
    converter = converters.get(next(iter(found)))
    patterns = tuple(converter.source_patterns) if converter is not None else tuple(found)
    missing = [pattern for pattern in patterns if pattern not in found]
    if missing or set(found) - set(patterns):
        raise CheckpointError(
            f"{parameter}: the checkpoint has no tensors named like {missing or patterns}: get those that are "
            "missing, or the config.json that belongs to the weights"
        )
    return Recipe(
        parameter=parameter,
        shape=shape,
        keys={pattern: tuple(found[pattern]) for pattern in patterns},
        operations=tuple(converter.operations) if converter is not None else (),
        source_patterns=patterns,
        target_patterns=tuple(converter.target_patterns) if converter is not None else (parameter,),
        config=model.config,
        is_transposed=bool(model.get_submodule(parameter.rpartition(".")[0]).is_transposed),
    )


def _top_k(config: Any, directory: Path) -> int:
    """The number of experts of a token, whose name differs between families."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in TOP_K_KEYS]
    top_k = next((value for value in found if isinstance(value, int) and value > 0), None)
    if top_k is None:
        raise CheckpointError(
            f"{directory / 'config.json'} has none of {', '.join(TOP_K_KEYS)} as a positive number: check the file"
        )
    return top_k
