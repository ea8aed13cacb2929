"""Responses of the OpenAI dialect: models, completions and chats, whole or as chunks of a stream.

Invariant: a minus infinite log-probability, which JSON does not have, is `LEAST_LOGPROB`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from server.api.chat.parser import Answer, Arguments, CallBegin, Content, Delta
from server.api.http.engine_requests import LEAST_LOGPROB
from server.engine.request import TokenEvent, TokenLogprob
from server.serving.deficit import DeficitDetails

EndReason = Literal["stop", "length", "tool_calls"]


class ModelCard(BaseModel):
    """The model that is served: OpenAI's fields, `max_model_len` as vLLM's servers have it, and then Anthropic's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str
    max_input_tokens: int
    max_tokens: int


class ModelList(BaseModel):
    """All names of the model, on one page."""

    object: Literal["list"]
    data: list[ModelCard]
    has_more: Literal[False]
    first_id: str
    last_id: str


class PromptTokens(BaseModel):
    """Tokens of the prompts that earlier requests had read, so that they were not computed."""

    cached_tokens: int


class CompletionTokens(BaseModel):
    """Tokens of the answers that were thinking."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Token counts; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens | None = None


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


class MadeFunction(BaseModel):
    """The function of a call; `arguments` is JSON as the model wrote it."""

    name: str
    arguments: str


class MadeCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: MadeFunction


class ChatAnswer(BaseModel):
    """The assistant's message; the last two are left out where there is no thinking and no call."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[MadeCall] | None = None

    @classmethod
    def of(cls, answer: Answer) -> ChatAnswer:
        """Of an answer in its parts; the content is null beside calls if there is none."""
        parts: dict[str, Any] = {}
        if answer.thinking:
            parts["reasoning_content"] = answer.thinking
        if answer.calls:
            parts["tool_calls"] = [
                MadeCall(
                    id=call.call_id,
                    type="function",
                    function=MadeFunction(name=call.name, arguments=call.arguments),
                )
                for call in answer.calls
            ]
        content = answer.content or (None if answer.calls else "")
        return cls(role="assistant", content=content, refusal=None, **parts)


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


class FunctionDelta(BaseModel):
    """The name with the first part of a call, and more of its arguments."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """More of the call at `index`; `id` and `type` come with its first part."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    """The part of the message that a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> ChatDelta:
        """Of what a chunk adds to the parts of an answer."""
        parts: dict[str, Any] = {}
        for delta in deltas:
            if isinstance(delta, CallBegin | Arguments):
                parts.setdefault("tool_calls", []).append(_call_delta(delta))
            else:
                key = "content" if isinstance(delta, Content) else "reasoning_content"
                parts[key] = parts.get(key, "") + delta.text
        return cls(**parts)


def _call_delta(delta: CallBegin | Arguments) -> ToolCallDelta:
    if isinstance(delta, Arguments):
        return ToolCallDelta(index=delta.index, function=FunctionDelta(arguments=delta.text))
    return ToolCallDelta(
        index=delta.index, id=delta.call_id, type="function", function=FunctionDelta(name=delta.name, arguments="")
    )


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
