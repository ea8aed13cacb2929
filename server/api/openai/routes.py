"""`/v1/models`, `/v1/completions`, `/v1/chat/completions`: the routes that the unmodified `openai` client needs.

Invariant: as for `/generate`, every refusal comes before the response begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.forcing import answer_constraint
from server.api.chat.template import prompt_of
from server.api.http.constraints import constraint_of
from server.api.http.context import ApiContext, context_of
from server.api.http.engine_requests import request_of, sampling_within
from server.api.http.errors import ModelNotFoundError, ValidationFailed
from server.api.http.openapi import generation_responses, refusals
from server.api.http.responses import ModelResponse
from server.api.openai.completions import CHAT, COMPLETION, Format, Job, respond
from server.api.openai.responses import ChatChunk, ChatResponse, CompletionResponse, ModelCard, ModelList
from server.api.openai.schemas import DEFAULT_COMPLETION_TOKENS, ChatRequest, Common, CompletionRequest
from server.engine.request import SamplingParams
from server.serving.service import LoadedModel, NotReadyError

if TYPE_CHECKING:
    from server.constraints.compiler import CompiledConstraint

router = APIRouter(prefix="/v1")


@router.get(
    "/models",
    summary="The model that is served, by all of its names",
    response_model=ModelList,
    responses=refusals(NotReadyError, dialect="openai"),
)
async def models(request: Request) -> ModelResponse:
    """One entry for each name of the model."""
    context = context_of(request)
    cards = [_card(context, name) for name in context.loaded().names]
    return ModelResponse(
        ModelList(object="list", data=cards, has_more=False, first_id=cards[0].id, last_id=cards[-1].id)
    )


@router.get(
    "/models/{name:path}",
    summary="One model",
    response_model=ModelCard,
    responses=refusals(ModelNotFoundError, NotReadyError, dialect="openai"),
)
async def model(request: Request, name: str) -> ModelResponse:
    """The model, if this is one of its names."""
    context = context_of(request)
    if name not in context.loaded().names:
        raise ModelNotFoundError("this server has no such model; GET /v1/models lists what it has", param="model")
    return ModelResponse(_card(context, name))


@router.post(
    "/completions",
    summary="Continue prompts",
    responses=generation_responses(CompletionResponse, CompletionResponse, dialect="openai", ends_with_done=True),
)
async def completions(request: Request) -> Response:
    """Continue one prompt or several, as texts or token ids."""
    context = context_of(request)
    body = await context.read(request, CompletionRequest)
    served = _served(context, body, len(body.prompt))
    _check_completion(body)
    context.log_text(request, "prompt", body.prompt)
    encoder = context.encoder(served)
    prompts = [prompt if isinstance(prompt, list) else await encoder.encode(prompt) for prompt in body.prompt]
    if any(token >= served.vocab_size for prompt in prompts for token in prompt):
        raise ValidationFailed(
            f"`prompt` has a token id that is not below {served.vocab_size}, the size of the vocabulary", param="prompt"
        )
    sampling = sampling_within(
        served,
        body,
        max(map(len, prompts)),
        wanted=body.max_tokens,
        default=DEFAULT_COMPLETION_TOKENS,
        temperature=body.temperature,
        seed=body.draw_seed,
    )
    constraint = await context.compiled(served, constraint_of(body.response_format), "response_format")
    job = _job(COMPLETION, body, served, prompts, sampling, body.logprobs, constraint)
    if body.echo:
        texts = [await encoder.decode(prompt) if isinstance(prompt, list) else prompt for prompt in body.prompt]
        job = replace(
            job, echoes=[text for text in texts for _ in range(body.n or 1)], hides_answer=not body.max_tokens
        )
    return await respond(request, context, job)


def _check_completion(body: CompletionRequest) -> None:
    """Raises ValidationFailed for values that exclude each other."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ValidationFailed("`best_of` is not supported; leave it out, or give it the value of `n`", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ValidationFailed("`max_tokens` is 0, which only `echo` may have: ask for at least 1", param="max_tokens")
    if body.echo and body.stream and body.logprobs is not None:
        raise ValidationFailed(
            "`echo` with `logprobs` is not supported with a stream; leave out one of the three", param="echo"
        )


@router.post(
    "/chat/completions",
    summary="Answer a chat",
    responses=generation_responses(ChatResponse, ChatChunk, dialect="openai", ends_with_done=True),
)
async def chat(request: Request) -> Response:
    """Answer the last message, with the checkpoint's own chat template."""
    context = context_of(request)
    body = await context.read(request, ChatRequest)
    served = _served(context, body, 1)
    if body.top_logprobs and not body.logprobs:
        raise ValidationFailed("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ValidationFailed("`max_tokens` and `max_completion_tokens` are one; give one", param="max_tokens")
    context.log_text(request, "prompt", [message.content for message in body.messages])
    prompt = await context.encoder(served).run(prompt_of, body.chat())
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    sampling = prompt.sampling(served, body, max_tokens=wanted, temperature=body.temperature, seed=body.draw_seed)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    constraint = await context.compiled(served, *answer_constraint(prompt, constraint_of(body.response_format)))
    job = _job(CHAT, body, served, [prompt.ids], sampling, num_logprobs, constraint)
    return await respond(request, context, replace(job, prompt=prompt))


def _served(context: ApiContext, body: Common, num_prompts: int) -> LoadedModel:
    """The served model, whatever name the request has for it.

    Raises:
        NotReadyError: it takes no request now. ValidationFailed: the request asks for more answers than allowed.
    """
    served = context.service.model()
    most = context.http.max_prompts
    if num_prompts * (body.n or 1) > most:
        raise ValidationFailed(
            f"`n` times the number of prompts is more than {most}, the most for one request", param="n"
        )
    return served


def _job(
    format: Format,
    body: Common,
    served: LoadedModel,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    num_logprobs: int | None,
    constraint: CompiledConstraint | None,
) -> Job:
    """`n` requests for every prompt; the same seed gives the same `n` answers, each of them its own."""
    seed = sampling.seed
    is_echo_scored = bool(getattr(body, "echo", None)) and num_logprobs is not None
    return Job(
        format=format,
        model=served,
        told_name=served.told_name(body.model),
        requests=[
            request_of(
                served,
                prompt,
                sampling if seed is None else replace(sampling, seed=(seed + copy) % 2**64),
                body,
                num_logprobs=num_logprobs or 0,
                prompt_logprobs=is_echo_scored,
                constraint=constraint,
            )
            for prompt in prompts
            for copy in range(body.n or 1)
        ],
        num_prompt_tokens=sum(map(len, prompts)),
        num_logprobs=num_logprobs,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _card(context: ApiContext, name: str) -> ModelCard:
    created, most = int(context.service.started_at), context.loaded().max_context_tokens
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by="deepfew",
        max_model_len=most,
        type="model",
        display_name=name,
        created_at=datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        max_input_tokens=most - 1,
        max_tokens=most - 1,
    )
