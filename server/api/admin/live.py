"""The stream behind the page: the figures of the moment every second, and the experts whose place or counts changed.

Each stream keeps the cells that its client has, and sends the difference when the client is ready for more. So a slow
client gets fewer and larger differences, and nothing is queued for it. Invariant: at most `MAX_WATCHERS` streams are
open, and each ends when its client leaves or the server drains.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from server.api.admin.schemas import ExpertTotals, GrowthResponse, ReadyResponse, TiersResponse
from server.api.http.context import ApiContext, context_of
from server.api.http.errors import TooManyWatchersError
from server.api.http.openapi import REF, Responses, refusals
from server.api.http.responses import EventStream, named_event
from server.serving.live import Cells, deep_experts, encoded
from server.serving.service import ExpertsSnapshot, LoadedModel, ShardInfo

router = APIRouter()

TICK_SECONDS = 1.0
MAX_WATCHERS = 16


class EngineNow(BaseModel):
    """Requests and tokens of the engine; the last five are counters since the start.

    `cached_tokens` are those of `prompt_tokens` that KV memory had from earlier requests.
    """

    running: int
    waiting: int
    waiting_tokens: int
    kv_tokens: int
    kv_capacity_tokens: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    read_faults: int

    @classmethod
    def of(cls, model: LoadedModel) -> EngineNow:
        """The engine's status as JSON."""
        status = model.engine.status()
        return cls(
            running=status.num_running,
            waiting=status.num_waiting,
            waiting_tokens=status.num_waiting_tokens,
            kv_tokens=status.kv_tokens,
            kv_capacity_tokens=status.kv_capacity_tokens,
            prompt_tokens=status.totals.prompt_tokens,
            cached_tokens=status.totals.cached_tokens,
            generated_tokens=status.totals.generated_tokens,
            steps=status.totals.num_steps,
            read_faults=status.totals.num_read_faults,
        )


class NowEvent(BaseModel):
    """The event `now`, sent every second; all but the first three are left out until the model is loaded.

    `seconds` is the server's clock, for rates. `expected_nats` is the price of the present deficit, where it is known.
    """

    type: Literal["now"]
    seconds: float
    health: ReadyResponse
    engine: EngineNow | None = None
    totals: ExpertTotals | None = None
    tiers: TiersResponse | None = None
    layer_deficit: list[float] | None = None
    expected_nats: float | None = None
    growth: GrowthResponse | None = None


class ExpertsEvent(BaseModel):
    """The event `experts`: all cells, or those that changed since the last such event; arrays are base64.

    A cell is one expert of one layer; its id is `layer * num_experts + expert`. Numbers are little-endian.
    """

    type: Literal["experts"]
    num_layers: int
    num_experts: int
    top_k: int
    ids: str | None = Field(description="uint32 ids of the cells that follow; null: all cells, in order")
    place: str = Field(description="uint8 a cell: 1 available, 2 in a slot, 4 in host memory, 8 damaged; added up")
    demand: str = Field(description="uint32 a cell: times wanted")
    uses: str = Field(description="uint32 a cell: times computed")
    demand_mass: str = Field(description="float32 a cell: router mass that asked for it")
    served_mass: str = Field(description="float32 a cell: router mass that it served")
    deep_experts: str | None = Field(
        description="with all cells: uint16 expert ids, for each deep expert of the store one a layer"
    )


_STREAM: Responses = {
    200: {
        "description": "Named events, until the client leaves.",
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "event": {"enum": ["now", "experts"]},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {
                                "anyOf": [{"$ref": REF.format(model=name)} for name in ("NowEvent", "ExpertsEvent")]
                            },
                        },
                    },
                }
            }
        },
    }
}


@router.get(
    "/experts/live",
    summary="Every expert and the figures of the moment, as they change",
    response_class=Response,
    responses={**_STREAM, **refusals(TooManyWatchersError)},
)
async def live(request: Request) -> Response:
    """Server-sent events: `now` every second, from the start of loading on, and `experts` where something changed."""
    context = context_of(request)
    if request.state.is_head:
        return Response(media_type="text/event-stream")
    if context.watchers.num_open >= MAX_WATCHERS:
        raise TooManyWatchersError(f"{MAX_WATCHERS} viewers watch already, the most there may be; close one")
    return EventStream(_events(context), guard=context.watchers.one(), send_seconds=context.http.send_seconds)


async def _events(context: ApiContext) -> AsyncGenerator[bytes, None]:
    told: tuple[Cells, tuple[ShardInfo, ...]] | None = None
    while True:
        model = context.service.loaded
        found = None if model is None else await asyncio.to_thread(model.experts)
        now = _now(context, model, found)
        yield named_event(now)
        if model is not None and found is not None:
            cells = Cells.of(found)
            before = told[0] if told is not None and told[1] == found.shards else None
            changes = _changes(model, found, cells, before)
            if changes is not None:
                yield named_event(changes)
            told = (cells, found.shards)
        if now.health.state == "draining":
            return
        await asyncio.sleep(TICK_SECONDS)


def _now(context: ApiContext, model: LoadedModel | None, found: ExpertsSnapshot | None) -> NowEvent:
    health = context.service.health()
    of_the_model: dict[str, Any] = {}
    if model is not None and found is not None:
        price = model.price
        of_the_model = {
            "engine": EngineNow.of(model),
            "totals": ExpertTotals.of(found),
            "tiers": TiersResponse.of(found),
            "layer_deficit": found.deficit.tolist(),
            "expected_nats": None if price is None else price.expected_loss(found.overall_deficit).nats,
            "growth": None if model.growth is None else GrowthResponse.of(model.growth.status()),
        }
    return NowEvent(type="now", seconds=time.monotonic(), health=ReadyResponse.of(health), **of_the_model)


def _changes(model: LoadedModel, found: ExpertsSnapshot, cells: Cells, before: Cells | None) -> ExpertsEvent | None:
    """The cells that differ from `before`, all where that is shorter or nothing was told, None where none differs."""
    ids = None if before is None else cells.changed_since(before)
    if ids is not None and len(ids) == 0:
        return None
    if ids is not None and 4 * len(ids) > 3 * len(cells):  # with its id, a changed cell is a fifth longer
        ids = None
    return ExpertsEvent(
        type="experts",
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        ids=None if ids is None else encoded(ids),
        deep_experts=encoded(deep_experts(found.shards)) if ids is None else None,
        **(cells if ids is None else cells.select(ids)).encoded(),
    )
