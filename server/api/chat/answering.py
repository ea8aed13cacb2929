"""One answer to a chat, whole or as a stream, for the dialects whose requests have one answer.

Invariant: the request is in the engine before the response begins, so that every refusal comes before.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.forcing import answer_constraint
from server.api.chat.messages import Chat
from server.api.chat.parser import AnswerReader, Delta
from server.api.chat.template import Prompt, prompt_of
from server.api.http.context import ApiContext
from server.api.http.engine_requests import request_of
from server.api.http.fields import SamplingFields
from server.api.http.generation import Generations, split
from server.api.http.responses import KEEP_ALIVE, EventStream, ModelResponse, unless_disconnected
from server.constraints.grammar import Constraint
from server.engine.request import EngineError, FinishedEvent, GenerationRequest
from server.serving.deficit import DeficitDetails, deficit_details
from server.serving.service import LoadedModel


@dataclass(frozen=True)
class ChatJob:
    """A chat that was checked and tokenised, and the request for its answer."""

    model: LoadedModel
    prompt: Prompt
    request: GenerationRequest

    def deficit(self, end: FinishedEvent) -> DeficitDetails:
        """The deficit of the finished answer."""
        return deficit_details(end.deficit, self.model, self.request)


@dataclass(frozen=True)
class Ending:
    """The end of an answer, with the counts of its tokens."""

    event: FinishedEvent
    num_thinking_tokens: int
    num_calls: int
    deficit: DeficitDetails


class EventWriter(Protocol):
    """Writes the events of a stream in a dialect; each method returns whole events."""

    def begin(self) -> bytes:
        """Before the answer."""

    def add(self, deltas: list[Delta]) -> bytes:
        """More of the answer."""

    def end(self, ending: Ending) -> bytes:
        """After the answer."""

    def fail(self, error: EngineError) -> bytes:
        """The answer broke off."""


async def prepare(
    context: ApiContext,
    chat: Chat,
    asked: SamplingFields,
    *,
    max_tokens: int | None,
    temperature: float | None,
    content: Constraint | None = None,
) -> ChatJob:
    """Tokenise a chat and check what the schema cannot.

    Args:
        content: the form of the content, if the request wants one.

    Raises:
        ApiError, EngineError: the request is refused.
    """
    model = context.service.model()
    prompt = await context.encoder(model).run(prompt_of, chat)
    sampling = prompt.sampling(model, asked, max_tokens=max_tokens, temperature=temperature)
    constraint = await context.compiled(model, *answer_constraint(prompt, content))
    return ChatJob(model, prompt, request_of(model, prompt.ids, sampling, asked, constraint=constraint))


async def respond(
    request: Request,
    context: ApiContext,
    job: ChatJob,
    whole: Callable[[list[Delta], Ending], BaseModel],
    writer: EventWriter | None,
) -> Response:
    """The response: a stream where there is a `writer`, else what `whole` makes of the answer's parts.

    Raises:
        EngineError: it was refused, or failed before an answer without a stream was whole.
    """
    context.log_text(request, "prompt", [message.content for message in job.prompt.chat.messages])
    generations = Generations(context, job.model, [job.request])
    if writer is not None:
        events = _stream(generations, job, writer, context.http.keep_alive_seconds)
        return EventStream(events, guard=generations, send_seconds=context.http.send_seconds)
    with generations:
        [(tokens, end)] = await unless_disconnected(request, generations.finished())
    context.log_text(request, "answer", end.generated_text)
    reader = AnswerReader(job.prompt.parser())
    deltas = reader.read(tokens, end)
    return ModelResponse(whole(deltas, _ending(job, reader, end)))


def _ending(job: ChatJob, reader: AnswerReader, end: FinishedEvent) -> Ending:
    return Ending(end, reader.num_thinking_tokens, reader.num_calls, job.deficit(end))


async def _stream(
    generations: Generations, job: ChatJob, writer: EventWriter, keep_alive_seconds: float
) -> AsyncGenerator[bytes, None]:
    reader = AnswerReader(job.prompt.parser())
    yield writer.begin()
    try:
        async for _, batch in generations.batches(keep_alive_seconds):
            if not batch:
                yield KEEP_ALIVE
                continue
            tokens, end = split(batch)
            if deltas := reader.read(tokens, end):
                yield writer.add(deltas)
            if end is not None:
                yield writer.end(_ending(job, reader, end))
    except EngineError as error:
        yield writer.fail(error)
