"""Routes that show the server itself: health, model, experts and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from expert_store.adapter import Adapter, made_for
from server.api.admin.schemas import (
    AdapterEntry,
    ExpertsResponse,
    HealthResponse,
    InfoResponse,
    KvMemory,
    Memory,
    NotReadyResponse,
    Profile,
    ProfilesResponse,
    ReadyResponse,
    TiersResponse,
)
from server.api.chat.template import answer_format_of
from server.api.http.context import context_of
from server.api.http.errors import ErrorResponse
from server.api.http.fields import MAX_STOPS, MAX_TOP_TOKENS
from server.api.http.openapi import REF, Responses, refusals
from server.api.http.responses import ModelResponse
from server.serving.metrics import CONTENT_TYPE
from server.serving.metrics_vllm import render_vllm
from server.serving.service import NotReadyError

router = APIRouter()
_NOT_READY: Responses = {
    503: {
        "description": "No request is taken now; the body says why, and how far loading is.",
        "content": {"application/json": {"schema": {"$ref": REF.format(model=NotReadyResponse.__name__)}}},
    }
}
_EXPOSITION: Responses = {
    200: {"description": "Text exposition.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/health/live", summary="Whether the process answers", response_model=HealthResponse)
async def live() -> ModelResponse:
    """Always 200; needs no key."""
    return ModelResponse(HealthResponse(status="ok"))


@router.get("/health/ready", summary="Whether requests are taken", response_model=ReadyResponse, responses=_NOT_READY)
async def ready(request: Request) -> ModelResponse:
    """200 while a request would be taken and the engine makes progress, else 503 with the reason."""
    health = context_of(request).service.health()
    state = ReadyResponse.of(health)
    if health.is_ready:
        return ModelResponse(state)
    refusal = NotReadyResponse(**state.model_dump(), error=health.reason, error_type="healthcheck")
    return ModelResponse(refusal, status_code=503, headers={"Retry-After": "2"})


@router.get(
    "/health",
    summary="Whether anything is broken",
    response_model=HealthResponse,
    responses=refusals(NotReadyError),
)
async def health(request: Request) -> ModelResponse:
    """200 unless something is broken; a server that loads or drains is not broken."""
    found = context_of(request).service.health()
    if not found.is_healthy:
        unhealthy = ErrorResponse(error=f"unhealthy: {found.reason}", error_type="healthcheck")
        return ModelResponse(unhealthy, status_code=503)
    return ModelResponse(HealthResponse(status="ok"))


@router.get(
    "/info", summary="The served model and its limits", response_model=InfoResponse, responses=refusals(NotReadyError)
)
def info(request: Request) -> ModelResponse:
    """The model, where its experts are, and the limits of a request."""
    context = context_of(request)
    model = context.loaded()
    status = model.engine.status()
    answers = answer_format_of(model.tokenizer)
    return ModelResponse(
        InfoResponse(
            model_id=model.name,
            model_family=model.family,
            model_dtype=model.dtype,
            model_device_type=model.device,
            model_pipeline_tag="text-generation",
            decode_path=model.decode_path,
            batch_invariant=model.batch_invariant,
            expert_encodings=dict(model.encodings),
            expert_bits=model.expert_bits,
            trunk_bits=model.trunk_bits,
            adapters=sorted(model.adapters),
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            top_k=model.top_k,
            tiers=TiersResponse.of(model.experts()),
            kv_memory=KvMemory.of(status.kv),
            memory=Memory.of(status.memory),
            max_input_tokens=model.max_context_tokens - 1,
            max_total_tokens=model.max_context_tokens,
            max_best_of=1,
            max_stop_sequences=MAX_STOPS,
            max_top_n_tokens=MAX_TOP_TOKENS,
            max_body_bytes=context.http.max_body_bytes,
            has_chat_template=answers is not None,
            tool_calls=None if answers is None else answers.calls_name,
            has_thinking=answers is not None and answers.has_thinking,
            generation_defaults=dict(model.generation_defaults),
            router="deepfew",
            version=context.version,
        )
    )


@router.get(
    "/experts",
    summary="Every expert: where it is and how it was used",
    response_model=ExpertsResponse,
    responses=refusals(NotReadyError),
)
def experts(request: Request) -> ModelResponse:
    """Arrays `[layer][expert]` and `[layer]`, totals, and the shards of the store."""
    model = context_of(request).loaded()
    return ModelResponse(ExpertsResponse.of(model.experts(), model.top_k))


@router.get(
    "/experts/profiles",
    summary="The masks that a request may choose",
    response_model=ProfilesResponse,
    responses=refusals(NotReadyError),
)
def profiles(request: Request) -> ModelResponse:
    """Named masks, and the size of the largest pool."""
    model = context_of(request).loaded()
    masks = model.masks
    available = model.experts().available
    found = [] if masks is None else sorted(masks.profiles.items())
    return ModelResponse(
        ProfilesResponse(
            profiles=[
                Profile(
                    name=name,
                    kept_share=float(mask.allowed.mean()),
                    available_share=float((mask.allowed & available).mean()),
                    adapter=made_for(model.adapters, mask.allowed & available),
                )
                for name, mask in found
            ],
            adapters=[_adapter_entry(name, adapter) for name, adapter in sorted(model.adapters.items())],
            max_pool=0 if masks is None else model.num_experts,
            has_prior=masks is not None and masks.prior is not None,
        )
    )


def _adapter_entry(name: str, adapter: Adapter) -> AdapterEntry:
    own = 0.0 if adapter.mask is None else float(adapter.mask.mean())
    least, largest = adapter.shares or (own, own)
    return AdapterEntry(
        name=name,
        is_for_one_mask=adapter.mask is not None,
        least_share=least,
        largest_share=largest,
        perplexity_ratios=adapter.ratios,
        perplexity_ratios_before=adapter.ratios_before,
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
