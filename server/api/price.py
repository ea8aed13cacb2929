"""What a request did without and what that is expected to have cost, as JSON; one shape in both dialects."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from server.engine.request import Deficit, FinishedEvent, GenerationRequest
from server.profiles import masking_label
from server.service import LoadedModel


class ExpectedLossDetails(BaseModel):
    """Expected change of the loss, from calibration; `low` and `high` span the kinds of text that it may be."""

    nats: float = Field(description="nats a token")
    low: float
    high: float
    perplexity_ratio: float


class DeficitDetails(BaseModel):
    """The share of router mass that was wanted and unavailable over this request's tokens, and what that cost."""

    overall: float
    per_layer: list[float]
    tokens: int = Field(description="tokens routed, prompt included")
    top1_missing_tokens: int = Field(description="tokens that did without their most wanted expert in any layer")
    top1_missing_per_layer: list[int]
    expected_loss: ExpectedLossDetails | None = Field(description="null where nothing was calibrated")


def deficit_payload(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> dict[str, Any]:
    """The JSON of `DeficitDetails`."""
    return {
        "overall": deficit.overall,
        "per_layer": list(deficit.per_layer),
        "tokens": deficit.num_tokens,
        "top1_missing_tokens": deficit.top1_missing_tokens,
        "top1_missing_per_layer": list(deficit.top1_missing_per_layer),
        "expected_loss": _expected_loss(deficit, model, request),
    }


def expected_nats(event: FinishedEvent, model: LoadedModel, request: GenerationRequest) -> float | None:
    """Expected change of the loss of a finished request, nats a token; None where nothing was calibrated."""
    found = _expected_loss(event.deficit, model, request)
    return None if found is None else float(found["nats"])


def _expected_loss(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> dict[str, float] | None:
    """A profile that is called as a calibrated kind of text is taken to be that kind's."""
    if model.price is None:
        return None
    _, profile = masking_label(request.masking)
    loss = model.price.expected_loss(deficit.overall, profile or None)
    return {"nats": loss.nats, "low": loss.low, "high": loss.high, "perplexity_ratio": loss.ratio}
