"""Text that the whole model writes by itself, to train an adapter without a corpus.

Invariant: the same beginnings, seed, model and device give the same text. Many texts are written side by side by
transformers' own forward and cache; no server does that, and their bits are promised to nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from server.model.host.assembly import HostModel
from server.model.kv_memory import kv_token_bytes
from server.quality.batches import Progress, Tokens

ROWS = {"cpu": 64, "cuda": 16384}
"""Texts that are written side by side, at most."""
CACHE_BYTES = 1 << 30
"""Most bytes of their keys and values on a CPU; on a GPU a quarter of the free memory."""


@torch.inference_mode()
def write_texts(
    model: HostModel, beginnings: Sequence[Tokens], num_tokens: int, seed: int, notify: Progress
) -> npt.NDArray[np.int32]:
    """Continue each beginning to `num_tokens` tokens, drawn at temperature 1 from the whole model: [texts, num_tokens].

    Args:
        beginnings: of one length, at least one token, fewer than `num_tokens`.
    """
    config, device = model.model.config.get_text_config(), model.device
    budget = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CACHE_BYTES
    text_bytes = num_tokens * kv_token_bytes(config, model.dtype.itemsize)
    rows = max(1, min(ROWS[device.type], budget // text_bytes))
    generator = torch.Generator(device).manual_seed(seed)
    written = []
    for start in range(0, len(beginnings), rows):
        notify("writing text", start * num_tokens, len(beginnings) * num_tokens)
        begun = torch.tensor([list(tokens) for tokens in beginnings[start : start + rows]], device=device)
        written.append(_continued(model, begun, num_tokens, generator).to(torch.int32).cpu().numpy())
    if device.type == "cuda":
        torch.cuda.empty_cache()  # keys and values took much memory, which the training needs in other pieces
    return np.concatenate(written)


def _continued(model: HostModel, begun: Tensor, num_tokens: int, generator: torch.Generator) -> Tensor:
    """Texts [B, num_tokens] that begin with `begun` [B, T]."""
    texts = torch.zeros(len(begun), num_tokens, dtype=torch.int64, device=begun.device)
    texts[:, : begun.shape[1]] = begun
    cache, first = DynamicCache(config=model.model.config), 0
    cache.layers = [_HeldLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    for at in range(begun.shape[1], num_tokens):
        ids = texts[:, first:at]
        model.routing.begin(*ids.shape)
        try:
            output = model.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            model.routing.abandon()
        shares = output.logits[:, -1].float().softmax(dim=-1)
        texts[:, at] = torch.multinomial(shares, 1, generator=generator).flatten()
        first = at
    return texts


class _HeldLayer(DynamicLayer):
    """Keys and values of a layer in memory for `num_tokens` tokens that is taken once: a step copies its own alone."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_tokens = num_tokens
        self._held: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the step's keys and values [B, heads, T, D]; returns those of all tokens, views that live until reset."""
        if not self._held:
            self.lazy_initialization(key_states, value_states)
            states = (key_states, value_states)
            self._held = [one.new_empty(*one.shape[:2], self._num_tokens, one.shape[-1]) for one in states]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for held, own in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, start:end] = own
        self.keys, self.values = (held[:, :, :end] for held in self._held)
        return self.keys, self.values
