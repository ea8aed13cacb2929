"""One choice of an OpenAI answer as JSON: whole or as a chunk of a stream, with log-probabilities where wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.http.requests import LEAST_LOGPROB
from server.engine.request import FinishedEvent, TokenEvent

Choice = dict[str, Any]


def completion_choice(
    index: int, text: str, tokens: Sequence[TokenEvent], end: FinishedEvent | None, num_logprobs: int | None
) -> Choice:
    """Of `/v1/completions`; the same shape for the whole and for a chunk."""
    return {
        "index": index,
        "text": text,
        "logprobs": None if num_logprobs is None else _completion_logprobs(tokens, num_logprobs),
        "finish_reason": _reason(end),
    }


def chat_choice(
    index: int, text: str, tokens: Sequence[TokenEvent], end: FinishedEvent | None, num_logprobs: int | None
) -> Choice:
    """Of `/v1/chat/completions`, whole."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return _chat(index, {"message": message}, tokens, end, num_logprobs)


def chat_delta(
    index: int, text: str, tokens: Sequence[TokenEvent], end: FinishedEvent | None, num_logprobs: int | None
) -> Choice:
    """Of `/v1/chat/completions`, a chunk."""
    return _chat(index, {"delta": {"content": text} if text else {}}, tokens, end, num_logprobs)


def _chat(
    index: int, body: Choice, tokens: Sequence[TokenEvent], end: FinishedEvent | None, num_logprobs: int | None
) -> Choice:
    logprobs = (
        None if num_logprobs is None else {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
    )
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": _reason(end)}


def _reason(end: FinishedEvent | None) -> str | None:
    if end is None:
        return None
    return "length" if end.reason == "length" else "stop"


def _completion_logprobs(tokens: Sequence[TokenEvent], num_logprobs: int) -> dict[str, Any]:
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    top = [{text: max(logprob, LEAST_LOGPROB) for _, text, logprob in token.top} for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": top if num_logprobs else None,
        "text_offset": offsets,
    }


def _chat_logprob(token: TokenEvent) -> dict[str, Any]:
    top = [_entry(text, logprob) for _, text, logprob in token.top]
    return {**_entry(token.text, token.logprob), "top_logprobs": top}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode())}
