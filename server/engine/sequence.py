"""One request on its way through the engine: its row, its sampler, its text, its times and its deficit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from server.engine.request import (
    Deficit,
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    Logprob,
    OnEvent,
    Timing,
)
from server.engine.sampling import Sampler
from server.engine.text import Detokenizer
from server.engine.tokens import token_text

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """State of one accepted request; the engine thread alone changes it once it is admitted.

    Attributes:
        on_end: called once, before the final event.
        row: handle of its KV row, None while it waits.
        num_prefilled: prompt tokens already in the row.
        generated: token ids so far.
        demanded, missed: router mass over its tokens, float64 [L].
        demand: router mass that its tokens wanted of each expert, float64 [L, E]; None while nothing was masked.
        top1_missing: tokens that did without their most wanted expert, int64 [L]; top1_missing_tokens: in any layer.
        num_routed: tokens whose routing these sums hold.
        is_heard: whether the client still takes events; one whose `on_event` raised is told nothing more.
    """

    request: GenerationRequest
    on_event: OnEvent
    on_end: Callable[[Sequence], None]
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    row: int | None = None
    num_prefilled: int = 0
    generated: list[int] = field(default_factory=list)
    prefill_logprobs: list[Logprob] = field(default_factory=list)
    demanded: npt.NDArray[np.float64] | None = None
    missed: npt.NDArray[np.float64] | None = None
    demand: npt.NDArray[np.float64] | None = None
    top1_missing: npt.NDArray[np.int64] | None = None
    top1_missing_tokens: int = 0
    num_routed: int = 0
    is_heard: bool = True

    def tell(self, event: Event) -> None:
        """Pass an event to the client. What it raises is logged and ends its hearing: it is no fault of the engine."""
        if not self.is_heard:
            return
        try:
            self.on_event(event)
        except Exception:
            self.is_heard = False
            log.exception("the client of request %s raised, and is told nothing more", self.request.request_id)

    def admit(self, row: int, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]) -> None:
        """Give the sequence a row and what it needs to generate."""
        self.row = row
        self.admitted_at = time.monotonic()
        self.sampler = Sampler(self.request.sampling, self.request.prompt_ids, eos_token_ids)
        self.detokenizer = Detokenizer(tokenizer, self.request.prompt_ids, self.request.sampling.stop)

    def take(self, token: int, eos_token_ids: Collection[int]) -> tuple[str, FinishReason | None]:
        """Append a generated token; returns the text that it adds and, where it completes the sequence, why."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.generated.append(token)
        text = self.detokenizer.add(token)
        sampling = self.request.sampling
        reason: FinishReason | None = None
        if token in eos_token_ids and not sampling.ignore_eos:
            reason = "eos_token"
        elif self.detokenizer.stop_string is not None:
            reason = "stop_sequence"
        elif len(self.generated) >= sampling.max_new_tokens:
            reason = "length"
        return (text, None) if reason is None else (text + self.detokenizer.finish(), reason)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_tokens_needed(self) -> int:
        """KV tokens that the sequence may come to hold."""
        return self.num_prompt_tokens + self.request.sampling.max_new_tokens

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the row."""
        return self.num_prefilled == self.num_prompt_tokens

    def add_share(
        self,
        num_tokens: int,
        demanded: npt.NDArray[np.float64],
        missed: npt.NDArray[np.float64],
        top1_missing: npt.NDArray[np.bool_] | None,
        demand: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Add a step over `num_tokens` of its tokens.

        Args:
            demanded, missed: router mass, [L] each.
            top1_missing: `StepRecord.top1_missing` [L, T]; demand: `StepRecord.demand_mass_of` them [L, E]; None where
                nothing was or will be masked.
        """
        self.num_routed += num_tokens
        self.demanded = demanded if self.demanded is None else self.demanded + demanded
        self.missed = missed if self.missed is None else self.missed + missed
        if top1_missing is not None:
            per_layer = top1_missing.sum(axis=1, dtype=np.int64)
            self.top1_missing = per_layer if self.top1_missing is None else self.top1_missing + per_layer
            self.top1_missing_tokens += int(top1_missing.any(axis=0).sum())
        if demand is not None:
            self.demand = demand if self.demand is None else self.demand + demand

    def deficit(self) -> Deficit:
        """Missing share of the router mass that the sequence's tokens demanded so far."""
        if self.demanded is None or self.missed is None:
            return Deficit(0.0, ())
        total = float(self.demanded.sum())
        per_layer = np.divide(self.missed, self.demanded, out=np.zeros_like(self.missed), where=self.demanded > 0)
        missing = np.zeros(len(per_layer), dtype=np.int64) if self.top1_missing is None else self.top1_missing
        return Deficit(
            overall=float(self.missed.sum()) / total if total else 0.0,
            per_layer=tuple(per_layer.tolist()),
            num_tokens=self.num_routed,
            top1_missing_tokens=self.top1_missing_tokens,
            top1_missing_per_layer=tuple(missing.tolist()),
            demand=self.demand,
        )

    def timing(self) -> Timing:
        """Where its time went until now; what it never reached took none."""
        now = time.monotonic()
        admitted = self.admitted_at if self.admitted_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        return Timing(
            queue_seconds=admitted - self.submitted_at,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            ttft_seconds=first - self.submitted_at,
        )

    def finished_event(self, reason: FinishReason, tokenizer: PreTrainedTokenizerBase) -> FinishedEvent:
        """What is told at the end, whether the sequence was admitted or not."""
        is_admitted = self.admitted_at is not None
        prefill = None
        if self.request.prompt_logprobs:
            first = self.request.prompt_ids[0]
            prefill = ((first, token_text(tokenizer, first), None), *self.prefill_logprobs)
        return FinishedEvent(
            reason=reason,
            generated_text=self.detokenizer.text if is_admitted else "",
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=len(self.generated),
            seed=self.sampler.seed if is_admitted else None,
            prefill=prefill,
            timing=self.timing(),
            deficit=self.deficit(),
            stop_text=self.detokenizer.stop_string if is_admitted else None,
        )
