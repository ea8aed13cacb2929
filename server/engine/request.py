"""Requests to the engine, its events and its errors: plain frozen dataclasses.

Invariant: for every accepted request `on_event` sees zero or more `TokenEvent`s with index 1, 2, …, then exactly one
`FinishedEvent` or `FailedEvent`, all on the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.errors import ServerError
from server.model.kv.rows import NO_BLOCKS, KvUsage
from server.model.kv_memory import NO_MEMORY, MemoryShares

if TYPE_CHECKING:
    from server.constraints.compiler import CompiledConstraint

FinishReason = Literal["length", "eos_token", "stop_sequence", "cancelled"]
EngineState = Literal["loading", "ready", "draining", "stopped", "failed"]
OnMissing = Literal["mask", "fetch", "refuse"]


class EngineError(ServerError):
    """Base of all errors with which the engine refuses or fails a request.

    EngineError
      QueueFullError          the queue is at its bound of requests or tokens; retry later
      ContextTooLongError     prompt plus new tokens exceed what a row can hold
      InvalidRequestError     a value that no model could serve (empty prompt, unknown token id, …)
      EngineStoppedError      not ready, draining, stopped or failed
      GenerationError         the request was running and could not be finished
          ConstraintFailedError its constraint could not be followed to the end of the text
        MemoryExhaustedError  memory did not suffice for its next step; retry later
        ExpertMissingError    it refused to go on without an expert that is not available to it
    """


class QueueFullError(EngineError):
    """The waiting queue is at its bound.

    Args:
        message: what is full, by how much, and what to do.
        retry_after_seconds: a guess at when a place will be free.
    """

    def __init__(self, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ContextTooLongError(EngineError):
    """The prompt, or the prompt with the tokens asked for, does not fit a row of the KV memory."""


class InvalidRequestError(EngineError):
    """A request that no state of the engine could serve."""


class EngineStoppedError(EngineError):
    """The engine takes no requests: it is loading, draining, stopped or has failed."""


class GenerationError(EngineError):
    """A running request could not be finished; the message says why."""


class MemoryExhaustedError(GenerationError):
    """A running request could not be given the memory that its next step needs; later there may be more."""


class ConstraintFailedError(GenerationError):
    """A running request's constraint takes too much work to follow, or no token of the vocabulary continues it."""


