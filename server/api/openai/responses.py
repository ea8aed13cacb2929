"""Responses of the OpenAI dialect: models, completions and chats, whole or as chunks of a stream.

Invariant: a minus infinite log-probability, which JSON does not have, is `LEAST_LOGPROB`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from server.api.http.engine_requests import LEAST_LOGPROB
from server.engine.request import TokenEvent, TokenLogprob
from server.serving.deficit import DeficitDetails

EndReason = Literal["stop", "length"]


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class Usage(BaseModel):
    """Token counts; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token; `text_offset` counts characters from the start of the answer's text.

    The first token of an echoed prompt has no log-probability.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]

    @classmethod
    def of(
        cls,
        tokens: Sequence[TokenEvent],
        num_logprobs: int,
        offset: int,
        prefill: Sequence[TokenLogprob] = (),
    ) -> CompletionLogprobs:
        """Of `prefill` and `tokens`, whose text begins at `offset`, with `num_logprobs` alternatives each."""
        shown: list[TokenLogprob | TokenEvent] = [*prefill, *tokens]
        top = [{_name(each.token_bytes): _finite(each.logprob) for each in token.top} or None for token in shown]
        starts = itertools.accumulate((len(token.text) for token in shown), initial=offset)
        return cls(
            tokens=[_name(token.token_bytes) for token in shown],
            token_logprobs=[None if token.logprob is None else _finite(token.logprob) for token in shown],
            top_logprobs=top if num_logprobs else None,
            text_offset=list(starts)[: len(shown)],
        )


class CompletionChoice(BaseModel):
    """One answer, or a chunk of it; `deficit` is ours and comes with the end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: EndReason | None
    deficit: DeficitDetails | None = None


class CompletionResponse(BaseModel):
    """Answer to `/v1/completions`, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Alternative(BaseModel):
    """A token with its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Alternative):
    """A generated token, with the most likely tokens at its place."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[ChatLogprob]
    refusal: None

    @classmethod
    def of(cls, tokens: Sequence[TokenEvent]) -> ChatLogprobs:
        """Of the tokens of a choice or a chunk."""
        return cls(
            content=[
                ChatLogprob(**_entry(token), top_logprobs=[Alternative(**_entry(each)) for each in token.top])
                for token in tokens
            ],
            refusal=None,
        )


class ChatAnswer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer; `deficit` is ours."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: EndReason
    deficit: DeficitDetails


class ChatResponse(BaseModel):
    """Answer to `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """The part of the message that a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A chunk of one answer; `deficit` is ours and comes with the end."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: EndReason | None
    deficit: DeficitDetails | None = None


class ChatChunk(BaseModel):
    """One event of a stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


def _entry(token: TokenEvent | TokenLogprob) -> dict[str, Any]:
    spelled = token.token_bytes
    return {"token": _name(spelled), "logprob": _finite(token.logprob), "bytes": list(spelled)}


def _name(token_bytes: bytes) -> str:
    """A token's text; of a token that is not whole characters its bytes, as OpenAI names them: `bytes:\\xf0\\x9f`."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def _finite(logprob: float | None) -> float:
    assert logprob is not None, "only the first token of a prompt has none"
    return max(logprob, LEAST_LOGPROB)
