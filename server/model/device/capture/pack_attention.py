"""What a model's attention is: norms of queries and keys, rotary embedding and windows, and what the step cannot do.

The step rotates in halves and by angles that do not change with the length; which function rotates is asked of the
family's own, with numbers, since its name says nothing.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import nn

from server.model.device.capture.known_code import check_code
from server.model.device.capture.refusal import need

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb")
_FIXED_ROTARY = ("default", "linear", "yarn", "llama3")
"""Kinds of rotary embedding whose angles follow from the config alone."""


def check_attention(attention: Any, config: Any, head_dim: int, eps: float, where: str) -> None:
    """Raises NotCapturableError where a layer's attention is not the step's."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        need(isinstance(getattr(attention, name, None), nn.Linear), f"{where}: attention has no linear {name}")
    names = [name for name, child in attention.named_children() if not isinstance(child, nn.Dropout)]
    unknown = [name for name in names if name not in _ATTENTION]
    need(not unknown, f"{where}: attention has {', '.join(unknown)}, which the captured step does not compute")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = [getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")]
    wanted = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    need(rows == wanted, f"{where}: attention projects to {rows} elements, wanted {wanted}")
    need(attention.o_proj.in_features == wanted[0], f"{where}: attention's output is not that of its heads")
    need(not hasattr(attention, "sinks"), f"{where}: attention has sinks")
    check_code(attention, "attention", where)
    biases = {getattr(attention, name).bias is None for name in ("q_proj", "k_proj", "v_proj")}
    need(len(biases) == 1, f"{where}: only some of queries, keys and values have biases")
    qk_norm(attention, head_dim)
    for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
        need(
            norm is None or getattr(norm, "variance_epsilon", None) == eps,
            f"{where}: {type(norm).__name__} is no root-mean-square norm with the config's epsilon",
        )
        if norm is not None:
            check_code(norm, "norm", where)


def qk_norm(attention: Any, head_dim: int) -> Literal["none", "head", "row"]:
    """How queries and keys are normalised."""
    sizes = []
    for name, projection in (("q_norm", attention.q_proj), ("k_norm", attention.k_proj)):
        norm = getattr(attention, name, None)
        if norm is None:
            sizes.append("none")
            continue
        size, whole = tuple(norm.weight.shape), projection.out_features
        sizes.append("head" if size == (head_dim,) else "row" if size == (whole,) else f"of {size} elements")
    need(len(set(sizes)) == 1 and sizes[0] in ("none", "head", "row"), f"norms of queries and keys are {sizes}")
    return sizes[0]  # type: ignore[return-value]


def rotary_elements(body: Any, attention: Any, config: Any, head_dim: int) -> int:
    """How many of a head's elements are rotated, its first ones."""
    need(
        head_dim & (head_dim - 1) == 0 and head_dim >= 32,
        f"heads of {head_dim} elements: wanted a power of two from 32",
    )
    rope = getattr(config, "rope_parameters", None) or {}
    need(rope.get("rope_type", "default") in _FIXED_ROTARY, f"rotary type {rope.get('rope_type')!r} varies with length")
    need(hasattr(body.rotary_emb, "inv_freq"), "rotary embedding differs between layers")
    check_code(body.rotary_emb, "rotary", "rotary embedding")
    rotary = 2 * int(body.rotary_emb.inv_freq.shape[0])
    need(rotary <= head_dim and rotary % 4 == 0, f"{rotary} of {head_dim} elements of a head are rotated")
    need(_rotates_in_halves(attention, rotary, head_dim), "rotary embedding does not turn halves of a head")
    return rotary


def _rotates_in_halves(attention: Any, rotary: int, head_dim: int) -> bool:
    """Whether the family's function turns element i with i + rotary / 2, and leaves what is past `rotary`."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    angle = torch.linspace(0.1, 1.0, rotary // 2)
    cos, sin = angle.cos().repeat(2)[None, None], angle.sin().repeat(2)[None, None]
    given = torch.arange(1.0, head_dim + 1.0)
    low, high, rest = given[: rotary // 2], given[rotary // 2 : rotary], given[rotary:]
    wanted = torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin(), rest])
    try:
        got = apply(given[None, None, None], given[None, None, None], cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return all(part.shape[-1] == head_dim and torch.allclose(part.flatten(), wanted, atol=1e-4) for part in got)
