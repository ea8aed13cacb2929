"""Requests and responses of `/generate`, `/generate_stream` and `/`: the Text Generation Inference contract.

Invariant: a parameter that this server does not support is refused by name; none is ignored. Sources: TGI's OpenAPI
document and router, and the fields that `huggingface_hub.InferenceClient.text_generation` sends and reads.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from server.api.http.constraints import Grammar
from server.api.http.fields import (
    MAX_TOP_TOKENS,
    ModelName,
    PromptText,
    SamplingFields,
    Seed,
    Strict,
    TokenCount,
    unsupported,
)
from server.serving.deficit import DeficitDetails

DEFAULT_NEW_TOKENS = 100
EndReason = Literal["length", "eos_token", "stop_sequence"]


class GenerateParameters(SamplingFields):
    """Parameters of a generation. It is greedy unless a value or the generation config turns sampling on."""

    max_new_tokens: TokenCount | None = Field(
        None, description=f"tokens to generate; default {DEFAULT_NEW_TOKENS} or what the context has room for"
    )
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="divides the logits; 0 is greedy"
    )
    do_sample: bool | None = Field(None, description="sample, even with every other value left out")
    seed: Seed | None = Field(None, description="of the random draws; the same seed gives the same text")
    truncate: TokenCount | None = Field(None, description="keep only so many of the prompt's last tokens")
    return_full_text: bool | None = Field(None, description="put the prompt before the generated text")
    details: bool | None = Field(None, description="return tokens, the reason of the end, and the deficit")
    decoder_input_details: bool | None = Field(
        None, description="with details and without a stream: return the prompt's tokens and their log-probabilities"
    )
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = Field(
        None, description="with details: return so many of the most likely tokens at each place"
    )
    best_of: unsupported(1) = Field(None, description="only 1")  # type: ignore[valid-type]
    watermark: unsupported(False) = Field(None, description="not supported")  # type: ignore[valid-type]
    grammar: Grammar | None = Field(None, description="the text matches this, enforced token by token")
    adapter_id: unsupported() = Field(None, description="not supported")  # type: ignore[valid-type]


class GenerateRequest(Strict):
    """A prompt to continue."""

    inputs: PromptText = Field(description="the prompt; text of special tokens in it stands for these tokens")
    parameters: GenerateParameters | None = None
    stream: bool | None = Field(None, description="answer with server-sent events, one for each token")
    model: ModelName | None = Field(None, description="any name: one model is served")


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt; the first one has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Details(BaseModel):
    """Tokens, the reason of the end, and the deficit."""

    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    deficit: DeficitDetails


class GenerateResponse(BaseModel):
    """The answer to `/generate` without a stream."""

    generated_text: str
    details: Details | None = None


class GenerateResponses(RootModel[list[GenerateResponse]]):
    """The answer to `/` without a stream: a list of one."""


class StreamDetails(BaseModel):
    """Details of the last event of a stream."""

    finish_reason: EndReason
    generated_tokens: int
    seed: int | None
    input_length: int
    deficit: DeficitDetails


class StreamResponse(BaseModel):
    """One event of a stream; the last one has the whole text and, if asked for, details.

    `token` is null, and `index` 0, where a stop string at the very beginning was cut off.
    """

    index: int
    token: Token | None
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None
