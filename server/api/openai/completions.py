"""The answer to an OpenAI request: its generations shown as choices, whole or as the chunks of a stream.

Invariant: all requests are in the engine before the response begins. Every
finished choice has its `deficit`, which is our own addition.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.parser import Answer, AnswerReader, Delta
from server.api.chat.template import Prompt
from server.api.http.context import ApiContext
from server.api.http.errors import error_body
from server.api.http.generation import Generations, split
from server.api.http.responses import DONE, KEEP_ALIVE, EventStream, ModelResponse, event, unless_disconnected
from server.api.openai.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatResponse,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    CompletionTokens,
    EndReason,
    PromptTokens,
    Usage,
)
from server.engine.request import EngineError, FinishedEvent, GenerationRequest, TokenEvent, TokenLogprob
from server.serving.deficit import deficit_details
from server.serving.service import LoadedModel


@dataclass(frozen=True)
class Piece:
    """Text and tokens of one choice: all of them, or those of a chunk.

    Attributes:
        index: of the choice.
        text: without the stop string.
        offset: characters of the choice's tokens before these.
        num_logprobs: alternatives a token; None where no log-probabilities are wanted.
        ending: `deficit` of the finished choice; empty before the end.
        prefill: tokens of the prompt, whose text `text` begins with.
        parts: of a chat's answer, beside its text.
    """

    index: int
    text: str
    tokens: Sequence[TokenEvent]
    offset: int
    num_logprobs: int | None
    finish_reason: EndReason | None
    ending: dict[str, Any]
    prefill: Sequence[TokenLogprob] = ()
    parts: Sequence[Delta] = ()


def _completion_choice(piece: Piece) -> CompletionChoice:
    number = piece.num_logprobs
    return CompletionChoice(
        index=piece.index,
        text=piece.text,
        logprobs=None if number is None else CompletionLogprobs.of(piece.tokens, number, piece.offset, piece.prefill),
        finish_reason=piece.finish_reason,
        **piece.ending,
    )


def _chat_logprobs(piece: Piece) -> ChatLogprobs | None:
    return ChatLogprobs.of(piece.tokens) if piece.num_logprobs is not None and piece.tokens else None


def _chat_choice(piece: Piece) -> ChatChoice:
    assert piece.finish_reason is not None, "a whole choice has ended"
    return ChatChoice(
        index=piece.index,
        message=ChatAnswer.of(Answer.of(piece.parts)),
        logprobs=_chat_logprobs(piece),
        finish_reason=piece.finish_reason,
        **piece.ending,
    )


def _chat_chunk_choice(piece: Piece) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=piece.index,
        delta=ChatDelta.of(piece.parts),
        logprobs=_chat_logprobs(piece),
        finish_reason=piece.finish_reason,
        **piece.ending,
    )


def _chat_opening(index: int) -> ChatChunkChoice:
    return ChatChunkChoice(
        index=index, delta=ChatDelta(role="assistant", content=""), logprobs=None, finish_reason=None
    )


@dataclass(frozen=True)
class Format:
    """The models of one of the two routes.

    Attributes:
        response, chunk: of the whole answer and of a stream's event; `object` names them in the JSON.
        choice, chunk_choice: make a choice of them.
        opening: makes the choice that begins a stream, if there is one.
    """

    id_prefix: str
    object: str
    chunk_object: str
    response: type[BaseModel]
    chunk: type[BaseModel]
    choice: Callable[[Piece], BaseModel]
    chunk_choice: Callable[[Piece], BaseModel]
    opening: Callable[[int], BaseModel] | None


COMPLETION = Format(
    id_prefix="cmpl-",
    object="text_completion",
    chunk_object="text_completion",
    response=CompletionResponse,
    chunk=CompletionResponse,
    choice=_completion_choice,
    chunk_choice=_completion_choice,
    opening=None,
)
CHAT = Format(
    id_prefix="chatcmpl-",
    object="chat.completion",
    chunk_object="chat.completion.chunk",
    response=ChatResponse,
    chunk=ChatChunk,
    choice=_chat_choice,
    chunk_choice=_chat_chunk_choice,
    opening=_chat_opening,
)


@dataclass(frozen=True)
class Job:
    """A request that was checked and tokenised.

    Attributes:
        requests: one for each choice, in their order.
        told_name: name of the model in the answer.
        num_prompt_tokens: a prompt counts once, however many answers it gets.
        num_logprobs: alternatives a token; None where no log-probabilities are wanted.
        prompt: of a chat, tells its answers apart.
        echoes: text of each choice's prompt, which begins its text; empty where none is wanted.
        hides_answer: the prompt alone is wanted, of which one generated token is the price.
    """

    format: Format
    model: LoadedModel
    told_name: str
    requests: list[GenerationRequest]
    num_prompt_tokens: int
    num_logprobs: int | None
    stream: bool
    include_usage: bool
    prompt: Prompt | None = None
    echoes: Sequence[str] = ()
    hides_answer: bool = False

    def readers(self) -> list[AnswerReader]:
        """A reader for each choice of a chat; none for completions."""
        return [] if self.prompt is None else [AnswerReader(self.prompt.parser()) for _ in self.requests]

    def piece(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenEvent],
        end: FinishedEvent | None,
        offset: int = 0,
        num_calls: int = 0,
    ) -> Piece:
        """Text and tokens of a choice, and its end if it is there."""
        if self.hides_answer:
            text, tokens = "", []
        if end is None:
            return Piece(index, text, tokens, offset, self.num_logprobs, None, {})
        reason: EndReason = "length" if end.reason == "length" else "tool_calls" if num_calls else "stop"
        ending = {"deficit": deficit_details(end.deficit, self.model, self.requests[index])}
        return Piece(index, text, tokens, offset, self.num_logprobs, reason, ending)

    def usage(self, ends: Mapping[int, FinishedEvent], readers: Sequence[AnswerReader]) -> Usage:
        """Token counts of the request, from the ends of its choices."""
        num_prompt = self.num_prompt_tokens
        num_new = 0 if self.hides_answer else sum(end.num_generated_tokens for end in ends.values())
        cached: dict[tuple[int, ...], int] = {}
        for index, request in enumerate(self.requests):  # a prompt counts once: as its first choice found it
            cached.setdefault(request.prompt_ids, ends[index].num_cached_tokens)
        details: dict[str, Any] = {"prompt_tokens_details": PromptTokens(cached_tokens=sum(cached.values()))}
        if self.prompt is not None:
            thought = sum(reader.num_thinking_tokens for reader in readers)
            details["completion_tokens_details"] = CompletionTokens(reasoning_tokens=thought)
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_new, total_tokens=num_prompt + num_new, **details)


async def respond(request: Request, context: ApiContext, job: Job) -> Response:
    """The response to a job.

    Raises:
        EngineError: it was refused, or failed before an answer without a stream was whole.
    """
    shown = job.format
    head = {
        "id": shown.id_prefix + uuid.uuid4().hex,
        "object": shown.chunk_object if job.stream else shown.object,
        "created": int(time.time()),
        "model": job.told_name,
        "system_fingerprint": f"deepfew-{context.version}",
    }
    generations = Generations(context, job.model, job.requests)
    if job.stream:
        events = _stream(generations, job, head, context.http.keep_alive_seconds, request.url.path)
        return EventStream(events, guard=generations, send_seconds=context.http.send_seconds)
    with generations:
        finished = await unless_disconnected(request, generations.finished())
    context.log_text(request, "answer", [end.generated_text for _, end in finished])
    choices = []
    readers = job.readers()
    for index, (tokens, end) in enumerate(finished):
        parts = readers[index].read(tokens, end) if readers else []
        num_calls = readers[index].num_calls if readers else 0
        piece = replace(job.piece(index, end.generated_text, tokens, end, num_calls=num_calls), parts=parts)
        if job.echoes:
            piece = replace(piece, text=job.echoes[index] + piece.text, prefill=end.prefill or ())
        choices.append(shown.choice(piece))
    usage = job.usage({index: end for index, (_, end) in enumerate(finished)}, readers)
    return ModelResponse(shown.response(**head, choices=choices, usage=usage))


async def _stream(
    generations: Generations, job: Job, head: dict[str, Any], keep_alive_seconds: float, path: str
) -> AsyncGenerator[bytes, None]:
    shown, chunk = job.format, job.format.chunk
    base = {**head, "usage": None} if job.include_usage else head
    offsets = [0] * len(job.requests)
    readers = job.readers()
    ends: dict[int, FinishedEvent] = {}
    for index, echo in enumerate(job.echoes):
        yield event(chunk(**base, choices=[shown.chunk_choice(replace(job.piece(index, "", [], None), text=echo))]))
    if shown.opening is not None:
        yield b"".join(event(chunk(**base, choices=[shown.opening(index)])) for index in range(len(job.requests)))
    try:
        async for index, batch in generations.batches(keep_alive_seconds):
            if not batch:
                yield KEEP_ALIVE
                continue
            tokens, end = split(batch)
            text = "".join(token.text for token in tokens)
            if end is not None:
                ends[index] = end
            parts = readers[index].read(tokens, end) if readers else []
            has_text = bool(parts if readers else text)
            if has_text or (tokens and job.num_logprobs is not None):
                piece = replace(job.piece(index, text, tokens, None, offsets[index]), parts=parts)
                offsets[index] += len(text)
                yield event(chunk(**base, choices=[shown.chunk_choice(piece)]))
            if end is not None:  # the end has a chunk of its own, without text: clients expect that
                num_calls = readers[index].num_calls if readers else 0
                piece = job.piece(index, "", [], end, offsets[index], num_calls)
                yield event(chunk(**base, choices=[shown.chunk_choice(piece)]))
        if job.include_usage:
            yield event(chunk(**{**base, "choices": [], "usage": job.usage(ends, readers)}))
        yield DONE
    except EngineError as error:
        yield event(error_body(error, path))
