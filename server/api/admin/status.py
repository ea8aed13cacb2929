"""Health, information, experts and metrics: what can be asked about the server itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.admin.status_schemas import ExpertsResponse, InfoResponse, ProfilesResponse
from server.api.http.context import context_of
from server.api.http.fields import MAX_STOPS, MAX_TOP_TOKENS
from server.api.http.openapi import Responses, error_response_of
from server.api.tgi.schemas import ErrorResponse, HealthResponse, NotReadyResponse, ReadyResponse
from server.serving.metrics import CONTENT_TYPE
from server.serving.metrics_vllm import render_vllm
from server.serving.service import ExpertsSnapshot

router = APIRouter()
_LOADING: Responses = {503: error_response_of(ErrorResponse, "No model is loaded.")}
_EXPOSITION: Responses = {
    200: {"description": "Text exposition.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/health/live", summary="Whether the process answers", response_model=HealthResponse)
async def live() -> JSONResponse:
    """Always 200; needs no key."""
    return JSONResponse({"status": "ok"})


@router.get(
    "/health/ready",
    summary="Whether requests are taken",
    response_model=ReadyResponse,
    responses={503: error_response_of(NotReadyResponse, "Not now; the body says why and how far loading is.")},
)
async def ready(request: Request) -> JSONResponse:
    """200 while a request would be taken and the engine makes progress, else 503 with the reason."""
    health = context_of(request).service.health()
    payload: dict[str, Any] = {
        "state": health.state,
        "reason": health.reason,
        "progress": health.progress,
        "phase": health.phase,
    }
    if health.is_ready:
        return JSONResponse(payload)
    payload |= {"error": health.reason, "error_type": "healthcheck"}
    return JSONResponse(payload, status_code=503, headers={"Retry-After": "2"})


@router.get(
    "/health",
    summary="Whether anything is broken",
    response_model=HealthResponse,
    responses={503: error_response_of(ErrorResponse, "The model could not be loaded, or the engine failed or hangs.")},
)
async def health(request: Request) -> JSONResponse:
    """200 unless something is broken; a server that loads or drains is not broken."""
    found = context_of(request).service.health()
    if found.is_healthy:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"error": f"unhealthy: {found.reason}", "error_type": "healthcheck"}, status_code=503)


@router.get("/info", summary="What is served, and its limits", response_model=InfoResponse, responses=_LOADING)
async def info(request: Request) -> JSONResponse:
    """The model and the limits that requests are checked against."""
    context = context_of(request)
    model = context.loaded()
    return JSONResponse(
        {
            "model_id": model.name,
            "model_family": model.family,
            "model_dtype": model.dtype,
            "model_device_type": model.device,
            "model_pipeline_tag": "text-generation",
            "decode_path": model.decode_path,
            "num_layers": model.num_layers,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "max_input_tokens": model.max_context_tokens - 1,
            "max_total_tokens": model.max_context_tokens,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOPS,
            "max_top_n_tokens": MAX_TOP_TOKENS,
            "max_body_bytes": context.http.max_body_bytes,
            "router": "deepfew",
            "version": context.version,
        }
    )


@router.get(
    "/experts",
    summary="Every expert: where it is and how it was used",
    response_model=ExpertsResponse,
    responses=_LOADING,
)
def experts(request: Request) -> JSONResponse:
    """Arrays `[layer][expert]` and `[layer]`, totals, and the shards of the store."""
    model = context_of(request).loaded()
    return JSONResponse(experts_payload(model.experts(), model.top_k))


@router.get(
    "/experts/profiles",
    summary="What requests may narrow their experts to",
    response_model=ProfilesResponse,
    responses=_LOADING,
)
def profiles(request: Request) -> JSONResponse:
    """Named masks, and how large a pool may be."""
    model = context_of(request).loaded()
    masks = model.masks
    available = model.experts().available
    found = [] if masks is None else sorted(masks.profiles.items())
    return JSONResponse(
        {
            "profiles": [
                {
                    "name": name,
                    "kept_share": float(mask.allowed.mean()),
                    "available_share": float((mask.allowed & available).mean()),
                }
                for name, mask in found
            ],
            "max_pool": 0 if masks is None else model.num_experts,
            "has_prior": masks is not None and masks.prior is not None,
        }
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses=_EXPOSITION,
)
def metrics(request: Request) -> Response:
    """`deepfew_*` in the text format."""
    return Response(context_of(request).metrics.render(), headers={"Content-Type": CONTENT_TYPE})


@router.get(
    "/metrics/vllm",
    summary="Prometheus metrics under vLLM's names",
    response_class=Response,
    responses=_EXPOSITION,
)
def metrics_vllm(request: Request) -> Response:
    """`vllm:*`, for dashboards and gateways that know those names; empty while no model is loaded."""
    context = context_of(request)
    return Response(render_vllm(context.metrics, context.service), headers={"Content-Type": CONTENT_TYPE})


def experts_payload(found: ExpertsSnapshot, top_k: int) -> dict[str, Any]:
    """The JSON of `/experts`."""
    num_layers, num_experts = found.available.shape
    layers = {
        name: getattr(found, name).tolist()
        for name in (
            "deficit",
            "top1_missing",
            "hits",
            "misses",
            "evictions",
            "fetch_bytes",
            "fetch_seconds",
            "expert_bytes",
        )
    }
    return {
        "num_layers": num_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        **{
            name: getattr(found, name).tolist()
            for name in ("available", "resident", "uses", "demand", "served_mass", "demand_mass")
        },
        **layers,
        "totals": {
            "available": int(found.available.sum()),
            "resident": int(found.resident.sum()),
            "uses": int(found.uses.sum()),
            "demand": int(found.demand.sum()),
            "served_mass": float(found.served_mass.sum()),
            "demand_mass": float(found.demand_mass.sum()),
            "deficit": found.overall_deficit,
            "tokens": found.num_tokens,
            "top1_missing_tokens": found.top1_missing_tokens,
            "hits": int(found.hits.sum()),
            "misses": int(found.misses.sum()),
            "evictions": int(found.evictions.sum()),
            "fetch_bytes": int(found.fetch_bytes.sum()),
            "fetch_seconds": float(found.fetch_seconds.sum()),
            "slots_per_layer": found.num_slots,
            "slot_bytes": found.slot_bytes,
            "host_hits": found.host_hits,
            "host_misses": found.host_misses,
        },
        "shards": [
            {"file": shard.file, "bytes": shard.num_bytes, "experts": list(shard.experts)} for shard in found.shards
        ],
    }
