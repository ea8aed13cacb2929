"""What a request did without and what that is expected to have cost, as both dialects show it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ExpectedLossDetails(BaseModel):
    """Expected change of the loss, from calibration; `low` and `high` span the kinds of text that it may be."""

    nats: float = Field(description="nats a token")
    low: float
    high: float
    perplexity_ratio: float
    basis: Literal["domain", "routing", "all"] = Field(
        description="what it goes by: the calibrated kind of text that the profile is called as, the kinds that the "
        "text's routing is like, or one curve through all measurements"
    )
    is_measured: bool = Field(description="false past the largest deficit that calibration measured: it may cost more")


class DeficitDetails(BaseModel):
    """The share of router mass that was wanted and unavailable over this request's tokens, and what that cost."""

    overall: float
    per_layer: list[float]
    tokens: int = Field(description="tokens routed, prompt included")
    top1_missing_tokens: int = Field(description="tokens that did without their most wanted expert in any layer")
    top1_missing_per_layer: list[int]
    expected_loss: ExpectedLossDetails | None = Field(description="null where nothing was calibrated")