class ExpertMissingError(GenerationError):
    """A request with `on_missing="refuse"` demanded an expert that is not available to it.

    Attributes:
        layer, expert: MoE layer and the most demanded of the missing experts there.
        share: this expert's share of the router mass that the token demanded in that layer.
    """

    def __init__(self, layer: int, expert: int, share: float) -> None:
        super().__init__(
            f"expert {expert} of layer {layer} was wanted with {share:.1%} of the layer's router mass and is not "
            'available, and on_missing is "refuse": let the request be masked or fetch what is missing, or serve a '
            "store that has the expert"
        )
        self.layer, self.expert, self.share = layer, expert, share


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters. A field that is None or has its neutral value changes nothing.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        min_tokens: the first so many tokens are not the end: no end-of-sequence token is chosen, no stop string counts.
        temperature: > 0, divides the logits. Sampling is on with `do_sample`, with a temperature other than 1, and with
            any of top_k, top_p, min_p and typical_p that is not neutral.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1]; 1 is neutral.
        min_p: keep tokens at least this share as likely as the most likely one, in [0, 1]; 0 is neutral.
        typical_p: keep the tokens nearest to the entropy until their probability reaches this, in (0, 1]; 1 is neutral.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens already in prompt or output;
            1 is neutral.
        presence_penalty: taken off the logits of tokens already generated; 0 is neutral.
        frequency_penalty: taken off them once for each time that they were generated; 0 is neutral.
        logit_bias: token id → added to its logit, -100 to 100.
        seed: of this request's random draws, 64 bits; None takes a fresh one (reported in `FinishedEvent`).
        do_sample: sample, even if every other value is left out.
        stop: generation ends when the text ends with one of these.
        include_stop_str_in_output: whether the text keeps the stop string that ended it.
        skip_special_tokens: whether the text leaves out special tokens; None leaves them out unless the checkpoint's
            format needs them (`server.engine.text.FORMAT_MARKERS`). The text never has the final end-of-sequence token.
        ignore_eos: continue after an end-of-sequence token.

    Raises:
        InvalidRequestError: a value that is outside its range.
    """

    max_new_tokens: int = 20
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    do_sample: bool = False
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = True
    skip_special_tokens: bool | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidRequestError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed")
        if not 0 <= self.min_tokens <= self.max_new_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}; wanted 0 to max_new_tokens {self.max_new_tokens}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequestError(f"top_k is {self.top_k}; at least 1 is needed, or leave it out")
        if "" in self.stop:
            raise InvalidRequestError("a stop string is empty; leave it out")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:  # also refuses NaN
                raise InvalidRequestError(f"{name} is {value}; wanted {_shown(least)} to {most:g}")
        for token, bias in (self.logit_bias or {}).items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(f"logit_bias of token {token} is {bias}; wanted -100 to 100")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return not (
            self.do_sample
            or self.top_k is not None
            or self.temperature not in (None, 1.0)
            or self.top_p not in (None, 1.0)
            or self.min_p not in (None, 0.0)
            or self.typical_p not in (None, 1.0)
        )


_TINY = math.ulp(0.0)
_RANGES = (
    ("temperature", _TINY, 1e6),
    ("top_p", _TINY, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", _TINY, 1.0),
    ("repetition_penalty", _TINY, 1e6),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
"""(field, least, most); `_TINY` stands for an open end at 0."""


def _shown(least: float) -> str:
    return "above 0" if least == _TINY else f"{least:g}"


class Masking(Protocol):
    """The mask of one request, decided step by step; called on the engine thread alone."""

    @property
    def mask(self) -> ExpertMask | None:
        """The mask of the next step, within the server's mask; None is that mask. A change needs a new object."""

    def observe(self, demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]) -> None:
        """Receive the demand of the request's tokens of a step, index and weight [L, T, K]; may change `mask`."""


