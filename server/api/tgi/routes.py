"""`POST /generate`, `/generate_stream` and `/`: the Text Generation Inference contract.

Invariant: every refusal comes before the response begins: the body, the limits, the place in the queue. As in TGI,
`generated_text` ends with the stop string that ended it. `details.deficit` is our own addition.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.http.constraints import constraint_of
from server.api.http.context import ApiContext, context_of
from server.api.http.engine_requests import LEAST_LOGPROB, request_of, sampling_of
from server.api.http.errors import ValidationFailed, error_body
from server.api.http.generation import Generations, split
from server.api.http.openapi import generation_responses
from server.api.http.responses import KEEP_ALIVE, EventStream, ModelResponse, event, unless_disconnected
from server.api.tgi.schemas import (
    DEFAULT_NEW_TOKENS,
    Details,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    GenerateResponses,
    PrefillToken,
    StreamDetails,
    StreamResponse,
    Token,
)
from server.engine.request import ContextTooLongError, EngineError, FinishedEvent, GenerationRequest, TokenEvent
from server.serving.deficit import deficit_details
from server.serving.service import LoadedModel

router = APIRouter()


@dataclass(frozen=True)
class Prompt:
    """A request that was checked and tokenised."""

    request: GenerationRequest
    text: str
    parameters: GenerateParameters
    model: LoadedModel

    @property
    def wants_details(self) -> bool:
        return bool(self.parameters.details or self.parameters.decoder_input_details)


@router.post(
    "/generate",
    summary="Generate tokens",
    responses=generation_responses(GenerateResponse, StreamResponse),
)
async def generate(request: Request) -> Response:
    """Continue `inputs`; with `stream` as server-sent events, one for each token."""
    context = context_of(request)
    body = await context.read(request, GenerateRequest)
    return await _answer(request, context, body, stream=bool(body.stream))


@router.post(
    "/generate_stream",
    summary="Generate a stream of tokens",
    responses=generation_responses(None, StreamResponse),
)
async def generate_stream(request: Request) -> Response:
    """Continue `inputs` as server-sent events, one for each token, whatever `stream` says."""
    context = context_of(request)
    return await _answer(request, context, await context.read(request, GenerateRequest), stream=True)


@router.post("/", summary="Generate tokens", responses=generation_responses(GenerateResponses, StreamResponse))
async def generate_at_root(request: Request) -> Response:
    """As `/generate`, but without a stream the answer is a list of one.

    `InferenceClient` posts here when it is given the server's address. As in TGI, the list is for its older versions.
    """
    context = context_of(request)
    body = await context.read(request, GenerateRequest)
    return await _answer(request, context, body, stream=bool(body.stream), as_list=True)


async def _answer(
    request: Request, context: ApiContext, body: GenerateRequest, *, stream: bool, as_list: bool = False
) -> Response:
    started = time.perf_counter()
    model = context.service.model()
    prompt = await _prepare(context, model, body, stream=stream)
    generations = Generations(context, model, [prompt.request])
    context.log_text(request, "prompt", body.inputs)
    if stream:
        headers = {"x-prompt-tokens": str(len(prompt.request.prompt_ids))}
        events = _stream(generations, prompt, context.http.keep_alive_seconds, request.url.path)
        return EventStream(events, guard=generations, send_seconds=context.http.send_seconds, headers=headers)
    with generations:
        [(tokens, end)] = await unless_disconnected(request, generations.finished())
    context.log_text(request, "answer", end.generated_text)
    details = {"details": _details(prompt, tokens, end)} if prompt.wants_details else {}
    response = GenerateResponse(generated_text=_whole_text(prompt, end), **details)
    answer = GenerateResponses([response]) if as_list else response
    return ModelResponse(answer, headers=_timing_headers(end, time.perf_counter() - started))


async def _prepare(context: ApiContext, model: LoadedModel, body: GenerateRequest, *, stream: bool) -> Prompt:
    """Tokenise the prompt and check what the schema cannot.

    Raises:
        ApiError, EngineError: the request is refused.
    """
    parameters = body.parameters or GenerateParameters()
    if stream and parameters.decoder_input_details:
        raise ValidationFailed(
            "`parameters.decoder_input_details` is not supported with a stream; leave out one of the two",
            param="parameters.decoder_input_details",
        )
    ids = await context.encoder(model).encode(body.inputs)
    if parameters.truncate is not None:
        ids = ids[-parameters.truncate :]
    room = model.max_context_tokens - len(ids)
    if room < 1:
        raise ContextTooLongError(
            f"the prompt has {len(ids)} tokens; prompt and new tokens together may have {model.max_context_tokens}: "
            "shorten the prompt or set `truncate`"
        )
    num_new = parameters.max_new_tokens
    if num_new is not None and num_new > room:
        raise ContextTooLongError(
            f"`parameters.max_new_tokens`: the prompt has {len(ids)} tokens, which leaves room for {room} new ones "
            f"of {model.max_context_tokens} in all, got more: ask for at most {room}"
        )
    default = model.generation_defaults.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    sampling = sampling_of(
        model,
        parameters,
        temperature=parameters.temperature,
        do_sample=parameters.do_sample,
        max_new_tokens=num_new if num_new is not None else min(default, room),
        seed=parameters.seed,
        keep_stop=True,
        path="parameters.",
    )
    request = request_of(
        model,
        ids,
        sampling,
        parameters,
        num_logprobs=parameters.top_n_tokens or 0,
        prompt_logprobs=bool(parameters.decoder_input_details),
        constraint=await context.compiled(model, constraint_of(parameters.grammar), "parameters.grammar"),
        path="parameters.",
    )
    return Prompt(request, body.inputs, parameters, model)


async def _stream(
    generations: Generations, prompt: Prompt, keep_alive_seconds: float, path: str
) -> AsyncGenerator[bytes, None]:
    held: list[TokenEvent] = []  # a stop string that is cut off may take every token after this one
    may_cut = not prompt.request.sampling.include_stop_str_in_output
    try:
        async for _, batch in generations.batches(keep_alive_seconds):
            if not batch:
                yield KEEP_ALIVE
                continue
            tokens, end = split(batch)
            tokens = held + tokens
            held = [tokens.pop()] if may_cut and end is None and tokens else []
            last = tokens.pop() if end is not None and tokens else None
            chunks = [_stream_event(token, prompt, None) for token in tokens]
            if end is not None:
                chunks.append(_stream_event(last, prompt, end))
            if chunks:
                yield b"".join(map(event, chunks))
    except EngineError as error:
        yield event(error_body(error, path))


def _stream_event(token: TokenEvent | None, prompt: Prompt, end: FinishedEvent | None) -> StreamResponse:
    details = None
    if end is not None and prompt.wants_details:
        details = StreamDetails(
            finish_reason=end.reason,
            generated_tokens=end.num_generated_tokens,
            seed=end.seed,
            input_length=end.num_prompt_tokens,
            deficit=deficit_details(end.deficit, prompt.model, prompt.request),
        )
    top = {"top_tokens": _top_tokens(token)} if prompt.parameters.top_n_tokens and token is not None else {}
    return StreamResponse(
        index=0 if token is None else token.index,
        token=None if token is None else _token(token),
        generated_text=None if end is None else _whole_text(prompt, end),
        details=details,
        **top,
    )


def _details(prompt: Prompt, tokens: Sequence[TokenEvent], end: FinishedEvent) -> Details:
    top = {"top_tokens": [_top_tokens(token) for token in tokens]} if prompt.parameters.top_n_tokens else {}
    return Details(
        finish_reason=end.reason,
        generated_tokens=end.num_generated_tokens,
        seed=end.seed,
        prefill=[
            PrefillToken(
                id=token.token_id,
                text=token.text,
                logprob=None if token.logprob is None else max(token.logprob, LEAST_LOGPROB),
            )
            for token in end.prefill or ()
        ],
        tokens=[_token(token) for token in tokens],
        deficit=deficit_details(end.deficit, prompt.model, prompt.request),
        **top,
    )


def _whole_text(prompt: Prompt, end: FinishedEvent) -> str:
    return prompt.text + end.generated_text if prompt.parameters.return_full_text else end.generated_text


def _token(token: TokenEvent) -> Token:
    logprob = max(token.logprob, LEAST_LOGPROB)
    return Token(id=token.token_id, text=token.shown_text, logprob=logprob, special=token.special)


def _top_tokens(token: TokenEvent) -> list[Token]:
    return [
        Token(id=each.token_id, text=each.text, logprob=max(each.logprob, LEAST_LOGPROB), special=each.special)
        for each in token.top
        if each.logprob is not None
    ]


def _timing_headers(end: FinishedEvent, total_seconds: float) -> dict[str, str]:
    inference = end.timing.prefill_seconds + end.timing.decode_seconds
    per_token = inference / max(1, end.num_generated_tokens)
    return {
        "x-total-time": f"{total_seconds * 1000:.0f}",
        "x-queue-time": f"{end.timing.queue_seconds * 1000:.0f}",
        "x-inference-time": f"{inference * 1000:.0f}",
        "x-time-per-token": f"{per_token * 1000:.0f}",
        "x-prompt-tokens": str(end.num_prompt_tokens),
        "x-generated-tokens": str(end.num_generated_tokens),
    }
