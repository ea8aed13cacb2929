"""The tokens of a row, the bytes of their keys and values, and the division of memory between them and slots.

The bytes are those of the host-driven path; the captured path's `DeviceMemory.token_bytes` is the same for the
attention that it captures. Source: transformers' configs; its latent attention keeps the latent and the rotated part of
the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from expert_store.errors import SlotsError
from server.errors import SettingsError
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of

KV_SHARE = 1 / 4
"""Share of the memory that is free after loading, for keys and values."""
HOST_RESERVE_BYTES = 1 << 30
"""Host memory for Python, its libraries and activations: 452 MiB at the peak of importing, and what a step needs."""
DEVICE_RESERVE_BYTES = 1 << 30
"""Bytes left free on a GPU for activations, logits and the allocator's rounding, beside a long row's attention."""
MemoryBalance = Literal["moving", "fixed"]
"""Whether slots and KV memory lend one another memory while serving."""
_WITHOUT = ("linear_attention", "mamba", "mamba2", "conv", "recurrent")
"""Layer types that keep a state of fixed size instead of keys and values."""
_TIMES_HEADS = {("mimo_v2_flash", "sliding_attention"): 2}
"""Heads that a model's code multiplies, by model type and layer type."""


@dataclass(frozen=True)
class MemoryShares:
    """The memory of slots and of keys and values at one moment.

    Attributes:
        is_moving: whether they lend one another memory; else `reason` says why not.
        slot_bytes, kv_bytes: of the open slots of all layers, and of the open blocks.
        least_slot_bytes, least_kv_bytes: below which they never fall.
        moves_to_slots, moves_to_kv: times since start that one got memory of the other.
    """

    is_moving: bool
    reason: str
    slot_bytes: int
    kv_bytes: int
    least_slot_bytes: int
    least_kv_bytes: int
    moves_to_slots: int = 0
    moves_to_kv: int = 0


NO_MEMORY = MemoryShares(False, "no model is loaded", 0, 0, 0, 0)


def kv_token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers.

    Args:
        config: transformers' config of the text model.
        itemsize: bytes of a value.
    """
    num_layers = int(config.num_hidden_layers)
    layers = list(getattr(config, "per_layer_config", None) or [config] * num_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    kept = zip(layers, kinds, strict=True)
    return sum(_layer_values(layer, kind) for layer, kind in kept if kind not in _WITHOUT) * itemsize


def _layer_values(config: Any, kind: str) -> int:
    """Numbers that a layer keeps of a token."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.kv_lora_rank) + int(config.qk_rope_head_dim)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    value_dim = int(getattr(config, "v_head_dim", None) or head_dim)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    kv_heads *= _TIMES_HEADS.get((getattr(config, "model_type", ""), kind), 1)
    return kv_heads * (head_dim + value_dim)


LEAST_CONTEXT_TOKENS = 2048
"""A server whose memory holds fewer, of a model that takes more, is not started without a wish for so few."""


def context_bounds(wanted: int | None, most: int) -> tuple[int, int]:
    """Tokens that a row has at most, and at least if memory holds no more: those `wanted`, or without a wish what the
    model was made for, `most`, but no less than `LEAST_CONTEXT_TOKENS`.

    Raises:
        SettingsError: the model does not take so many.
    """
    if wanted is None:
        return most, min(most, LEAST_CONTEXT_TOKENS)
    if wanted > most:
        raise SettingsError(
            f"max_context_tokens is {wanted}, the model was made for {most}: set at most that, or leave it out"
        )
    return wanted, wanted


def blocks_within(
    token_bytes: int, max_rows: int, max_tokens: int, least_tokens: int, kv_bytes: int | None, free: int | None
) -> int:
    """Blocks of KV memory: those that fit into `kv_bytes`, or without a wish into a share of the `free` bytes.

    Args:
        token_bytes: of one token's keys and values.
        free: bytes that are free after loading; None if the system does not tell.

    Raises:
        SlotsError: one request of `least_tokens` does not fit.
    """
    block_bytes = BLOCK_TOKENS * token_bytes
    most, least = max_rows * num_blocks_of(max_tokens), num_blocks_of(least_tokens)
    if kv_bytes is not None:
        num_blocks = min(most, kv_bytes // block_bytes)
        room, said = kv_bytes, f"kv_memory of {kv_bytes} bytes holds"
    else:
        room = block_bytes * most if free is None else free
        share = most if free is None else int(KV_SHARE * free) // block_bytes
        num_blocks = min(most, max(least, share))
        said = f"{room} bytes are free for KV memory, which hold"
    if min(num_blocks, room // block_bytes) < least:
        fits = room // block_bytes * BLOCK_TOKENS
        raise SlotsError(
            f"{said} {fits} tokens, and one request may have {least * BLOCK_TOKENS}, which take {least * block_bytes} "
            f"bytes: {'set max_context_tokens to at most ' + str(fits) if fits else 'lower slots_memory'}, or give "
            "KV memory more room"
        )
    return num_blocks


def slots_beside_kv(
    per_slot: float, most: int, token_bytes: int, max_rows: int, max_tokens: int, least_tokens: int,
    kv_bytes: int | None, free: int,
) -> int:  # fmt: skip
    """Slots of each layer on the host-driven path without a wish: at most `most`, as many as fit beside KV memory.

    Args:
        per_slot: bytes of one slot in each layer.
        free: bytes that are free beside the trunk; the others are those of `blocks_within`.

    Returns:
        0 if not one fits.
    """
    block_bytes = BLOCK_TOKENS * token_bytes
    kept = max(num_blocks_of(least_tokens) * block_bytes, int(KV_SHARE * free)) if kv_bytes is None else kv_bytes
    kept = min(kept, max_rows * num_blocks_of(max_tokens) * block_bytes)
    return max(0, min(most, int((free - kept) / per_slot)))