ObserveDemand = Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], None]
"""Receives the demand of the request's tokens of a step, index and weight [L, T, K], on the engine thread."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        request_id: unique among the requests that are waiting or running.
        prompt_ids: at least one token id.
        sampling: the sampling parameters.
        num_logprobs: most likely alternatives to report with every token.
        prompt_logprobs: also report the prompt's tokens with their log-probabilities and `num_logprobs` alternatives.
        masking: narrows the experts of this request alone.
        on_missing: the handling of a token that demands an expert that is not available. "mask": the router chooses
            among the available ones. "fetch": experts that the store lacks are read from the source checkpoint.
            "refuse": the request fails with `ExpertMissingError`.
        adapter: the adapter of its masked tokens: "auto" is the one that was made for the mask, "none" is none, or a
            name. Tokens without a mask never have one.
        router_temperature: > 0, divides the router's logits for choice and weights; 1 leaves the model as it is.
        observe_demand: sees what its tokens demand and changes nothing.
        constraint: the generated text matches it, unless `max_new_tokens` or a stop string ends it before. An end-of-
            sequence token comes only where the text matches; where nothing can follow, the text ends without one. With
            `min_tokens` and `ignore_eos` the text goes on where it can.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_logprobs: int = 0
    prompt_logprobs: bool = False
    masking: Masking | None = None
    on_missing: OnMissing = "mask"
    adapter: str = "auto"
    router_temperature: float = 1.0
    observe_demand: ObserveDemand | None = None
    constraint: CompiledConstraint | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of a request's phases, in seconds; `ttft_seconds` runs from submission to the first token."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    ttft_seconds: float


@dataclass(frozen=True, slots=True)
class Deficit:
    """The share of the unmasked top-k router mass that was unavailable, over a request's tokens (0 is no loss).

    Attributes:
        overall, per_layer: that share.
        num_tokens: tokens routed, prompt included.
        top1_missing_tokens: tokens whose most demanded expert was not available in at least one layer.
        top1_missing_per_layer: tokens whose most demanded expert of the layer was not available.
        demand: float64 [L, E], router mass that its tokens demanded of each expert; None if nothing was masked.
        adapter: the adapter that its masked tokens had last; None if they had none.
    """

    overall: float
    per_layer: tuple[float, ...]
    num_tokens: int = 0
    top1_missing_tokens: int = 0
    top1_missing_per_layer: tuple[int, ...] = ()
    demand: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the prompt, or one that could have been chosen.

    Attributes:
        token_bytes: UTF-8 of the token, maybe a part of a character; of a special token its name.
        logprob: natural, under the model's unmodified distribution; None for the first token of a prompt.
        top: the most likely tokens at its position; for prompt tokens only if the request asked for them.
    """

    token_id: int
    token_bytes: bytes
    logprob: float | None
    special: bool = False
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The token by itself; parts of characters read as U+FFFD."""
        return self.token_bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, sent when its text can no longer change: the texts of all events join to the generated text.

    Tokens that a stop string cut off are not sent, but counted in `FinishedEvent.num_generated_tokens`. If a token is
    cut in part, text and bytes are those of the part that remains; the log-probability is the whole token's.

    Attributes:
        index: 1, 2, ….
        text: added to the generated text (empty while a character is incomplete, and for a special token left out).
        token_bytes: UTF-8 of the token, maybe a part of a character; of a special token its name.
        logprob: natural, under the model's unmodified distribution.
        special: a marker, or an end-of-sequence token.
        top: the most likely tokens at its position, as many as the request asks for.
        is_last: the request ends with this token, and its `FinishedEvent` follows at once.
    """

    index: int
    token_id: int
    text: str
    token_bytes: bytes
    logprob: float
    special: bool
    top: tuple[TokenLogprob, ...] = ()
    is_last: bool = False

    @property
    def shown_text(self) -> str:
        """The text, or the name of a special token that adds none."""
        return self.text or (self.token_bytes.decode(errors="replace") if self.special else "")


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The end of a request; after it the engine holds no resource of the request.

    Attributes:
        num_generated_tokens: all that were generated, also those that a stop string cut off.
        prefill: the prompt's tokens, if the request asked for them.
        stop_text: the stop string that ended the request, if one did.
        num_cached_tokens: prompt tokens that KV memory had from earlier requests, so that they were not computed.
    """

    reason: FinishReason
    generated_text: str
    num_prompt_tokens: int
    num_generated_tokens: int
    seed: int | None
    prefill: tuple[TokenLogprob, ...] | None
    timing: Timing
    deficit: Deficit
    stop_text: str | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The request could not be finished."""

    error: EngineError


Event = TokenEvent | FinishedEvent | FailedEvent
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Counters since start.

    Attributes:
        num_read_faults: steps that could not read an expert.
        cached_tokens: those of `prompt_tokens` that KV memory had.
        num_preemptions: times that a request lost its row to an older one.
    """

    num_requests: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    num_failed: int = 0
    num_refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    num_steps: int = 0
    num_read_faults: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for health and metrics.

    Attributes:
        state: loading, ready, draining, stopped or failed.
        reason: why it is not ready, else empty.
        progress: share of loading done in [0, 1], as the loader reports it, 1 when loaded.
        num_running, num_waiting: requests.
        num_waiting_tokens: prompt tokens of the waiting requests.
        seconds_since_progress: since the loop last completed a step or found nothing to do.
        kv: blocks of KV memory in all, in use, and kept for prompts to come.
        memory: how it is divided between slots and KV memory.
        kv_tokens, kv_capacity_tokens: tokens in rows, and room for tokens in all.
        totals: counters since start.
        is_wedged: the thread was asked to end and did not end in time.
    """

    state: EngineState
    reason: str
    progress: float
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    seconds_since_progress: float
    kv_tokens: int
    kv_capacity_tokens: int
    totals: EngineTotals
    is_wedged: bool = False
    kv: KvUsage = NO_BLOCKS
    memory: MemoryShares = NO_MEMORY
