"""The routes of a cluster that are about all of its replicas: what they have together, and growth for all stores.

Invariants: a replica checks the key and the parameters of every request before anything is told or changed; an answer
has the fields that one server's has, and what only a cluster has beside them.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from starlette.responses import Response

from server.api.admin.growth import num_candidates
from server.api.admin.schemas import (
    MAX_CANDIDATES,
    FleetCandidateResponse,
    FleetChangeResponse,
    FleetGrowthResponse,
    FleetPlanResponse,
    GrowthResponse,
    StoreResponse,
)
from server.api.http.errors import ValidationFailed
from server.api.http.responses import ModelResponse
from server.api.replicas import PassedRequest, Replicas
from server.growth.fleet import FleetPlan, FleetStore, total
from server.serving.exposition import merge_expositions
from server.serving.metrics import CONTENT_TYPE

Answers = Mapping[str, tuple[int, bytes]]
PLACES = ("available", "resident", "in_host")
SUMS = (
    "uses", "demand", "served_mass", "demand_mass", "top1_missing", "hits", "misses", "evictions", "fetch_bytes",
    "fetch_seconds",
)  # fmt: skip
TOTALS = (
    "uses", "demand", "served_mass", "demand_mass", "tokens", "top1_missing_tokens", "hits", "misses", "evictions",
    "fetch_bytes", "fetch_seconds", "slots_per_layer", "slot_bytes", "host_hits", "host_misses",
)  # fmt: skip


def _refusal(answers: Answers) -> Response | None:
    """The first answer that is no success."""
    refused = [answer for answer in answers.values() if answer[0] != 200]
    return Response(refused[0][1], refused[0][0], media_type="application/json") if refused else None


def merged_experts(found: Mapping[str, Any]) -> dict[str, Any]:
    """`/experts` of all replicas: places where any has an expert, sums of what is counted, and totals of each."""
    answers = list(found.values())
    first, masses = answers[0], np.array([one["demand_mass"] for one in answers])
    arrays = {name: np.any([one[name] for one in answers], axis=0) for name in PLACES}
    sums = {name: np.sum([one[name] for one in answers], axis=0) for name in SUMS}
    totals = {name: sum(one["totals"][name] for one in answers) for name in TOTALS}
    of_replica = [one["totals"]["demand_mass"] for one in answers]
    deficits = [one["totals"]["deficit"] for one in answers]
    shards = {(shard["file"], *shard["experts"]): shard for one in answers for shard in one["shards"]}
    return {
        **first,
        **{name: array.tolist() for name, array in (arrays | sums).items()},
        "deficit": _mean(np.array([one["deficit"] for one in answers]), masses.sum(axis=2)).tolist(),
        "shards": list(shards.values()),
        "totals": {
            **totals,
            "available": int(arrays["available"].sum()),
            "resident": int(arrays["resident"].sum()),
            "deficit": float(_mean(np.array(deficits), np.array(of_replica))),
        },
        "replicas": {name: one["totals"] for name, one in found.items()},
    }


def _mean(values: Any, weights: Any) -> Any:
    """The weighted mean over the first axis, 0 where nothing weighs."""
    summed = weights.sum(axis=0)
    return np.divide((values * weights).sum(axis=0), summed, out=np.zeros(np.shape(summed)), where=summed > 0)


def merged_info(found: Mapping[str, Any]) -> dict[str, Any]:
    """`/info` of the first replica, adapters of all, and in `replicas` each one's fields that are not alike in all."""
    answers = list(found.values())
    differing = [name for name in answers[0] if any(one.get(name) != answers[0][name] for one in answers)]
    return {
        **answers[0],
        "adapters": sorted({adapter for one in answers for adapter in one["adapters"]}),
        "replicas": {name: {field: one.get(field) for field in differing} for name, one in found.items()},
    }


