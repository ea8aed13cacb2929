"""The sequences that hold rows, and one step over them: a chunk of one prompt, a token of every running sequence.

Owned by the engine thread. Invariant: every admitted sequence gets exactly one final event and then holds no row. If an
expert cannot be read, only the sequences whose tokens need it fail; if memory to compute does not suffice, only those
that could not get it fail. The step is then run again without them. If blocks of KV memory do not suffice, the youngest
sequences lose their rows. Later they read again what they had read, in the steps that first read it: prompts in chunks,
generated tokens one by one. So their answers do not change.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expert_store.errors import StoreError
from router.errors import MaskError
from router.ledger import StepRecord, UsageLedger
from router.mask import ExpertMask
from server.engine.block_routing import BlockRouting
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
from server.model.kv.blocks import BLOCK_TOKENS, NoBlocksError
from server.model.runner import Chosen, RowStep, Runner, StepMemoryError, StepOutput

log = logging.getLogger(__name__)


class Batch:
    """Runs admitted sequences to their end.

    Args:
        runner: the model.
        ledger: every step's routing is added to it.
        prefill_chunk_tokens: prompt tokens processed in one step, in whole blocks of KV memory. With fewer than a block
            has, prompts share nothing.
        collector: gets every step's routing and outputs; None: only the ledger is kept.
        corrupt_experts: whether requests that need an expert with damaged bytes fail, or are masked from it.

    Attributes:
        prompt_tokens, cached_tokens, generated_tokens, num_steps, num_preemptions: counters since start.
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
        shares = prefill_chunk_tokens >= BLOCK_TOKENS
        self._chunk = prefill_chunk_tokens // BLOCK_TOKENS * BLOCK_TOKENS if shares else prefill_chunk_tokens
        self._shared = 0 if not shares else BLOCK_TOKENS if runner.cuts_anywhere else self._chunk
        self.collector = collector
        self._masks = SequenceMasks(runner)
        self._prefilling: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._preempted: deque[Sequence] = deque()  # the oldest first
        self.unreadable = UnreadableExperts(runner, corrupt_experts)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.num_steps = 0
        self.num_preemptions = 0
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
            cached_tokens=self.cached_tokens,
            num_preemptions=self.num_preemptions,
        )

    def __len__(self) -> int:
        return len(self._prefilling) + len(self._running) + len(self._preempted)

    @property
    def _all(self) -> list[Sequence]:
        return [*self._running, *self._prefilling, *self._preempted]

    @property
    def has_room(self) -> bool:
        """Whether a row is free for another sequence, and no older one waits for it."""
        return self._runner.kv.num_free_rows > 0 and not self._preempted

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence a row and the blocks for its prompt; needs `has_room`. Its prompt is processed from the next
        step on. Returns False, and changes nothing, while too few blocks are free."""
        if not (masks := self._masks_of([sequence])):
            return True
        sequence.row = self._runner.allocate()
        found = self._find(sequence, masks[sequence])
        try:
            self._runner.kv.reserve([(sequence.row, sequence.num_prompt_tokens + len(sequence.generated))])
        except NoBlocksError as error:
            row, sequence.row = sequence.row, None
            self._runner.free(row)
            if not (self._running or self._prefilling):
                self._fail_for(sequence, StepMemoryError(str(error), ()))
                return True
            return False
        if sequence.admitted_at is None:
            sequence.admit(self._vocabulary, self._runner.model.eos_token_ids)
        if self._take(sequence, found):
            self._prefilling.append(sequence)
        return True

    def readmit(self) -> None:
        """Give the oldest sequences that lost their rows new ones, as far as rows and blocks are free."""
        for sequence in list(self._preempted):
            if not (self._runner.kv.num_free_rows and self.admit(sequence)):
                return
            if sequence.row is not None:
                self._preempted.remove(sequence)

    def cancel(self, request_ids: set[str]) -> None:
        """End the sequences of these requests now."""
        for sequence in [s for s in self._all if s.request.request_id in request_ids]:
            self.finish(sequence, "cancelled")

    def fail_all(self, error: EngineError) -> None:
        """End every sequence with an error, also if the device is lost and rows can no longer be freed."""
        for sequence in self._all:
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
        self._runner.after_step()
        self.num_steps += 1
        if self.collector is not None:
            self.collector.end_step(time.perf_counter() - started)

    # -- run -----------------------------------------------------------------------------------------------------------

    def _prefill(self, sequence: Sequence) -> None:
        """Run one chunk of one prompt; sequences in prefill take turns, so a long prompt does not delay a short one."""
        request = sequence.request
        self._prefilling.rotate(-1)
        masks = self._masks_of([sequence])
        if not masks or not self._take(sequence, self._find(sequence, masks[sequence])):
            return
        while True:
            if not (masks := self._masks_of([sequence])):
                return
            assert sequence.row is not None
            start, end = sequence.num_prefilled, self._chunk_end(sequence)
            try:
                output = self._runner.prefill(
                    sequence.row,
                    request.prompt_ids[start:end],
                    mask=masks[sequence],
                    adapter=self._masks.adapter(sequence, masks[sequence]),
                    temperature=request.router_temperature,
                    fetches=request.on_missing == "fetch",
                    all_logits=request.prompt_logprobs,
                )
                break
            except NoBlocksError as error:
                if self._preempt(error) is sequence:
                    return
            except (StoreError, StepMemoryError) as error:
                if self._fail_those_in_need([sequence], error):
                    return
        is_new = not sequence.is_rereading
        if is_new:
            self._count(output, [sequence])
        sequence.num_prefilled = end
        notes = self._notes(output, start, end, masks[sequence])
        if not self._add_routing(sequence, start, notes):
            return
        self._share(sequence, masks[sequence])
        if request.prompt_logprobs and is_new:
            following = request.prompt_ids[start + 1 : end + 1]
            sequence.prefill_logprobs += prompt_logprobs(
                output.logits, following, request.num_logprobs, self._vocabulary
            )
        if sequence.is_prefilled:
            self._prefilling.remove(sequence)
            self._running.append(sequence)
            if not sequence.generated:
                self.prompt_tokens += sequence.num_prompt_tokens
                self._take_token(sequence, output.logits[-1])

    def _chunk_end(self, sequence: Sequence) -> int:
        """The end of a prompt's next chunk; tokens that are read again get chunks, and masks, of their own."""
        start = sequence.num_prefilled
        cuts = [sequence.num_prompt_tokens, sequence.num_routed, *(at for at, _ in sequence.masks_used)]
        return min(start + self._chunk, *(cut for cut in cuts if cut > start))

    def _decode(self, sequences: list[Sequence]) -> None:
        while True:
            masks = self._masks_of(sequences)
            sequences = list(masks)
            if not sequences:
                return
            try:
                output = self._runner.decode([self._step(sequence, masks[sequence]) for sequence in sequences])
                break
            except NoBlocksError as error:
                preempted = self._preempt(error)
                sequences = [sequence for sequence in sequences if sequence is not preempted]
            except (StoreError, StepMemoryError) as error:
                failed = self._fail_those_in_need(sequences, error)
                sequences = [sequence for sequence in sequences if sequence not in failed]
        new = [at for at, sequence in enumerate(sequences) if not sequence.is_rereading]
        for sequence in sequences:
            sequence.num_fed += 1
        if not new:
            return
        if len(new) < len(sequences):
            output, sequences = output.select(new), [sequences[at] for at in new]
        refused = self._record(output, sequences)
        for at, (sequence, logits) in enumerate(zip(sequences, output.logits, strict=True)):
            if sequence not in refused:
                self._take_token(sequence, logits, output.chosen, at)

    def _step(self, sequence: Sequence, mask: ExpertMask | None) -> RowStep:
        """The input of one sequence to a decode step."""
        request, sampler, constraint = sequence.request, sequence.sampler, sequence.constraint
        assert sequence.row is not None
        step = RowStep(
            sequence.row,
            sequence.generated[sequence.num_fed],
            mask=mask,
            adapter=self._masks.adapter(sequence, mask),
            temperature=request.router_temperature,
            fetches=request.on_missing == "fetch",
        )
        if sequence.is_rereading or not sampler.leaves_choice:
            return step
        allowed = None if constraint is None else constraint.allowed
        return replace(step, choice=sequence.choice(), adjustment=sampler.adjustment, allowed=allowed)

    # -- KV memory -----------------------------------------------------------------------------------------------------

    def _find(self, sequence: Sequence, mask: ExpertMask | None) -> list[BlockRouting]:
        """Append to the sequence's row what KV memory has of its prompt; returns the routing of those tokens."""
        request = sequence.request
        if not self._shared or request.prompt_logprobs:  # the logits of every token are needed
            return []
        assert sequence.row is not None
        return self._runner.kv.reuse(sequence.row, request.prompt_ids, self._salt(sequence, mask), self._shared)

    def _take(self, sequence: Sequence, found: list[BlockRouting]) -> bool:
        """Count tokens that were found in KV memory as read; False if the sequence failed for an expert they miss."""
        if not found:
            return True
        start, is_new = sequence.num_prefilled, not sequence.is_rereading
        sequence.num_prefilled += BLOCK_TOKENS * len(found)
        if is_new:
            sequence.num_cached += BLOCK_TOKENS * len(found)
            self.cached_tokens += BLOCK_TOKENS * len(found)
        return self._add_routing(sequence, start, found)

    def _share(self, sequence: Sequence, mask: ExpertMask | None) -> None:
        """Give the complete blocks of the prompt, as far as it was read, to later requests."""
        if self._shared and not sequence.request.prompt_logprobs:
            assert sequence.row is not None
            tokens = sequence.request.prompt_ids[: sequence.num_prefilled // self._shared * self._shared]
            self._runner.kv.share(sequence.row, tokens, self._salt(sequence, mask), sequence.notes)

    def _salt(self, sequence: Sequence, mask: ExpertMask | None) -> bytes:
        """A name of all that the keys and values of the sequence's next tokens depend on but the tokens."""
        allowed = (mask or self._runner.model.routing.mask).allowed
        temperature = np.float64(sequence.request.router_temperature)
        adapter = (self._masks.adapter(sequence, mask) or "").encode()
        parts = np.packbits(allowed).tobytes() + temperature.tobytes() + adapter
        return hashlib.blake2b(parts, digest_size=16).digest()

    def _preempt(self, error: NoBlocksError) -> Sequence:
        """Take the row from the sequence that came last, or fail it if it is the only one; returns it."""
        youngest = max((*self._running, *self._prefilling), key=lambda sequence: sequence.submitted_at)
        if len(self._running) + len(self._prefilling) == 1:
            self._fail_for(youngest, StepMemoryError(str(error), ()))
            return youngest
        assert youngest.row is not None
        (self._running if youngest in self._running else self._prefilling).remove(youngest)
        self._runner.free(youngest.row)
        youngest.preempt()
        self._preempted.appendleft(youngest)
        self.num_preemptions += 1
        log.info("request %s waits for KV memory again: %s", youngest.request.request_id, error)
        return youngest

    # -- postprocess ---------------------------------------------------------------------------------------------------

    def _notes(self, output: StepOutput, start: int, end: int, mask: ExpertMask | None) -> list[BlockRouting]:
        """The routing of a prompt's tokens [start, end), cut where blocks of KV memory end."""
        cuts = [start, *range(start - start % BLOCK_TOKENS + BLOCK_TOKENS, end, BLOCK_TOKENS), end]
        used = mask or self._runner.model.routing.mask
        return [
            BlockRouting.of(output.record, slice(low - start, high - start), used)
            for low, high in itertools.pairwise(cuts)
        ]

    def _add_routing(self, sequence: Sequence, start: int, notes: list[BlockRouting]) -> bool:
        """Add the routing of a prompt's tokens from `start` on to deficit and mask, but what was added before the
        sequence lost its row; False if it failed for a missing expert."""
        for note in notes:
            if note.num_tokens == BLOCK_TOKENS:
                sequence.notes.append(note)
            tokens, share = slice(0, note.num_tokens), (note.demanded, note.missed)
            is_new = start >= sequence.num_routed
            if is_new and not self._add_tokens(sequence, note.record, tokens, share, note.top1_missing):
                return False
            start += note.num_tokens
        return True

    def _add_tokens(
        self,
        sequence: Sequence,
        record: StepRecord,
        tokens: slice,
        share: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
        top1_missing: npt.NDArray[np.bool_] | None,
    ) -> bool:
        """Add the routing of a sequence's tokens of a record to its deficit and mask; False if it failed for a missing
        expert. `share` is the router mass that they demanded and missed, [L] each; top1_missing is [L, T]."""
        demanded, missed = share
        may_miss = top1_missing is not None or sequence.request.masking is not None
        demand = record.demand_mass_of(tokens, self._ledger.num_experts) if may_miss else None
        sequence.add_share(tokens.stop - tokens.start, demanded, missed, top1_missing, demand)
        try:
            self._masks.observe(sequence, record, tokens, missed)
        except ExpertMissingError as error:
            self.fail(sequence, error)
            return False
        return True

    def _count(self, output: StepOutput, sequences: list[Sequence]) -> None:
        """Add a step to the ledger and to the collected statistics."""
        self._ledger.add(output.record)
        if self.collector is not None:
            self.collector.add(output, sequences)

    def _record(self, output: StepOutput, sequences: list[Sequence]) -> list[Sequence]:
        """Add a decode step to ledger, deficits and masks; fail and return those that refuse a missing expert."""
        self._count(output, sequences)
        record = output.record
        top1_missing = record.top1_missing
        refused: list[Sequence] = []
        for at, sequence in enumerate(sequences):
            token = slice(at, at + 1)
            share = output.share.demanded[at], output.share.missed[at]
            missing = None if top1_missing is None else top1_missing[:, token]
            if not self._add_tokens(sequence, record, token, share, missing):
                refused.append(sequence)
        return refused

    def _masks_of(self, sequences: list[Sequence]) -> dict[Sequence, ExpertMask | None]:
        """The mask of each sequence. A sequence whose mask leaves a layer without experts fails and is left out."""
        masks: dict[Sequence, ExpertMask | None] = {}
        for sequence in sequences:
            try:
                masks[sequence] = self._masks.next(sequence)
            except MaskError as error:
                self._fail_for(sequence, error)
        return masks

    def _take_token(self, sequence: Sequence, logits: Tensor, chosen: Chosen | None = None, at: int = 0) -> None:
        """Choose the next token from logits [V], send its text when it is final, and end a complete sequence.

        If the runner has `chosen` the tokens of the step's rows, take the `at`-th and do not read the logits.
        """
        if chosen is not None and sequence.sampler.leaves_choice:
            token = int(chosen.token[at])
            logprob = float(chosen.logit[at] - chosen.normaliser[at])
        else:
            allowed = None if sequence.constraint is None else sequence.constraint.allowed_flags()
            token = sequence.sampler.choose(logits, sequence.choice(), allowed)
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
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        row, sequence.row = sequence.row, None
        try:
            if row is not None:
                self._runner.free(row)
        finally:
            sequence.on_end(sequence)
