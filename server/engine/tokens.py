"""Log-probabilities reported to clients: natural logarithms under the model's unmodified distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from server.engine.request import Logprob


def token_logprob(logits: Tensor, token: int, normaliser: float | None = None) -> float:
    """Of one token, from logits [V] float32; `normaliser` is their logsumexp where it is known."""
    if normaliser is not None:
        return float(logits[token]) - normaliser
    return float(logits[token] - torch.logsumexp(logits, dim=-1))


def top_logprobs(logits: Tensor, count: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Logprob, ...]:
    """The `count` most likely tokens, from logits [V] float32."""
    if count == 0:
        return ()
    best = torch.log_softmax(logits, dim=-1).topk(min(count, len(logits)))
    ids = best.indices.tolist()
    return tuple((id_, token_text(tokenizer, id_), value) for id_, value in zip(ids, best.values.tolist(), strict=True))


def prompt_logprobs(logits: Tensor, following: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Logprob]:
    """Of the prompt's tokens that follow, from logits [T, V]; `following` may be one shorter (the prompt's end)."""
    if not following:
        return []
    chosen = torch.tensor(list(following), device=logits.device)[:, None]
    values = torch.log_softmax(logits[: len(following)], dim=-1).gather(-1, chosen)[:, 0].tolist()
    return [(id_, token_text(tokenizer, id_), value) for id_, value in zip(following, values, strict=True)]


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What one token reads by itself, special tokens included."""
    text = tokenizer.decode([token_id])
    assert isinstance(text, str)
    return text
