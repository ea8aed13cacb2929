"""Answers in OpenAI's dialect, whole or as a stream, from requests that were checked.

Invariant: the requests are in the engine before the response begins. A stop string is not part of the text here. Our
own addition: every finished choice has its `deficit`, as `/generate` has it in its details.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.http.answers import Answers
from server.api.http.context import ApiContext
from server.api.http.errors import error_body
from server.api.http.events import DONE, KEEP_ALIVE, EventStream, event, unless_disconnected
from server.api.http.requests import split
from server.api.openai.choices import chat_choice, chat_delta, completion_choice
from server.api.openai.stop_filter import StopFilter
from server.engine.request import EngineError, FinishedEvent, GenerationRequest, TokenEvent
from server.serving.deficit import deficit_payload
from server.serving.service import LoadedModel

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
    """A request that was checked and tokenised.

    Attributes:
        requests: one for each choice, in their order.
        num_prompt_tokens: a prompt counts once, however many answers it gets.
        num_logprobs: alternatives a token, None where no log-probabilities are wanted.
    """

    dialect: Dialect
    requests: list[GenerationRequest]
    num_prompt_tokens: int
    stops: list[str]
    num_logprobs: int | None
    stream: bool
    include_usage: bool


async def answer(request: Request, context: ApiContext, served: LoadedModel, job: Job) -> Response:
    """The response to a job.

    Raises:
        EngineError: it was refused, or failed before an answer without a stream was whole.
    """
    head = {
        "id": job.dialect.prefix + uuid.uuid4().hex,
        "object": job.dialect.chunk if job.stream else job.dialect.whole,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"deepfew-{context.version}",
    }
    answers = Answers(context, served, job.requests)
    if job.stream:
        events = _stream(answers, served, job, head, context.http.keep_alive_seconds, request.url.path)
        return EventStream(events, guard=answers, send_seconds=context.http.send_seconds)
    with answers:
        finished = await unless_disconnected(request, answers.finished())
    context.log_text(request, "answer", [end.generated_text for _, end in finished])
    choices = []
    for index, (tokens, end) in enumerate(finished):
        text = StopFilter(job.stops).finish(end.generated_text, end.stop_text)
        choice = job.dialect.choice(index, text, tokens, end, job.num_logprobs)
        choices.append({**choice, "deficit": deficit_payload(end.deficit, served, job.requests[index])})
    num_new = sum(end.num_generated_tokens for _, end in finished)
    return JSONResponse({**head, "choices": choices, "usage": _usage(job.num_prompt_tokens, num_new)})


async def _stream(
    answers: Answers, served: LoadedModel, job: Job, head: dict[str, Any], keep_alive_seconds: float, path: str
) -> AsyncGenerator[bytes, None]:
    filters = [StopFilter(job.stops) for _ in job.requests]
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
            tokens, end = split(batch)
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
                if end is not None:
                    choice["deficit"] = deficit_payload(end.deficit, served, job.requests[index])
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


def _usage(num_prompt: int, num_new: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
