"""The FastAPI application: the routes, the middleware and the handlers of errors. CORS is off.

Invariant: every error has the shape of its path's dialect.
"""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.api.admin import growth, live, status
from server.api.admin.live import ExpertsEvent, NowEvent
from server.api.admin.schemas import GrowRequest, NotReadyResponse, ReloadRequest, ShrinkRequest
from server.api.anthropic import routes as anthropic
from server.api.anthropic.responses import AssistantMessage, MessageEvent
from server.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from server.api.http.context import ApiContext
from server.api.http.errors import ApiError, MethodError, NotFoundError, ValidationFailed, error_response
from server.api.http.middleware import OPEN_PATHS, Gate
from server.api.http.openapi import ADMIN_TAG, install_openapi
from server.api.openai import routes as openai
from server.api.openai.responses import ChatChunk, ChatResponse, CompletionResponse
from server.api.openai.schemas import ChatRequest, CompletionRequest
from server.api.page import routes as page
from server.api.responses import routes as responses
from server.api.responses.items import ResponseEvent, ResponseObject
from server.api.responses.schemas import ResponsesRequest
from server.api.tgi import routes as tgi
from server.api.tgi.schemas import GenerateRequest, GenerateResponse, GenerateResponses, StreamResponse
from server.engine.request import EngineError
from server.growth.status import GrowthError
from server.serving.metrics import Metrics
from server.serving.service import Service
from server.settings.schema import HttpSettings

CLIENT_CLOSED_REQUEST = 499
BODIES: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("/generate", "/generate_stream", "/"), GenerateRequest),
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/experts/grow": GrowRequest,
    "/experts/shrink": ShrinkRequest,
    "/experts/reload": ReloadRequest,
}
"""The JSON body of each POST, by its path."""
MODELS: list[type[BaseModel]] = [
    GenerateResponse,
    GenerateResponses,
    StreamResponse,
    NotReadyResponse,
    NowEvent,
    ExpertsEvent,
    CompletionResponse,
    ChatResponse,
    ChatChunk,
    ResponseObject,
    ResponseEvent,
    AssistantMessage,
    MessageEvent,
]
"""Models that the responses refer to."""


def create_app(
    service: Service, metrics: Metrics, http: HttpSettings, *, version: str, log_prompts: bool = False
) -> FastAPI:
    """The application over a service; it starts and stops nothing itself."""
    key, admin_key = (None if k is None else k.get_secret_value() for k in (http.api_key, http.admin_key))
    app = FastAPI(
        title="deepfew",
        version=version,
        description="Serves a Mixture-of-Experts language model from the experts that fit.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(Gate, api_key=key, admin_key=admin_key, metrics=metrics)],
        exception_handlers={
            ApiError: _on_error,
            EngineError: _on_error,
            GrowthError: _on_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
        },
    )
    app.state.context = ApiContext(service, metrics, http, version, log_prompts)
    app.include_router(tgi.router, tags=["generate"])
    app.include_router(openai.router, tags=["openai"])
    app.include_router(responses.router, tags=["openai"])
    app.include_router(anthropic.router, tags=["anthropic"])
    app.include_router(status.router, tags=["status"])
    app.include_router(growth.router, tags=["status"])
    app.include_router(live.router, tags=["status"])
    app.include_router(growth.admin_router, tags=[ADMIN_TAG])
    app.include_router(page.router)
    install_openapi(
        app,
        bodies=BODIES,
        optional_bodies=frozenset({"/experts/grow", "/experts/reload"}),
        models=MODELS,
        has_key=key is not None,
        has_admin_key=admin_key is not None,
        open_paths=OPEN_PATHS,
    )
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path, request.state.request_id)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        ours: ApiError = NotFoundError(
            "no such path: this server generates text, and has no embeddings, files or other services; "
            "GET /openapi.json lists all paths"
        )
    elif error.status_code == 405:
        ours = MethodError("this path does not take this method", headers=error.headers)
    else:
        ours = ValidationFailed("the request was refused")
    return error_response(ours, request.url.path, request.state.request_id)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
