"""The deficit of one request and its expected loss, as answers, metrics and the command line show them.

Invariant: the expected loss is that of the request's adapter if it had one. It comes from the curve of the request's
profile if that names a calibrated kind of text, else from the kinds with routing similar to the request's, else from
one curve through all measurements.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from server.engine.request import Deficit, GenerationRequest
from server.masks.masking import masking_label
from server.serving.service import LoadedModel


class ExpectedLossDetails(BaseModel):
    """Expected change of the loss, from calibration; `low` and `high` span the kinds of text that it may be."""

    nats: float = Field(description="nats a token")
    low: float
    high: float
    perplexity_ratio: float
    basis: Literal["domain", "routing", "all"] = Field(
        description="source of the figure: the calibrated kind of text that the profile is named after, the kinds that "
        "the text's routing is like, or one curve through all measurements"
    )
    is_measured: bool = Field(description="false past the largest deficit that calibration measured: it may cost more")


class DeficitDetails(BaseModel):
    """The share of demanded router mass that was unavailable over this request's tokens, and its expected loss."""

    overall: float
    per_layer: list[float]
    tokens: int = Field(description="tokens routed, prompt included")
    top1_missing_tokens: int = Field(description="tokens that did without their most wanted expert in any layer")
    top1_missing_per_layer: list[int]
    adapter: str | None = Field(None, description="adapter that the masked tokens had; null if they had none")
    expected_loss: ExpectedLossDetails | None = Field(
        description="of the adapter if the masked tokens had one; null where nothing was measured"
    )


def deficit_details(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> DeficitDetails:
    """Deficit, top-1 losses and expected loss of a finished request."""
    return DeficitDetails(
        overall=deficit.overall,
        per_layer=list(deficit.per_layer),
        tokens=deficit.num_tokens,
        top1_missing_tokens=deficit.top1_missing_tokens,
        top1_missing_per_layer=list(deficit.top1_missing_per_layer),
        adapter=deficit.adapter,
        expected_loss=expected_loss(deficit, model, request),
    )


def expected_loss(deficit: Deficit, model: LoadedModel, request: GenerationRequest) -> ExpectedLossDetails | None:
    """Expected change of the loss of a finished request; None without a calibration."""
    price = model.price if deficit.adapter is None else model.adapter_prices.get(deficit.adapter)
    if price is None:
        return None
    _, profile = masking_label(request.masking)
    prior = None if model.masks is None else model.masks.prior
    kinds = None if prior is None or deficit.demand is None else prior.kinds(deficit.demand)
    loss = price.expected_loss(deficit.overall, profile or None, kinds)
    return ExpectedLossDetails(
        nats=loss.nats,
        low=loss.low,
        high=loss.high,
        perplexity_ratio=loss.ratio,
        basis=loss.basis,
        is_measured=loss.is_measured,
    )
