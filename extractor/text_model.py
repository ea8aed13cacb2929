"""Which model of transformers answers text with text for a checkpoint's config.

A causal language model where transformers has one; else the image-text model, which is given text alone (its towers
are part of the trunk); of an omni model the thinker. Invariant: extraction and serving ask here, so they build the same
model.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


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
