"""Log-probabilities reported to clients: natural logarithms under the model's unmodified distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.request import TokenLogprob
from server.engine.text import Vocabulary


def token_logprob(logits: Tensor, token: int, normaliser: float | None = None) -> float:
    """The log-probability of one token, from logits [V] float32; `normaliser` is their logsumexp, if known."""
    if normaliser is not None:
        return float(logits[token]) - normaliser
    return float(logits[token] - torch.logsumexp(logits, dim=-1))


def top_logprobs(logits: Tensor, count: int, vocabulary: Vocabulary) -> list[tuple[TokenLogprob, ...]]:
    """For each row of logits [T, V] float32 the `count` most likely tokens, the most likely first."""
    if count == 0:
        return [()] * len(logits)
    best = torch.log_softmax(logits, dim=-1).topk(min(count, logits.shape[-1]))
    return [
        tuple(_logprob(id_, value, vocabulary) for id_, value in zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def prompt_logprobs(
    logits: Tensor, following: Sequence[int], num_top: int, vocabulary: Vocabulary
) -> list[TokenLogprob]:
    """Log-probabilities of the prompt tokens `following`, from logits [T, V]; `following` may be one shorter than T."""
    if not following:
        return []
    logits = logits[: len(following)]
    chosen = torch.tensor(list(following), device=logits.device)[:, None]
    values = torch.log_softmax(logits, dim=-1).gather(-1, chosen)[:, 0].tolist()
    tops = top_logprobs(logits, num_top, vocabulary)
    return [_logprob(id_, value, vocabulary, top) for id_, value, top in zip(following, values, tops, strict=True)]


def _logprob(token_id: int, value: float, vocabulary: Vocabulary, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(token_id, vocabulary.bytes_of(token_id), value, vocabulary.is_special(token_id), top)
