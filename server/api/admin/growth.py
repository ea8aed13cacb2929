"""What the store should have next, and the routes that change it: growing, shrinking, reloading.

Invariant: looking needs the ordinary key; every route of `admin_router` needs the admin key, whatever it does. A change
reaches requests between two steps of the engine, so none of them is dropped for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse

from server.api.admin.growth_schemas import (
    DEFAULT_CANDIDATES,
    MAX_CANDIDATES,
    GrowRequest,
    GrowResponse,
    GrowthResponse,
    PlanResponse,
    ReloadRequest,
    ReloadResponse,
    ShrinkRequest,
    ShrinkResponse,
)
from server.api.http.context import context_of
from server.api.http.errors import NotFoundError, ValidationFailed
from server.api.http.middleware import require_admin
from server.api.http.openapi import Responses, error_response_of
from server.api.tgi.schemas import ErrorResponse
from server.growth.status import Candidate, GrowthLike, GrowthStatus

router = APIRouter()
admin_router = APIRouter(dependencies=[Depends(require_admin)])

_LOOKING: Responses = {
    404: error_response_of(ErrorResponse, "What is served cannot change."),
    503: error_response_of(ErrorResponse, "No model is loaded."),
}
_CHANGING: Responses = {
    400: error_response_of(ErrorResponse, "The body is not a JSON document."),
    403: error_response_of(ErrorResponse, "The admin key is not shown, or none is set."),
    408: error_response_of(ErrorResponse, "The body did not arrive in time."),
    409: error_response_of(ErrorResponse, "Not in this state: another change is under way, or there is nothing to do."),
    413: error_response_of(ErrorResponse, "The body is too long."),
    415: error_response_of(ErrorResponse, "The body is not application/json."),
    422: error_response_of(ErrorResponse, "A value that is not taken, or a store that cannot be changed so."),
    500: error_response_of(ErrorResponse, "The store could not be written."),
    **_LOOKING,
}
_COUNT_PARAMETER = {
    "name": "count",
    "in": "query",
    "required": False,
    "description": f"candidates to list; default {DEFAULT_CANDIDATES}",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_CANDIDATES},
}


@router.get(
    "/experts/plan",
    summary="What to extract next",
    response_model=PlanResponse,
    responses={422: error_response_of(ErrorResponse, "A parameter that is not taken."), **_LOOKING},
    openapi_extra={"parameters": [_COUNT_PARAMETER]},
)
async def plan(request: Request) -> JSONResponse:
    """Deep experts that the store lacks, ranked by what was wanted and missing, within the byte budget."""
    count, growth = _count(request), _growth_of(request)
    found = await asyncio.to_thread(growth.candidates)
    return JSONResponse(
        {
            "candidates": [_candidate(one) for one in found[:count]],
            "num_candidates": len(found),
            "growth": growth_payload(growth.status()),
        }
    )


@router.get("/experts/growth", summary="How a growth goes", response_model=GrowthResponse, responses=_LOOKING)
async def growth(request: Request) -> JSONResponse:
    """What the store is going through now, and what it went through since the server started."""
    return JSONResponse(growth_payload(_growth_of(request).status()))


@admin_router.post(
    "/experts/grow",
    summary="Extract the experts that are wanted most and missing",
    status_code=202,
    response_model=GrowResponse,
    responses=_CHANGING,
)
async def grow(request: Request) -> JSONResponse:
    """Begins in the background; `GET /experts/growth` says how it goes. Requests are served meanwhile."""
    body = await context_of(request).read(request, GrowRequest, optional=True)
    growth = _growth_of(request, ready=True)
    started = await asyncio.to_thread(growth.grow, body.count)
    payload = {"started": [_candidate(one) for one in started], "growth": growth_payload(growth.status())}
    return JSONResponse(payload, status_code=202)


@admin_router.post(
    "/experts/shrink", summary="Give deep experts up", response_model=ShrinkResponse, responses=_CHANGING
)
async def shrink(request: Request) -> JSONResponse:
    """The manifest first, then the running model, then the files, if no other process reads them."""
    body = await context_of(request).read(request, ShrinkRequest)
    if (body.count is None) == (body.indices is None):
        raise ValidationFailed("give either `count` or `indices`", param="count")
    growth = _growth_of(request, ready=True)
    done = await asyncio.to_thread(growth.shrink, body.indices, count=body.count)
    removed = [
        {"index": deep.index, "file": deep.file, "bytes": deep.bytes, "experts": list(deep.experts)}
        for deep in done.removed
    ]
    return JSONResponse(
        {"removed": removed, "freed_bytes": done.freed_bytes, "growth": growth_payload(growth.status())}
    )


@admin_router.post(
    "/experts/reload",
    summary="Take over what was done to the store on disk",
    response_model=ReloadResponse,
    responses=_CHANGING,
)
async def reload(request: Request) -> JSONResponse:
    """After `deepfew grow` or `deepfew shrink` on the same directory."""
    await context_of(request).read(request, ReloadRequest, optional=True)
    growth = _growth_of(request, ready=True)
    done = await asyncio.to_thread(growth.reload)
    return JSONResponse(
        {"added": done.num_added, "removed": done.num_removed, "growth": growth_payload(growth.status())}
    )


def growth_payload(status: GrowthStatus) -> dict[str, Any]:
    """The JSON of `/experts/growth`."""
    return {
        "state": status.state,
        "progress": min(status.done_bytes / status.total_bytes, 1.0) if status.total_bytes else 0.0,
        "done_bytes": status.done_bytes,
        "total_bytes": status.total_bytes,
        "error": status.error,
        "growths": status.num_growths,
        "failures": status.num_failures,
        "shrinks": status.num_shrinks,
        "grown_bytes": status.grown_bytes,
        "deep_experts": status.num_deep_experts,
        "held_bytes": status.held_bytes,
        "budget_bytes": status.budget_bytes,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "experts": list(candidate.experts),
        "bytes": candidate.num_bytes,
        "score": candidate.score,
        "missing_share": candidate.missing_share,
        "reason": candidate.reason,
    }


def _growth_of(request: Request, *, ready: bool = False) -> GrowthLike:
    context = context_of(request)
    model = context.service.model() if ready else context.loaded()
    if model.growth is None:
        raise NotFoundError("what is served here cannot change: it has no store on disk")
    return model.growth


def _count(request: Request) -> int:
    given = request.query_params.multi_items()
    if not given:
        return DEFAULT_CANDIDATES
    (name, text), *more = given
    if name != "count" or more:
        raise ValidationFailed("the only parameter is `count`, once", param="count")
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MAX_CANDIDATES:
        raise ValidationFailed(f"`count` must be an integer from 1 to {MAX_CANDIDATES}", param="count")
    return int(text)