def merged_profiles(found: Mapping[str, Any]) -> dict[str, Any]:
    """`/experts/profiles` of all replicas: a profile or an adapter of several as the first of them has it."""
    answers = list(found.values())
    by_name = {
        kind: {entry["name"]: entry for one in reversed(answers) for entry in one[kind]}
        for kind in ("profiles", "adapters")
    }
    return {
        **{kind: [entry for _, entry in sorted(entries.items())] for kind, entries in by_name.items()},
        "max_pool": max(one["max_pool"] for one in answers),
        "has_prior": any(one["has_prior"] for one in answers),
    }


_MERGED: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "/experts": merged_experts, "/info": merged_info, "/experts/profiles": merged_profiles,
}  # fmt: skip


async def answer(replicas: Replicas, request: PassedRequest) -> Response | None:
    """The answer of all replicas together; None for a request that one replica answers.

    Raises:
        NotReadyError: no replica answers. ValidationFailed: no store has the name that the request gives.
    """
    route = _ROUTES.get((request.method, request.path))
    return None if route is None else await route(replicas, request)


async def _merge(replicas: Replicas, request: PassedRequest) -> Response:
    answers = await replicas.ask_all(request)
    refused = _refusal(answers)
    if refused is not None:
        return refused
    merge = _MERGED[request.path]
    found = {name: body for name, (_, body) in sorted(answers.items())}
    merged = await asyncio.to_thread(lambda: json.dumps(merge({name: json.loads(one) for name, one in found.items()})))
    return Response(merged, media_type="application/json")


async def _metrics(replicas: Replicas, request: PassedRequest) -> Response:
    answers = await replicas.ask_all(request)
    refused = _refusal(answers)
    if refused is not None:
        return refused
    merged = merge_expositions({name: body.decode() for name, (_, body) in answers.items()})
    return Response(merged, headers={"Content-Type": CONTENT_TYPE})


async def _reload(replicas: Replicas, request: PassedRequest) -> Response:
    answers = await replicas.ask_all(request)
    status, body = next(iter(answers.values()))
    return _refusal(answers) or Response(body, status, media_type="application/json")


async def _growth(replicas: Replicas, request: PassedRequest) -> Response:
    refused = _refusal(await replicas.ask_all(request))
    return refused or ModelResponse(_fleet_growth(await replicas.stores()))


async def _plan(replicas: Replicas, request: PassedRequest) -> Response:
    request, only, parameters = _without_store(request)
    refused = _refusal(await replicas.ask_all(request))
    if refused is not None:
        return refused
    stores = await replicas.stores()
    plan = _plan_of(stores)
    count, chosen = num_candidates(parameters), _named(stores, only)
    possible = plan.num_possible
    found = await asyncio.to_thread(plan.candidates, count, chosen)
    candidates = [FleetCandidateResponse.of_fleet(one) for one in found]
    return ModelResponse(
        FleetPlanResponse(candidates=candidates, num_candidates=possible, growth=_fleet_growth(stores))
    )


async def _grow(replicas: Replicas, request: PassedRequest) -> Response | None:
    request, only, _ = _without_store(request)
    body, stores = _object(request.body), await replicas.stores()
    if not stores or body is None or not set(body) <= {"count", "experts"}:
        return None  # a replica says why
    count = 1 if body.get("count") is None else body["count"]
    if not _is_count(count):
        return None
    chosen = _named(stores, only)
    if body.get("experts") is not None:
        return await _change(replicas, stores, request, {_only_one(chosen, "experts"): body})
    found = await asyncio.to_thread(_plan_of(stores).candidates, count, chosen)
    by_store: dict[str, list[Any]] = defaultdict(list)
    for one in found:
        by_store[one.store].append(one.candidate.experts)
    if not by_store:
        by_store = {next(iter(chosen)): []}  # which says why nothing is left
    return await _change(
        replicas, stores, request, {name: {"experts": wanted} if wanted else {} for name, wanted in by_store.items()}
    )


async def _shrink(replicas: Replicas, request: PassedRequest) -> Response | None:
    request, only, _ = _without_store(request)
    body, stores = _object(request.body), await replicas.stores()
    if not stores or not body or not set(body) <= {"count", "indices"}:
        return None
    chosen = _named(stores, only)
    if not _is_count(body.get("count")) or body.get("indices") is not None:
        return await _change(replicas, stores, request, {_only_one(chosen, "indices"): body})
    plan = _plan_of(stores)
    least = sorted((score, name, index) for name in chosen for score, index in plan.least(name))[: body["count"]]
    by_store: dict[str, list[int]] = defaultdict(list)
    for _, name, index in least:
        by_store[name].append(index)
    return await _change(replicas, stores, request, {name: {"indices": found} for name, found in by_store.items()})


