"""The tokens of a row, and the bytes of their keys and values, from a model's config alone.

The bytes are those of the host-driven path; the captured path's `DeviceMemory.row_bytes` is the same for the attention
that it captures. Source: transformers' configs; latent attention keeps keys and values of every head, as its forward
computes them.
"""

from __future__ import annotations

from typing import Any

from server.errors import SettingsError

DEFAULT_CONTEXT_TOKENS = 8192
_WITHOUT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
"""Layer types that keep a state of fixed size instead of keys and values."""


def kv_token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers.

    Args:
        config: transformers' config of the text model.
        itemsize: bytes of a value.
    """
    types = getattr(config, "layer_types", None) or ["full_attention"] * int(config.num_hidden_layers)
    num_layers = sum(kind not in _WITHOUT for kind in types)
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        head = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim) + int(config.v_head_dim)
        return num_layers * heads * head * itemsize
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * num_layers * kv_heads * head_dim * itemsize


LEAST_CONTEXT_TOKENS = 2048
"""A server whose memory holds fewer, of a model that takes more, is not started without a wish for so few."""


def context_bounds(wanted: int | None, most: int) -> tuple[int, int]:
    """Tokens that a row has at most, and at least if memory holds no more: those `wanted`, or without a wish what the
    model was made for, `most`, but no less than `LEAST_CONTEXT_TOKENS`. Raises SettingsError as `context_limit`."""
    if wanted is not None:
        limit = context_limit(wanted, most)
        return limit, limit
    return most, min(most, LEAST_CONTEXT_TOKENS)


def context_limit(wanted: int | None, most: int) -> int:
    """Tokens of a row: `wanted`, or without a wish `DEFAULT_CONTEXT_TOKENS`, at most the `most` that a model takes.

    Raises:
        SettingsError: the model does not take so many.
    """
    limit = wanted or min(most, DEFAULT_CONTEXT_TOKENS)
    if limit > most:
        raise SettingsError(
            f"max_context_tokens is {limit}, the model was made for {most}: set at most that, or leave it out"
        )
    return limit
