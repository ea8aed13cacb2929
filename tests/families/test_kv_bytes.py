"""The bytes reckoned for a token's keys and values are those that transformers' cache holds, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from server.model.host.sequence_runner import has_plain_memory
from server.model.kv_memory import kv_token_bytes
from tests.families.checkpoints import random_model
from tests.families.serving import served_families

EVERYDAY = ("deepseek_v3", "gemma4_text", "mimo_v2_flash")
"""Latents, heads of two sizes, and more heads in some layers."""
NUM_TOKENS = 5


@pytest.mark.parametrize("family", served_families(EVERYDAY))
@pytest.mark.filterwarnings("ignore")
def test_the_bytes_reckoned_for_a_token_are_those_that_a_cache_holds(family: str) -> None:
    model: Any = random_model(family).eval()
    reckoned = kv_token_bytes(model.config.get_text_config(), 4)
    if not has_plain_memory(model):
        assert reckoned > 0, "at least one layer keeps keys and values"
        return
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(3, 3 + NUM_TOKENS)[None], past_key_values=cache, use_cache=True)
    assert reckoned * NUM_TOKENS == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
