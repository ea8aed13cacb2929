"""`/v1/messages` and `/v1/messages/count_tokens`: the routes that the unmodified `anthropic` client needs."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.anthropic.responses import (
    AssistantMessage,
    MessageEvent,
    MessageWriter,
    TokenCountResponse,
    message_of,
)
from server.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from server.api.chat.answering import prepare, respond
from server.api.chat.parser import Answer
from server.api.chat.template import prompt_of
from server.api.http.context import context_of
from server.api.http.openapi import generation_responses, refusals
from server.api.http.responses import ModelResponse
from server.engine.request import QueueFullError
from server.serving.service import NotReadyError

router = APIRouter(prefix="/v1/messages")


@router.post(
    "",
    summary="Answer a chat, in Anthropic's dialect",
    responses=generation_responses(AssistantMessage, MessageEvent, dialect="anthropic"),
)
async def messages(request: Request) -> Response:
    """Answer the last message, with the checkpoint's own chat template."""
    context = context_of(request)
    body = await context.read(request, MessagesRequest)
    asked = body.sampling()
    job = await prepare(
        context,
        body.chat(),
        asked,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        content=body.content(),
    )
    message_id, name = f"msg_{uuid.uuid4().hex}", job.model.told_name(body.model)
    writer = MessageWriter(message_id, name, len(job.prompt.ids), request.url.path) if body.stream else None
    return await respond(
        request, context, job, lambda deltas, ending: message_of(message_id, name, Answer.of(deltas), ending), writer
    )


@router.post(
    "/count_tokens",
    summary="Count the tokens of a chat",
    response_model=TokenCountResponse,
    responses=refusals(NotReadyError, QueueFullError, body=True, dialect="anthropic"),
)
async def count_tokens(request: Request) -> ModelResponse:
    """The tokens of the prompt that `/v1/messages` would make."""
    context = context_of(request)
    body = await context.read(request, CountTokensRequest)
    prompt = await context.encoder(context.loaded()).run(prompt_of, body.chat())
    return ModelResponse(TokenCountResponse(input_tokens=len(prompt.ids)))
