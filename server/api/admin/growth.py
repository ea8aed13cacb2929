"""Routes that show what the store should have next, and routes that grow, shrink and reload it.

Invariant: the routes of `router` need the ordinary key, those of `admin_router` the admin key. A change reaches the
model between two steps of the engine, so no request is dropped for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Depends
from starlette.requests import Request

from server.api.admin.schemas import (
    DEFAULT_CANDIDATES,
    MAX_CANDIDATES,
    CandidateResponse,
    GrowRequest,
    GrowResponse,
    GrowthResponse,
    PlanResponse,
    ReloadRequest,
    ReloadResponse,
    RemovedResponse,
    ShrinkRequest,
    ShrinkResponse,
)
from server.api.http.context import context_of
from server.api.http.errors import ForbiddenError, NotFoundError, ValidationFailed
from server.api.http.middleware import require_admin
from server.api.http.openapi import refusals
from server.api.http.responses import ModelResponse
from server.growth.status import GrowthBusyError, GrowthError, GrowthLike, GrowthSourceError, NothingToGrowError
from server.serving.service import NotReadyError

router = APIRouter()
admin_router = APIRouter(dependencies=[Depends(require_admin)])

_CHANGING = refusals(
    *(ForbiddenError, NotFoundError, GrowthBusyError, NothingToGrowError, GrowthSourceError, GrowthError),
    *(Exception, NotReadyError),
    body=True,
)
_COUNT_PARAMETER = {
    "name": "count",
    "in": "query",
    "required": False,
    "description": f"candidates to list; default {DEFAULT_CANDIDATES}",
    "schema": {"type": "integer", "minimum": 1, "maximum": MAX_CANDIDATES},
}


@router.get(
    "/experts/plan",
    summary="The deep experts to extract next",
    response_model=PlanResponse,
    responses=refusals(ValidationFailed, NotFoundError, NotReadyError),
    openapi_extra={"parameters": [_COUNT_PARAMETER]},
)
async def plan(request: Request) -> ModelResponse:
    """Deep experts that the store lacks, ranked by missing router mass, within the byte budget."""
    count, growth = num_candidates(request.query_params.multi_items()), _growth_of(request)
    found = await asyncio.to_thread(growth.candidates)
    return ModelResponse(
        PlanResponse(
            candidates=[CandidateResponse.of(one) for one in found[:count]],
            num_candidates=len(found),
            growth=GrowthResponse.of(growth.status()),
        )
    )


@router.get(
    "/experts/growth",
    summary="Progress of a growth",
    response_model=GrowthResponse,
    responses=refusals(NotFoundError, NotReadyError),
)
async def growth(request: Request) -> ModelResponse:
    """The present change of the store, and the changes since the server started."""
    return ModelResponse(GrowthResponse.of(_growth_of(request).status()))


@admin_router.post(
    "/experts/grow",
    summary="Extract the experts that are wanted most and missing",
    status_code=202,
    response_model=GrowResponse,
    responses=_CHANGING,
)
async def grow(request: Request) -> ModelResponse:
    """Begins in the background; `GET /experts/growth` shows the progress. Requests are served meanwhile."""
    body = await context_of(request).read(request, GrowRequest, optional=True)
    growth = _growth_of(request, ready=True)
    if body.count is not None and body.experts is not None:
        raise ValidationFailed("give `count` or `experts`, not both", param="experts")
    named = [tuple(experts) for experts in body.experts or ()]
    started = [CandidateResponse.of(one) for one in await asyncio.to_thread(growth.grow, body.count or 1, named)]
    return ModelResponse(GrowResponse(started=started, growth=GrowthResponse.of(growth.status())), status_code=202)


@admin_router.post(
    "/experts/shrink", summary="Give deep experts up", response_model=ShrinkResponse, responses=_CHANGING
)
async def shrink(request: Request) -> ModelResponse:
    """Changes the manifest first, then the running model, then deletes the files if no other process reads them."""
    body = await context_of(request).read(request, ShrinkRequest)
    if (body.count is None) == (body.indices is None):
        raise ValidationFailed("give either `count` or `indices`", param="count")
    growth = _growth_of(request, ready=True)
    done = await asyncio.to_thread(growth.shrink, body.indices, count=body.count)
    removed = [
        RemovedResponse(index=deep.index, file=deep.file, bytes=deep.bytes, experts=list(deep.experts))
        for deep in done.removed
    ]
    return ModelResponse(
        ShrinkResponse(removed=removed, freed_bytes=done.freed_bytes, growth=GrowthResponse.of(growth.status()))
    )


@admin_router.post(
    "/experts/reload",
    summary="Take the changes of the store on disk",
    response_model=ReloadResponse,
    responses=_CHANGING,
)
async def reload(request: Request) -> ModelResponse:
    """For use after `deepfew grow` or `deepfew shrink` on the same directory."""
    await context_of(request).read(request, ReloadRequest, optional=True)
    growth = _growth_of(request, ready=True)
    done = await asyncio.to_thread(growth.reload)
    return ModelResponse(
        ReloadResponse(added=done.num_added, removed=done.num_removed, growth=GrowthResponse.of(growth.status()))
    )


def _growth_of(request: Request, *, ready: bool = False) -> GrowthLike:
    context = context_of(request)
    model = context.service.model() if ready else context.loaded()
    if model.growth is None:
        raise NotFoundError("what is served here cannot change: it has no store on disk")
    return model.growth


def num_candidates(given: Sequence[tuple[str, str]]) -> int:
    """The value of `count` among the parameters of a plan's query. Raises ValidationFailed."""
    if not given:
        return DEFAULT_CANDIDATES
    (name, text), *more = given
    if name != "count" or more:
        raise ValidationFailed("the only parameter is `count`, once", param="count")
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MAX_CANDIDATES:
        raise ValidationFailed(f"`count` must be an integer from 1 to {MAX_CANDIDATES}", param="count")
    return int(text)
