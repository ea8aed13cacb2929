"""One request on its way through the engine: its row, its sampler, its text, its times and its deficit."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.engine.block_routing import BlockRouting
from server.engine.request import (
    Deficit,
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    OnEvent,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from server.engine.sampling import Sampler
from server.engine.text import Detokenizer, Vocabulary
from server.model.runner import Choice

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Sequence:
    """State of one accepted request; the engine thread alone changes it once it is admitted.

    Attributes:
        on_end: called once, before the final event.
        row: handle of its KV row, None while it waits.
        num_prefilled: prompt tokens already in the row; num_fed: generated ones.
        num_cached: prompt tokens that were in KV memory before it came.
        notes: routing of the prompt's complete blocks in the row.
        masks_used: the masks that its tokens were read under, each with the position of the first one.
        generated: token ids so far.
        demanded, missed: router mass over its tokens, float64 [L].
        demand: router mass that its tokens demanded of each expert, float64 [L, E]; None while nothing was masked.
        top1_missing: tokens whose most demanded expert was not available, int64 [L]; top1_missing_tokens: in any layer.
        num_routed: tokens whose routing these sums hold.
        adapter: the adapter that its masked tokens had last; None if they had none.
        is_heard: whether the client still gets events; false after its `on_event` raised.
    """

    request: GenerationRequest
    on_event: OnEvent
    on_end: Callable[[Sequence], None]
    submitted_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    first_token_at: float | None = None
    row: int | None = None
    num_prefilled: int = 0
    num_fed: int = 0
    num_cached: int = 0
    notes: list[BlockRouting] = field(default_factory=list)
    masks_used: list[tuple[int, ExpertMask]] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    prefill_logprobs: list[TokenLogprob] = field(default_factory=list)
    demanded: npt.NDArray[np.float64] | None = None
    missed: npt.NDArray[np.float64] | None = None
    demand: npt.NDArray[np.float64] | None = None
    top1_missing: npt.NDArray[np.int64] | None = None
    top1_missing_tokens: int = 0
    num_routed: int = 0
    adapter: str | None = None
    is_heard: bool = True

    def tell(self, event: Event) -> None:
        """Send an event to the client. If the callback raises, log the error and send no more events."""
        if not self.is_heard:
            return
        try:
            self.on_event(event)
        except Exception:
            self.is_heard = False
            log.exception("the client of request %s raised, and is told nothing more", self.request.request_id)

    def admit(self, vocabulary: Vocabulary, eos_token_ids: Collection[int]) -> None:
        """Give the sequence what it needs to generate."""
        sampling = self.request.sampling
        self.admitted_at = time.monotonic()
        constraint = self.request.constraint
        num_kept_on = math.inf if sampling.ignore_eos else sampling.min_tokens
        self.constraint = None if constraint is None else constraint.begin(num_kept_on)
        self.sampler = Sampler(sampling, self.request.prompt_ids, eos_token_ids if constraint is None else ())
        self.detokenizer = Detokenizer(vocabulary, self.request.prompt_ids, sampling)
        self._vocabulary, self._eos = vocabulary, eos_token_ids
        self._untold: deque[TokenEvent] = deque()
        self._choice: tuple[Choice | None] | None = None

    def preempt(self) -> None:
        """Lose the row. Later it gets another one, and reads again what it had read."""
        self.row = None
        self.num_prefilled = self.num_fed = 0
        self.notes = []

    @property
    def num_in_row(self) -> int:
        """Tokens in the row: the position of the next one to be read."""
        return self.num_prefilled + self.num_fed

    @property
    def is_rereading(self) -> bool:
        """Whether the next token to be read was read before, in a row that was lost; what follows on it is known."""
        return self.num_in_row < self.num_routed

    def choice(self) -> Choice | None:
        """The parameters for the draw of the next token: the same ones until `take`, also if a step is run again."""
        if self._choice is None:
            self._choice = (self.sampler.choice(),)
        return self._choice[0]

    def take(
        self, token: int, logprob: float, top: tuple[TokenLogprob, ...]
    ) -> tuple[list[TokenEvent], FinishReason | None]:
        """Append a generated token; return the tokens whose text is now final, and the reason if it is the last."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.generated.append(token)
        self._choice = None
        self.sampler.take(token)
        sampling, constraint = self.request.sampling, self.constraint
        is_eos = token in self._eos
        is_end = is_eos and (constraint is not None or not sampling.ignore_eos)
        self.detokenizer.add(token, is_end=is_end)
        if constraint is not None and not is_end:
            constraint.take(token)
        reason: FinishReason | None = None
        if is_end:
            reason = "eos_token"
        elif self.detokenizer.stop_string is not None:
            reason = "stop_sequence"
        elif constraint is not None and constraint.is_complete:
            reason = "eos_token"
        elif len(self.generated) >= sampling.max_new_tokens:
            reason = "length"
        if reason is not None:
            self.detokenizer.finish()
        special = is_eos or self._vocabulary.is_special(token)
        self._untold.append(TokenEvent(len(self.generated), token, "", b"", logprob, special, top))
        told = [
            replace(self._untold.popleft(), text=text, token_bytes=spelled) for text, spelled in self.detokenizer.give()
        ]
        if reason is not None and told:
            told[-1] = replace(told[-1], is_last=True)
        return told, reason

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_ids)

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
            adapter=self.adapter,
        )

    def timing(self) -> Timing:
        """The times of its phases until now, in seconds; 0 for a phase that it did not reach."""
        now = time.monotonic()
        admitted = self.admitted_at if self.admitted_at is not None else now
        first = self.first_token_at if self.first_token_at is not None else now
        return Timing(
            queue_seconds=admitted - self.submitted_at,
            prefill_seconds=first - admitted,
            decode_seconds=now - first,
            ttft_seconds=first - self.submitted_at,
        )

    def finished_event(self, reason: FinishReason, vocabulary: Vocabulary) -> FinishedEvent:
        """The final event, also of a sequence that was never admitted."""
        is_admitted = self.admitted_at is not None
        prefill = None
        if self.request.prompt_logprobs:
            first = self.request.prompt_ids[0]
            start = TokenLogprob(first, vocabulary.bytes_of(first), None, vocabulary.is_special(first))
            prefill = (start, *self.prefill_logprobs)
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
            num_cached_tokens=self.num_cached,
        )
