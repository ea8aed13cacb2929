"""The model of transformers that answers text with text, for a checkpoint's config.

A causal language model where transformers has one; else the image-text model, which is given text alone (its towers
are part of the trunk); of an omni model the thinker. Invariant: extraction and serving ask here, so they build the same
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from extractor.errors import CheckpointError

MAX_LAYERS = 4096
"""No model has a tenth of it. transformers makes lists and modules for as many layers as a config asks for."""
_DEPTHS = re.compile(r"(^|_)(layers|depth|n_layer)$")


def read_config(directory: Path) -> Any:
    """transformers' config of the model in `directory`, whose model type is `known_type`.

    Raises CheckpointError where config.json asks for layers without end; else what transformers raises.
    """
    told = json.loads((directory / "config.json").read_bytes())
    _check_depth(told, directory / "config.json")
    family = known_type(told)
    if family is not None and family != told.get("model_type"):
        return CONFIG_MAPPING[family].from_dict(told | {"model_type": family})
    return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def known_type(config: Mapping[str, Any]) -> str | None:
    """The model type by which transformers knows the model of a config.json; None: by none.

    A config whose model type is of the checkpoint's own code (`auto_map`), as `kimi_k2`, has that of the architecture
    that it names, if transformers has a causal language model of this name. Without such code an unknown type is one of
    another release of transformers, which may compute something else.
    """
    told = config.get("model_type")
    if told in CONFIG_MAPPING:
        return str(told)
    architectures = config.get("architectures") if config.get("auto_map") else None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return next((family for family, name in known if architectures == [name]), None)


def _check_depth(value: Any, path: Path) -> None:
    for key, item in value.items() if isinstance(value, dict) else ():
        if _DEPTHS.search(key) and isinstance(item, int | float) and item > MAX_LAYERS:
            raise CheckpointError(
                f"{path}: {key} is {item}, wanted at most {MAX_LAYERS}; the file is damaged or hostile: do not use "
                "this checkpoint"
            )
        _check_depth(item, path)


def text_model(config: Any) -> tuple[type[PreTrainedModel], Any] | None:
    """The model class, and the part of `config` that it takes; None where transformers has no such model."""
    config = getattr(config, "thinker_config", None) or config
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        found: Any = mapping.get(type(config), None)
        if found is not None:
            model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            text = config.get_text_config()
            return model_class, text if model_class.config_class is type(text) else config
    return None