async def _change(
    replicas: Replicas, stores: Mapping[str, FleetStore], request: PassedRequest, bodies: Mapping[str, Any]
) -> Response:
    """Ask the first replica of each store for a change; a refusal of all is the answer."""
    answers = await asyncio.gather(
        *(replicas.ask(stores[name].replicas[0], _with_body(request, body)) for name, body in bodies.items())
    )
    if len(answers) == 1 or all(status >= 400 for status, _ in answers):
        status, content = answers[0]
        if status >= 400 or len(stores) == 1:
            return Response(content, status, media_type="application/json")
    told = {name: (status, json.loads(content)) for name, (status, content) in zip(bodies, answers, strict=True)}
    changed = {name: content for name, (status, content) in told.items() if status < 400}
    refused = {name: content for name, (status, content) in told.items() if status >= 400}
    status = next(status for status, _ in told.values() if status < 400)
    return ModelResponse(FleetChangeResponse(changed=changed, refused=refused), status_code=status)


def _with_body(request: PassedRequest, body: Any) -> PassedRequest:
    content = json.dumps(body).encode()
    headers = {**dict(request.headers), b"content-length": str(len(content)).encode()}
    if not request.body:
        headers[b"content-type"] = b"application/json"
    return replace(request, headers=tuple(headers.items()), body=content)


def _without_store(request: PassedRequest) -> tuple[PassedRequest, str | None, list[tuple[str, str]]]:
    """The request as a replica takes it, the store that it names, and its other parameters."""
    parameters = parse_qsl(request.query.decode("latin-1"), keep_blank_values=True)
    only = next((value for name, value in parameters if name == "store"), None)
    others = [(name, value) for name, value in parameters if name != "store"]
    return replace(request, query=urlencode(others).encode("latin-1")), only, others


def _plan_of(stores: Mapping[str, FleetStore]) -> FleetPlan:
    return FleetPlan({name: one.demand for name, one in stores.items()})


def _named(stores: Mapping[str, FleetStore], only: str | None) -> Collection[str]:
    if only is not None and only not in stores:
        raise ValidationFailed(f"there is no store {only!r}: GET /experts/growth lists them", param="store")
    return stores if only is None else [only]


def _only_one(names: Collection[str], field: str) -> str:
    if len(names) > 1:
        raise ValidationFailed(
            f"`{field}` is of one store, and this cluster has {len(names)}: name it with ?store=NAME, see GET "
            "/experts/growth",
            param=field,
        )
    return next(iter(names))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_CANDIDATES


def _object(body: bytes) -> dict[str, Any] | None:
    """A JSON object, an empty one for an empty body; None for anything else, which a replica refuses."""
    try:
        found = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _fleet_growth(stores: Mapping[str, FleetStore]) -> FleetGrowthResponse:
    """`replicas` of each store: the first of them changes it."""
    of_each = [
        StoreResponse(name=name, replicas=list(one.replicas), growth=GrowthResponse.of(one.demand.status))
        for name, one in stores.items()
    ]
    summed = GrowthResponse.of(total([one.demand.status for one in stores.values()]))
    return FleetGrowthResponse(**summed.model_dump(), stores=of_each)


_ROUTES: dict[tuple[str, str], Callable[[Replicas, PassedRequest], Awaitable[Response | None]]] = {
    **{("GET", path): _merge for path in _MERGED},
    ("GET", "/metrics"): _metrics,
    ("GET", "/metrics/vllm"): _metrics,
    ("POST", "/experts/reload"): _reload,
    ("GET", "/experts/growth"): _growth,
    ("GET", "/experts/plan"): _plan,
    ("POST", "/experts/grow"): _grow,
    ("POST", "/experts/shrink"): _shrink,
}
