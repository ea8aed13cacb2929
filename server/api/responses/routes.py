"""`/v1/responses`: OpenAI's newer route, which agents use. Nothing is stored, so a request has the whole input."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat.answering import prepare, respond
from server.api.http.context import context_of
from server.api.http.openapi import generation_responses
from server.api.responses.items import ResponseEvent, ResponseObject, ResponseWriter
from server.api.responses.schemas import ResponsesRequest

router = APIRouter(prefix="/v1/responses")


@router.post(
    "",
    summary="Answer items, in OpenAI's Responses dialect",
    responses=generation_responses(ResponseObject, ResponseEvent, dialect="openai"),
)
async def responses(request: Request) -> Response:
    """Answer the input, with the checkpoint's own chat template."""
    context = context_of(request)
    body = await context.read(request, ResponsesRequest)
    job = await prepare(
        context,
        body.chat(),
        body,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        content=body.content(),
    )
    writer = ResponseWriter(_asked(body, job.model.told_name(body.model)), body.namespaces)
    return await respond(request, context, job, writer.whole, writer if body.stream else None)


def _asked(body: ResponsesRequest, model: str) -> ResponseObject:
    """The response before it has begun: what was asked for."""
    choice = body.tool_choice or "auto"
    asked_format: dict[str, Any] = {"type": "text"}
    if body.text and body.text.format:
        asked_format = body.text.format.model_dump(exclude_unset=True, by_alias=True)
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        object="response",
        created_at=int(time.time()),
        status="in_progress",
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=None,
        reasoning={
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        },
        store=False,
        temperature=body.temperature,
        text={"format": asked_format},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        top_p=body.top_p,
        truncation="disabled",
        usage=None,
    )
