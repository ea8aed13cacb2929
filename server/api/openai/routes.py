"""`/v1/models`, `/v1/completions`, `/v1/chat/completions`: the routes that the unmodified `openai` client needs.

Invariant: as for `/generate`, every refusal comes before the response begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.http.context import ApiContext, context_of
from server.api.http.engine_requests import request_of, sampling_of
from server.api.http.errors import ModelNotFoundError, ValidationFailed
from server.api.http.openapi import generation_responses, refusals
from server.api.http.responses import ModelResponse
from server.api.openai.chat import chat_ids
from server.api.openai.completions import CHAT, COMPLETION, Format, Job, respond
from server.api.openai.responses import ChatChunk, ChatResponse, CompletionResponse, ModelCard, ModelList
from server.api.openai.schemas import DEFAULT_COMPLETION_TOKENS, ChatRequest, Common, CompletionRequest
from server.engine.request import ContextTooLongError, SamplingParams
from server.serving.service import LoadedModel, NotReadyError

router = APIRouter(prefix="/v1")


@router.get(
    "/models",
    summary="The model that is served",
    response_model=ModelList,
    responses=refusals(NotReadyError, openai=True),
)
async def models(request: Request) -> ModelResponse:
    """A list of one."""
    return ModelResponse(ModelList(object="list", data=[_card(context_of(request))]))


@router.get(
    "/models/{name:path}",
    summary="One model",
    response_model=ModelCard,
    responses=refusals(ModelNotFoundError, NotReadyError, openai=True),
)
async def model(request: Request, name: str) -> ModelResponse:
    """The model of that name, if it is the one."""
    card = _card(context_of(request))
    if name != card.id:
        raise ModelNotFoundError("this server has no such model; GET /v1/models lists what it has", param="model")
    return ModelResponse(card)


@router.post(
    "/completions",
    summary="Continue prompts",
    responses=generation_responses(CompletionResponse, CompletionResponse, ModelNotFoundError, openai=True),
)
async def completions(request: Request) -> Response:
    """Continue one prompt or several, as texts or token ids."""
    context = context_of(request)
    body = await context.read(request, CompletionRequest)
    served = _served(context, body, len(body.prompt))
    context.log_text(request, "prompt", body.prompt)
    encoder = context.encoder(served)
    prompts = [prompt if isinstance(prompt, list) else await encoder.encode(prompt) for prompt in body.prompt]
    sampling = _sampling(body, served, prompts, body.max_tokens, DEFAULT_COMPLETION_TOKENS)
    return await respond(request, context, _job(COMPLETION, body, served, prompts, sampling, body.logprobs))


@router.post(
    "/chat/completions",
    summary="Answer a chat",
    responses=generation_responses(ChatResponse, ChatChunk, ModelNotFoundError, openai=True),
)
async def chat(request: Request) -> Response:
    """Answer the last message, with the checkpoint's own chat template."""
    context = context_of(request)
    body = await context.read(request, ChatRequest)
    served = _served(context, body, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise ValidationFailed("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ValidationFailed("`max_tokens` and `max_completion_tokens` are one; give one", param="max_tokens")
    context.log_text(request, "prompt", [message.content for message in body.messages])
    prompts = [await chat_ids(context.encoder(served), body.messages)]
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    sampling = _sampling(body, served, prompts, wanted, served.max_context_tokens)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return await respond(request, context, _job(CHAT, body, served, prompts, sampling, num_logprobs))


def _job(
    format: Format,
    body: Common,
    served: LoadedModel,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    num_logprobs: int | None,
) -> Job:
    """`n` requests for every prompt; the same seed gives the same `n` answers, each of them its own."""
    seed = sampling.seed
    return Job(
        format=format,
        model=served,
        requests=[
            request_of(
                served,
                prompt,
                sampling if seed is None else replace(sampling, seed=(seed + copy) % 2**64),
                body,
                num_logprobs=num_logprobs or 0,
            )
            for prompt in prompts
            for copy in range(body.n or 1)
        ],
        num_prompt_tokens=sum(map(len, prompts)),
        num_logprobs=num_logprobs,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _served(context: ApiContext, body: Common, num_prompts: int) -> LoadedModel:
    """The served model, if the request names it and asks for no more answers than allowed."""
    served = context.service.model()
    if body.model != served.name:
        raise ModelNotFoundError("this server has no such model; GET /v1/models lists what it has", param="model")
    most = context.http.max_prompts
    if num_prompts * (body.n or 1) > most:
        raise ValidationFailed(
            f"`n` times the number of prompts is more than {most}, the most for one request", param="n"
        )
    return served


def _card(context: ApiContext) -> ModelCard:
    return ModelCard(
        id=context.loaded().name,
        object="model",
        created=int(context.service.started_at),
        owned_by="deepfew",
    )


def _sampling(
    body: Common, served: LoadedModel, prompts: Sequence[Sequence[int]], wanted: int | None, default: int
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
    is_greedy = body.temperature == 0
    return sampling_of(
        served,
        max_new_tokens=wanted if wanted is not None else min(default, room),
        temperature=None if is_greedy else 1.0 if body.temperature is None else body.temperature,
        top_k=None if is_greedy else body.top_k,
        top_p=None if is_greedy or body.top_p == 1 else body.top_p,
        repetition_penalty=body.repetition_penalty,
        seed=None if is_greedy or body.seed is None else body.seed % 2**64,
        do_sample=not is_greedy,
        stop=body.stop,
        include_stop_str_in_output=False,
    )
