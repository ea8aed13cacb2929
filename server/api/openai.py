"""`/v1/models`, `/v1/completions`, `/v1/chat/completions`: what the unmodified `openai` client needs.

As for `/generate`, everything that can be refused is refused before the response begins. A stop string is not part of
the text here. Our own addition: every finished choice has its `deficit`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.answers import Answers
from server.api.chat import chat_ids
from server.api.context import ApiContext, context_of
from server.api.errors import ModelNotFoundError, ValidationFailed, error_body
from server.api.events import DONE, KEEP_ALIVE, EventStream, event, unless_disconnected
from server.api.generate import COLDEST
from server.api.openai_choices import chat_choice, chat_delta, completion_choice
from server.api.openai_responses import (
    ChatResponse,
    CompletionResponse,
    ModelCard,
    ModelList,
    OpenAIErrorResponse,
)
from server.api.openai_schemas import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest
from server.api.openapi import error_response_of, responses
from server.api.stop_filter import StopFilter
from server.engine.request import (
    ContextTooLongError,
    EngineError,
    FinishedEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from server.service import LoadedModel, NotReadyError

router = APIRouter(prefix="/v1")

ChoiceOf = Callable[[int, str, Sequence[TokenEvent], FinishedEvent | None, int | None], dict[str, Any]]
"""(choice, text, tokens, the end if it is there, alternatives a token if wanted) → the choice's JSON."""


@dataclass(frozen=True)
class Dialect:
    """How one of the two routes shows its answers."""

    prefix: str
    whole: str
    chunk: str
    choice: ChoiceOf
    delta: ChoiceOf
    has_opening: bool


COMPLETIONS = Dialect("cmpl-", "text_completion", "text_completion", completion_choice, completion_choice, False)
CHAT = Dialect("chatcmpl-", "chat.completion", "chat.completion.chunk", chat_choice, chat_delta, True)


@dataclass(frozen=True)
class Job:
    """A request that was checked and tokenised: `prompts` times `n` choices."""

    dialect: Dialect
    prompts: list[list[int]]
    n: int
    sampling: SamplingParams
    stops: list[str]
    num_logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@router.get(
    "/models",
    summary="The model that is served",
    response_model=ModelList,
    responses={503: error_response_of(OpenAIErrorResponse, "No model is loaded.")},
)
async def models(request: Request) -> JSONResponse:
    """A list of one."""
    return JSONResponse({"object": "list", "data": [_card(context_of(request))]})


@router.get(
    "/models/{name:path}",
    summary="One model",
    response_model=ModelCard,
    responses={
        404: error_response_of(OpenAIErrorResponse, "Not served here."),
        503: error_response_of(OpenAIErrorResponse, "No model is loaded."),
    },
)
async def model(request: Request, name: str) -> JSONResponse:
    """The model of that name, if it is the one."""
    card = _card(context_of(request))
    if name != card["id"]:
        raise ModelNotFoundError("this server has no such model; GET /v1/models lists what it has", param="model")
    return JSONResponse(card)


