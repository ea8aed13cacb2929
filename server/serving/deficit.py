"""What a request did without and what that is expected to have cost, as JSON; one shape wherever it is shown."""

from __future__ import annotations

from typing import Any

from server.engine.request import Deficit, FinishedEvent, GenerationRequest
from server.masks.profiles import masking_label
from server.serving.service import LoadedModel


def deficit_payload(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> dict[str, Any]:
    """Deficit, top-1 losses and expected loss of a request; `api.deficit_schemas.DeficitDetails` is its schema."""
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


def _expected_loss(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> dict[str, Any] | None:
    """A profile that is called as a calibrated kind of text is taken to be that kind's; else what the request's tokens
    wanted says which kinds it is like, where the server knows what those want.
    """
    if model.price is None:
        return None
    _, profile = masking_label(request.masking)
    prior = None if model.masks is None else model.masks.prior
    kinds = None if prior is None or deficit.demand is None else prior.kinds(deficit.demand)
    loss = model.price.expected_loss(deficit.overall, profile or None, kinds)
    return {
        "nats": loss.nats,
        "low": loss.low,
        "high": loss.high,
        "perplexity_ratio": loss.ratio,
        "basis": loss.basis,
        "is_measured": loss.is_measured,
    }
