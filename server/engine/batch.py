"""The sequences that hold rows, and one step over them: a chunk of one prompt, a token of every running sequence.

Owned by the engine thread. Invariant: every admitted sequence gets exactly one final event and then holds no row. If an
expert cannot be read, only the sequences whose tokens need it fail; if memory does not suffice, only those that could
not get it fail. The step is then run again without them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import replace

from torch import Tensor

from expert_store.errors import StoreError
from router.errors import MaskError
from router.ledger import UsageLedger
from router.mask import ExpertMask
from server.engine.logprobs import prompt_logprobs, token_logprob, top_logprobs
from server.engine.masks import SequenceMasks
from server.engine.request import (
    ConstraintFailedError,
    EngineError,
    EngineTotals,
    ExpertMissingError,
    FailedEvent,
    FinishReason,
    GenerationError,
    MemoryExhaustedError,
)
from server.engine.sequence import Sequence
from server.engine.statistics import OnlineStatistics
from server.engine.text import Vocabulary
from server.engine.unreadable import CorruptExperts, UnreadableExperts
from server.model.runner import Choice, Chosen, RowStep, Runner, StepMemoryError, StepOutput

log = logging.getLogger(__name__)


class Batch:
    """Runs admitted sequences to their end.

    Args:
        runner: the model.
        ledger: every step's routing is added to it.
        prefill_chunk_tokens: prompt tokens processed in one step.
        collector: gets every step's routing and outputs; None: only the ledger is kept.
        corrupt_experts: whether requests that need an expert with damaged bytes fail, or are masked from it.

    Attributes:
        prompt_tokens, generated_tokens, num_steps: counters since start.
        finished: sequences by finish reason; num_failed: those that failed.
        collector: as given; may be changed between two steps.
        unreadable: handles experts that could not be read.
    """

    def __init__(
        self,
        runner: Runner,
        ledger: UsageLedger,
        prefill_chunk_tokens: int,
        corrupt_experts: CorruptExperts = "fail",
        collector: OnlineStatistics | None = None,
    ) -> None:
        self._runner = runner
        self._vocabulary = Vocabulary(runner.model.tokenizer)
        self._ledger = ledger
        self._chunk = prefill_chunk_tokens
        self.collector = collector
        self._masks = SequenceMasks(runner)
        self._prefilling: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.unreadable = UnreadableExperts(runner, corrupt_experts)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.num_steps = 0
        self.finished: Counter[str] = Counter()
        self.num_failed = 0

    def totals(self) -> EngineTotals:
        """The counters; any thread may read them."""
        return EngineTotals(
            num_finished=dict(self.finished),
            num_failed=self.num_failed,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            num_steps=self.num_steps,
            num_read_faults=self.unreadable.num_faults,
        )

    def __len__(self) -> int:
        return len(self._prefilling) + len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether another sequence can be admitted."""
        return self._runner.num_free_rows > 0

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence a row; its prompt is processed from the next step on. Needs `has_room`."""
        sequence.admit(self._runner.allocate(), self._vocabulary, self._runner.model.eos_token_ids)
        self._prefilling.append(sequence)

    def cancel(self, request_ids: set[str]) -> None:
        """End the sequences of these requests now."""
        for sequence in [s for s in (*self._running, *self._prefilling) if s.request.request_id in request_ids]:
            self.finish(sequence, "cancelled")

    def fail_all(self, error: EngineError) -> None:
        """End every sequence with an error, also if the device is lost and rows can no longer be freed."""
        for sequence in (*self._running, *self._prefilling):
            try:
                self.fail(sequence, error)
            except Exception:
                log.exception("a row could not be freed")

    def step(self) -> None:
        """Process one chunk of one prompt, then one token of every running sequence."""
        started = time.perf_counter()
        if self.collector is not None:
            self.collector.begin_step()
        if self._prefilling:
            self._prefill(self._prefilling[0])
        if self._running:
            self._decode(list(self._running))
        self.num_steps += 1
        if self.collector is not None:
            self.collector.end_step(time.perf_counter() - started)

    # -- run -----------------------------------------------------------------------------------------------------------

    def _prefill(self, sequence: Sequence) -> None:
        """Run one chunk of one prompt; sequences in prefill take turns, so a long prompt does not delay a short one."""
        request = sequence.request
        assert sequence.row is not None
        self._prefilling.rotate(-1)
        end = min(sequence.num_prefilled + self._chunk, sequence.num_prompt_tokens)
        tokens = request.prompt_ids[sequence.num_prefilled : end]
        while True:
            if not (masks := self._masks_of([sequence])):
                return
            try:
                output = self._runner.prefill(
                    sequence.row,
                    tokens,
                    mask=masks[sequence],
                    temperature=request.router_temperature,
                    fetches=request.on_missing == "fetch",
                    all_logits=request.prompt_logprobs,
                )
                break
            except (StoreError, StepMemoryError) as error:
                if self._fail_those_in_need([sequence], error):
                    return
        if self._record(output, [sequence]):
            return
        if request.prompt_logprobs:
            following = request.prompt_ids[sequence.num_prefilled + 1 : end + 1]
            sequence.prefill_logprobs += prompt_logprobs(
                output.logits, following, request.num_logprobs, self._vocabulary
            )
        sequence.num_prefilled = end
        if sequence.is_prefilled:
            self._prefilling.remove(sequence)
            self._running.append(sequence)
            self.prompt_tokens += sequence.num_prompt_tokens
            self._take_token(sequence, output.logits[-1], sequence.sampler.choice())

    def _decode(self, sequences: list[Sequence]) -> None:
        choices = {sequence: sequence.sampler.choice() for sequence in sequences}  # once, if the step has to run again
        while True:
            masks = self._masks_of(sequences)
            sequences = list(masks)
            if not sequences:
                return
            steps = [_step(sequence, masks[sequence], choices[sequence]) for sequence in sequences]
            try:
                output = self._runner.decode(steps)
                break
            except (StoreError, StepMemoryError) as error:
                failed = self._fail_those_in_need(sequences, error)
                sequences = [sequence for sequence in sequences if sequence not in failed]
        refused = self._record(output, sequences)
        for at, (sequence, logits) in enumerate(zip(sequences, output.logits, strict=True)):
            if sequence not in refused:
                self._take_token(sequence, logits, choices[sequence], output.chosen, at)

    # -- postprocess ---------------------------------------------------------------------------------------------------

    def _record(self, output: StepOutput, sequences: list[Sequence]) -> list[Sequence]:
        """Add a step to ledger, deficits and masks; fail and return the sequences that refuse a missing expert."""
        record = output.record
        self._ledger.add(record)
        if self.collector is not None:
            self.collector.add(output, sequences)
        tokens_per_row = record.served_index.shape[1] // len(sequences)
        top1_missing = record.top1_missing
        refused: list[Sequence] = []
        for at, sequence in enumerate(sequences):
            tokens = slice(at * tokens_per_row, (at + 1) * tokens_per_row)
            missing = None if top1_missing is None else top1_missing[:, tokens]
            may_miss = missing is not None or sequence.request.masking is not None
            demand = record.demand_mass_of(tokens, self._ledger.num_experts) if may_miss else None
            sequence.add_share(tokens_per_row, output.share.demanded[at], output.share.missed[at], missing, demand)
            try:
                self._masks.observe(sequence, record, tokens, output.share.missed[at])
            except ExpertMissingError as error:
                refused.append(sequence)
                self.fail(sequence, error)
        return refused

    def _masks_of(self, sequences: list[Sequence]) -> dict[Sequence, ExpertMask | None]:
        """The mask of each sequence. A sequence whose mask leaves a layer without experts fails and is left out."""
        masks: dict[Sequence, ExpertMask | None] = {}
        for sequence in sequences:
            try:
                masks[sequence] = self._masks.of(sequence)
            except MaskError as error:
                self._fail_for(sequence, error)
        return masks

    def _take_token(
        self, sequence: Sequence, logits: Tensor, choice: Choice | None, chosen: Chosen | None = None, at: int = 0
    ) -> None:
        """Choose the next token from logits [V], send its text when it is final, and end a complete sequence.

        If the runner has `chosen` the tokens of the step's rows, take the `at`-th and do not read the logits.
        """
        if chosen is not None and sequence.sampler.leaves_choice:
            token = int(chosen.token[at])
            logprob = float(chosen.logit[at] - chosen.normaliser[at])
        else:
            allowed = None if sequence.constraint is None else sequence.constraint.allowed_flags()
            token = sequence.sampler.choose(logits, choice, allowed)
            logprob = token_logprob(logits, token, None if chosen is None else float(chosen.normaliser[at]))
        failure = None if sequence.constraint is None else sequence.constraint.error
        if failure is not None:
            self.fail(sequence, ConstraintFailedError(f"the constraint could not be followed further: {failure}"))
            return
        self.generated_tokens += 1
        top = top_logprobs(logits[None], sequence.request.num_logprobs, self._vocabulary)[0]
        told, reason = sequence.take(token, logprob, top)
        for event in told:
            sequence.tell(event)
        if reason is not None:
            self.finish(sequence, reason)
        elif not sequence.is_heard:
            self.finish(sequence, "cancelled")

    # -- endings -------------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, whether it was admitted or not, and tell its client."""
        try:
            self._forget(sequence)
        finally:
            self.finished[reason] += 1
            sequence.tell(sequence.finished_event(reason, self._vocabulary))

    def fail(self, sequence: Sequence, error: EngineError) -> None:
        """End a sequence, whether it was admitted or not, with an error."""
        try:
            self._forget(sequence)
        finally:
            self.num_failed += 1
            sequence.tell(FailedEvent(error))

    def _fail_those_in_need(self, sequences: list[Sequence], error: StoreError | StepMemoryError) -> list[Sequence]:
        """After a step that lacked an expert or memory: fail and return the sequences that cannot run it again."""
        cause: StoreError | StepMemoryError = error
        if isinstance(error, StepMemoryError):
            needing = [sequences[at] for at in error.positions]
            log.error("%d of %d requests failed: %s", len(needing), len(sequences), error)
        else:
            needing, cause = self.unreadable.those_in_need(sequences, error)
        for sequence in needing:
            self._fail_for(sequence, cause)
        return needing

    def _fail_for(self, sequence: Sequence, cause: StoreError | MaskError | StepMemoryError) -> None:
        kind = MemoryExhaustedError if isinstance(cause, StepMemoryError) else GenerationError
        error = kind(f"the generation could not be finished: {cause}")
        error.__cause__ = cause
        self.fail(sequence, error)

    def _forget(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        row, sequence.row = sequence.row, None
        try:
            if row is not None:
                self._runner.free(row)
        finally:
            sequence.on_end(sequence)


def _step(sequence: Sequence, mask: ExpertMask | None, choice: Choice | None) -> RowStep:
    """The input of one sequence to a decode step."""
    request, sampler, constraint = sequence.request, sequence.sampler, sequence.constraint
    assert sequence.row is not None
    step = RowStep(
        sequence.row,
        sequence.generated[-1],
        mask=mask,
        temperature=request.router_temperature,
        fetches=request.on_missing == "fetch",
    )
    if not sampler.leaves_choice:
        return step
    allowed = None if constraint is None else constraint.allowed
    return replace(step, choice=choice, adjustment=sampler.adjustment, allowed=allowed)
