"""Attention masks of a step. We compute them, not transformers, because rows of one batch have different lengths.

Masks are additive, [B, 1, Q, KV]: 0 where a query attends to a key, else the dtype's lowest value. There is one mask
for each kind of layer that the model's config names (full attention, sliding window). Source:
`transformers/masking_utils.py`, which uses four-dimensional masks, and dicts of them, unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention_masks(config: Any, positions: Tensor, kv_tokens: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Masks for queries at `positions` over the first `kv_tokens` positions of their rows.

    Args:
        config: the model's config.
        positions: int64 [B, Q], each query's position in its row.
        kv_tokens: KV, the number of key positions.
        dtype: dtype of the scores.

    Returns:
        One mask; a dict from kind to mask if the model has several kinds of attention layers.
    """
    kinds, window = _kinds(config)
    if len(kinds) > 1 and "sliding_attention" in kinds:
        return {
            "full_attention": _mask(positions, kv_tokens, None, dtype),
            "sliding_attention": _mask(positions, kv_tokens, window, dtype),
        }
    if kinds == {"full_attention"}:
        window = None
    return _mask(positions, kv_tokens, window, dtype)


def layer_windows(config: Any, num_layers: int) -> tuple[int, ...]:
    """The number of tokens that each layer attends to, the new one included, 0 for all; empty if every layer attends to
    all."""
    _, window = _kinds(config)
    types = getattr(config.get_text_config(), "layer_types", None) or ["sliding_attention"] * num_layers
    windows = tuple(int(window or 0) if kind == "sliding_attention" else 0 for kind in types[:num_layers])
    return windows if any(windows) else ()


def _kinds(config: Any) -> tuple[set[str], int | None]:
    """The kinds of attention layers that the config names, and the window of the sliding ones in tokens."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        window = None
    return set(getattr(config, "layer_types", None) or ()), window


def _mask(positions: Tensor, kv_tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
    at = torch.arange(kv_tokens, device=positions.device)
    query = positions[:, None, :, None]
    hidden = at > query
    if window is not None:
        hidden |= at <= query - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)