@router.post(
    "/completions",
    summary="Continue prompts",
    responses=responses(CompletionResponse, OpenAIErrorResponse, stream=""),
)
async def completions(request: Request) -> Response:
    """Continue one prompt or several, as texts or token ids."""
    context = context_of(request)
    body = await context.read(request, CompletionRequest)
    served = _served(context, body.model)
    _check_count(context, len(body.prompt), body.n)
    context.log_text(request, "prompt", body.prompt)
    encoder = context.encoder(served)
    prompts = [prompt if isinstance(prompt, list) else await encoder.encode(prompt) for prompt in body.prompt]
    job = Job(
        dialect=COMPLETIONS,
        prompts=prompts,
        n=body.n or 1,
        sampling=_sampling(body, served, prompts, body.max_tokens, DEFAULT_COMPLETION_TOKENS),
        stops=body.stop,
        num_logprobs=body.logprobs,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
    return await _answer(request, context, served, job)


@router.post(
    "/chat/completions",
    summary="Answer a chat",
    responses=responses(ChatResponse, OpenAIErrorResponse, stream=""),
)
async def chat(request: Request) -> Response:
    """Answer the last message, with the checkpoint's own chat template."""
    context = context_of(request)
    body = await context.read(request, ChatRequest)
    served = _served(context, body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationFailed("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ValidationFailed("`max_tokens` and `max_completion_tokens` are one; give one", param="max_tokens")
    _check_count(context, 1, body.n)
    context.log_text(request, "prompt", [message.content for message in body.messages])
    ids = await chat_ids(context.encoder(served), body.messages)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    job = Job(
        dialect=CHAT,
        prompts=[ids],
        n=body.n or 1,
        sampling=_sampling(body, served, [ids], wanted, served.max_context_tokens),
        stops=body.stop,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )
    return await _answer(request, context, served, job)


async def _answer(request: Request, context: ApiContext, served: LoadedModel, job: Job) -> Response:
    requests = [
        GenerationRequest(
            request_id=uuid.uuid4().hex,
            prompt_ids=tuple(prompt),
            sampling=job.sampling if job.sampling.seed is None else _reseeded(job.sampling, copy),
            num_logprobs=job.num_logprobs or 0,
        )
        for prompt in job.prompts
        for copy in range(job.n)
    ]
    head = {
        "id": job.dialect.prefix + uuid.uuid4().hex,
        "object": job.dialect.chunk if job.stream else job.dialect.whole,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"deepfew-{context.version}",
    }
    answers = Answers(context, served, requests)
    if job.stream:
        events = _stream(answers, job, head, context.http.keep_alive_seconds, request.url.path)
        return EventStream(events, guard=answers, send_seconds=context.http.send_seconds)
    with answers:
        finished = await unless_disconnected(request, answers.finished())
    context.log_text(request, "answer", [end.generated_text for _, end in finished])
    choices = []
    for index, (tokens, end) in enumerate(finished):
        text = StopFilter(job.stops).finish(end.generated_text, end.stop_text)
        choices.append(job.dialect.choice(index, text, tokens, end, job.num_logprobs))
    num_new = sum(end.num_generated_tokens for _, end in finished)
    return JSONResponse({**head, "choices": choices, "usage": _usage(job.num_prompt_tokens, num_new)})


async def _stream(
    answers: Answers, job: Job, head: dict[str, Any], keep_alive_seconds: float, path: str
) -> AsyncGenerator[bytes, None]:
    filters = [StopFilter(job.stops) for _ in range(len(job.prompts) * job.n)]
    base = {**head, "usage": None} if job.include_usage else head
    offsets = [0] * len(filters)
    num_new = 0
    if job.dialect.has_opening:
        opening = [event({**base, "choices": [_opening(index)]}) for index in range(len(filters))]
        yield b"".join(opening)
    try:
        async for index, batch in answers.batches(keep_alive_seconds):
            if not batch:
                yield KEEP_ALIVE
                continue
            end = batch[-1] if isinstance(batch[-1], FinishedEvent) else None
            tokens = [item for item in batch if isinstance(item, TokenEvent)]
            text = "".join(filters[index].feed(token.text) for token in tokens if not token.special)
            if end is not None:
                text += filters[index].finish(end.generated_text, end.stop_text)
                num_new += end.num_generated_tokens
            if text or end is not None or job.num_logprobs is not None:
                choice = job.dialect.delta(index, text, tokens, end, job.num_logprobs)
                if job.dialect is COMPLETIONS and job.num_logprobs is not None:
                    places = choice["logprobs"]["text_offset"]
                    places[:] = [offsets[index] + place for place in places]
                offsets[index] += sum(len(token.text) for token in tokens)
                yield event({**base, "choices": [choice]})
        if job.include_usage:
            yield event({**base, "choices": [], "usage": _usage(job.num_prompt_tokens, num_new)})
        yield DONE
    except EngineError as error:
        yield event(error_body(error, path))


def _opening(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _served(context: ApiContext, name: str) -> LoadedModel:
    served = context.service.model()
    if name != served.name:
        raise ModelNotFoundError("this server has no such model; GET /v1/models lists what it has", param="model")
    return served


def _check_count(context: ApiContext, num_prompts: int, n: int | None) -> None:
    most = context.http.max_prompts
    if num_prompts * (n or 1) > most:
        raise ValidationFailed(
            f"`n` times the number of prompts is more than {most}, the most for one request", param="n"
        )


def _card(context: ApiContext) -> dict[str, Any]:
    served = context.service.loaded
    if served is None:
        raise NotReadyError(context.service.health().reason)
    return {
        "id": served.name,
        "object": "model",
        "created": int(context.service.started_at),
        "owned_by": "deepfew",
    }


def _sampling(
    body: CompletionRequest | ChatRequest,
    served: LoadedModel,
    prompts: Sequence[Sequence[int]],
    wanted: int | None,
    default: int,
) -> SamplingParams:
    """OpenAI's defaults: temperature 1, so sampling, unless the temperature is 0.

    Raises:
        ContextTooLongError: the longest prompt leaves no room, or less than asked for.
    """
    longest = max(map(len, prompts))
    room = served.max_context_tokens - longest
    if room < 1 or (wanted or 1) > room:
        raise ContextTooLongError(
            f"this model's maximum context length is {served.max_context_tokens} tokens; the prompt has {longest}, "
            "which together with the completion is too long: shorten one of them"
        )
    num_new = wanted if wanted is not None else min(default, room)
    stop = tuple(body.stop)
    if body.temperature == 0:
        return SamplingParams(max_new_tokens=num_new, repetition_penalty=body.repetition_penalty, stop=stop)
    return SamplingParams(
        max_new_tokens=num_new,
        temperature=1.0 if body.temperature is None else max(body.temperature, COLDEST),
        top_k=None if body.top_k is None else min(body.top_k, served.vocab_size),
        top_p=None if body.top_p == 1 else body.top_p,
        repetition_penalty=body.repetition_penalty,
        seed=None if body.seed is None else body.seed % 2**64,
        do_sample=True,
        stop=stop,
    )


def _reseeded(sampling: SamplingParams, copy: int) -> SamplingParams:
    """The same seed gives the same `n` answers, each of them its own."""
    assert sampling.seed is not None
    return replace(sampling, seed=(sampling.seed + copy) % 2**64)


def _usage(num_prompt: int, num_new: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
