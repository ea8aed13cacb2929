"""The engine: one thread that owns sequences, rows, slots and the usage ledger.

Other threads only `submit`, `cancel` and read `status`; what they hand over waits behind one lock. A step is: drop what
was cancelled, give rows to waiting requests, one step of the batch. Invariant: every accepted request gets exactly one
final event, whatever happens to it or to the engine.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from extractor.statistics import ExpertStatistics
from router.ledger import UsageLedger
from router.mask import MaskError
from server.engine.admission import EngineLimits, check_ability, check_queue, check_request
from server.engine.batch import Batch
from server.engine.request import (
    EngineError,
    EngineState,
    EngineStatus,
    EngineStoppedError,
    EngineTotals,
    GenerationRequest,
    InvalidRequestError,
    OnEvent,
)
from server.engine.sequence import Sequence
from server.engine.statistics import OnlineStatistics, collect_from, empty_statistics
from server.engine.statistics_file import StatisticsFile
from server.engine.unreadable import CorruptExperts
from server.engine.usage import UsageFile
from server.model.assembly import Progress
from server.model.runner import Runner

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
STOP_MARGIN_SECONDS = 8.0
"""After the drain: for the step under way, and for saving."""


class Engine:
    """Generates for many requests at once.

    Args:
        loader: makes the runner, on the engine thread; it is given a callback for progress.
        limits: bounds on what clients can make grow.
        usage: opens the file that keeps the ledger across restarts; None keeps it in memory alone.
        statistics: opens the file of what is collected beside usage; None collects nothing.
        corrupt_experts: what happens to requests that need an expert whose bytes are damaged: see `unreadable.py`.
    """

    def __init__(
        self,
        loader: Callable[[Progress], Runner],
        limits: EngineLimits | None = None,
        usage: Callable[[UsageLedger], UsageFile] | None = None,
        corrupt_experts: CorruptExperts = "fail",
        statistics: Callable[[ExpertStatistics], StatisticsFile] | None = None,
    ) -> None:
        self._corrupt_experts = corrupt_experts
        self._open_statistics = statistics
        self._collector: OnlineStatistics | None = None
        self.limits = limits or EngineLimits()
        self._loader = loader
        self._open_usage = usage
        self._usage: UsageFile | None = None
        self._runner: Runner | None = None
        self._batch: Batch | None = None
        self._ledger: UsageLedger | None = None
        self._lock = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()
        self._actions: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._state: EngineState = "loading"
        self._reason = "not started"
        self._progress = 0.0
        self._is_wedged = False
        self._drain_until: float | None = None
        self._num_requests = 0
        self._num_refused = 0
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- any thread ----------------------------------------------------------------------------------------------------

    @property
    def runner(self) -> Runner:
        """The runner, once loaded. Raises EngineStoppedError before."""
        if self._runner is None:
            raise EngineStoppedError(f"the model is not loaded: {self._reason}")
        return self._runner

    @property
    def ledger(self) -> UsageLedger:
        """The usage ledger, once loaded. Raises EngineStoppedError before."""
        if self._ledger is None:
            raise EngineStoppedError(f"the model is not loaded: {self._reason}")
        return self._ledger

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the engine thread, which loads the model first."""
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Queue a request; `on_event` is called on the engine thread and must not block.

        Raises:
            EngineStoppedError: the engine takes no requests now.
            InvalidRequestError, ContextTooLongError: the request can never be served.
            QueueFullError: the queue is at its bound.
        """
        with self._lock:
            if self._state != "ready":
                raise EngineStoppedError(f"the engine is {self._state}" + (f": {self._reason}" if self._reason else ""))
            try:
                self._check(request)
            except EngineError:
                self._num_refused += 1
                raise
            self._ids.add(request.request_id)
            self._waiting.append(Sequence(request, on_event, on_end=self._forget))
            self._num_requests += 1
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """Drop a request wherever it is, before the next step; an unknown or finished one is no error."""
        with self._lock:
            if request_id in self._ids:
                self._cancelled.add(request_id)
                self._lock.notify()

    def between_steps(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` on the engine thread before its next step; what it raises is the future's, not the engine's.

        Raises:
            EngineStoppedError: the engine has no model, or no longer.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._state not in ("ready", "draining") or self._runner is None:
                raise EngineStoppedError(f"the engine is {self._state}" + (f": {self._reason}" if self._reason else ""))
            self._actions.append((action, future))
            self._lock.notify()
        return future

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let what was accepted finish for at most `drain_seconds`, end the thread.

        Returns after the drain and `STOP_MARGIN_SECONDS` at the latest. A thread that has not ended by then is wedged:
        the status says so, the log says where it is stuck, and it is left behind.
        """
        with self._lock:
            if self._state in ("ready", "loading"):
                self._state, self._reason = "draining", "shutting down"
            until = time.monotonic() + drain_seconds
            self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
            self._lock.notify()
            wait_seconds = max(0.0, self._drain_until - time.monotonic()) + STOP_MARGIN_SECONDS
        if self._thread.ident is None:
            return
        self._thread.join(wait_seconds)
        if self._thread.is_alive():
            self._say_wedged(wait_seconds)

    def _say_wedged(self, waited_seconds: float) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        where = "" if frame is None else f", stuck in {frame.f_code.co_filename}:{frame.f_lineno}"
        with self._lock:
            self._is_wedged = True
            self._state = "failed"
            self._reason = f"the engine's thread did not end within {waited_seconds:.0f} s{where}"
        log.error("%s\n%s", self._reason, stack)

    def status(self) -> EngineStatus:
        """A snapshot."""
        with self._lock:
            runner, batch = self._runner, self._batch
            return EngineStatus(
                state=self._state,
                reason=self._reason,
                progress=self._progress,
                is_wedged=self._is_wedged,
                num_running=0 if batch is None else len(batch),
                num_waiting=len(self._waiting),
                num_waiting_tokens=sum(sequence.num_prompt_tokens for sequence in self._waiting),
                seconds_since_progress=time.monotonic() - self._last_progress,
                kv_tokens=0 if runner is None else runner.num_cached_tokens,
                kv_capacity_tokens=0 if runner is None else runner.max_rows * runner.max_tokens,
                totals=EngineTotals(
                    num_requests=self._num_requests,
                    num_refused=self._num_refused,
                    num_finished={} if batch is None else dict(batch.finished),
                    num_failed=0 if batch is None else batch.num_failed,
                    prompt_tokens=0 if batch is None else batch.prompt_tokens,
                    generated_tokens=0 if batch is None else batch.generated_tokens,
                    num_steps=0 if batch is None else batch.num_steps,
                    num_read_faults=0 if batch is None else batch.unreadable.num_faults,
                ),
            )

    def _check(self, request: GenerationRequest) -> None:
        runner = self.runner
        check_request(request, self.limits, vocab_size=runner.model.vocab_size, max_tokens=runner.max_tokens)
        check_ability(request, runner)
        if request.request_id in self._ids:
            raise InvalidRequestError(f"a request with the id {request.request_id} is waiting or running")
        if request.masking is not None and request.masking.mask is not None and request.on_missing != "fetch":
            try:
                request.masking.mask & runner.model.routing.mask
            except MaskError as error:
                raise InvalidRequestError(
                    f"the request's mask and what is served have too little in common: {error}"
                ) from error
        check_queue(request, self.limits, [sequence.num_prompt_tokens for sequence in self._waiting])

    # -- engine thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            batch = self._load()
        except BaseException as error:  # said once, by whoever waits for the loader that raised it
            self._end("failed", f"{type(error).__name__}: {error}")
            return
        try:
            while self._wait_for_work(batch):
                self.step(batch)
        except BaseException as error:  # the thread must leave no request without its final event
            log.exception("the engine stopped")
            self._end("failed", f"{type(error).__name__}: {error}")
        else:
            self._end("stopped", "shut down")

    def _load(self) -> Batch:
        def report(phase: str, share: float) -> None:
            with self._lock:
                self._progress, self._last_progress = share, time.monotonic()
                if self._state == "loading":
                    self._reason = phase

        runner = self._loader(report)
        try:
            ledger, batch = self._around(runner)
        except BaseException:
            runner.close()
            raise
        with self._lock:
            self._runner, self._ledger, self._batch = runner, ledger, batch
            self._progress, self._last_progress = 1.0, time.monotonic()
            if self._state == "loading":
                self._state, self._reason = "ready", ""
        return batch

    def _around(self, runner: Runner) -> tuple[UsageLedger, Batch]:
        manifest = runner.model.store.manifest
        ledger = UsageLedger(manifest.model.num_layers, manifest.model.num_experts, manifest.source.fingerprint)
        if self._open_usage is not None:
            self._usage = self._open_usage(ledger)
        if self._open_statistics is not None:
            self._collector = collect_from(runner, self._open_statistics(empty_statistics(manifest)))
        batch = Batch(runner, ledger, self.limits.prefill_chunk_tokens, self._corrupt_experts, self._collector)
        return ledger, batch

    def _wait_for_work(self, batch: Batch) -> bool:
        """Sleep until there is something to do; False when the engine is to end."""
        while True:
            with self._lock:
                self._last_progress = time.monotonic()
                busy = bool(self._waiting or self._cancelled or self._actions or len(batch))
                if self._drain_until is not None and (not busy or time.monotonic() >= self._drain_until):
                    return False
                if busy:
                    return True
                self._lock.wait(IDLE_SECONDS)
            if self._usage is not None:
                self._usage.save_if_due()
            if self._collector is not None:
                self._collector.save_if_due()

    def step(self, batch: Batch) -> None:
        """One step: schedule, run, postprocess."""
        self._run_actions()
        self._drop_cancelled(batch)
        while batch.has_room and (sequence := self._next_waiting()) is not None:
            batch.admit(sequence)
        if len(batch):
            batch.step()
        if self._usage is not None:
            self._usage.save_if_due()

    def _run_actions(self) -> None:
        with self._lock:
            actions, self._actions = self._actions, deque()
        for action, future in actions:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                action()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _drop_cancelled(self, batch: Batch) -> None:
        with self._lock:
            if not self._cancelled:
                return
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [s for s in self._waiting if s.request.request_id in cancelled]
            self._waiting = deque(s for s in self._waiting if s.request.request_id not in cancelled)
        for sequence in dropped:
            batch.finish(sequence, "cancelled")
        batch.cancel(cancelled)

    def _next_waiting(self) -> Sequence | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _forget(self, sequence: Sequence) -> None:
        with self._lock:
            self._ids.discard(sequence.request.request_id)
            self._cancelled.discard(sequence.request.request_id)

    def _end(self, state: EngineState, reason: str) -> None:
        """Refuse from now on, fail what is left, save usage, give memory back."""
        with self._lock:
            self._state, self._reason = state, reason
            left, actions = list(self._waiting), list(self._actions)
            self._waiting.clear()
            self._actions.clear()
        error = EngineStoppedError(f"the engine {state}: {reason}")
        for _, future in actions:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        if self._batch is not None:
            self._batch.fail_all(error)
            for sequence in left:
                self._batch.fail(sequence, error)
        last = (
            None if self._usage is None else self._usage.close,
            None if self._collector is None else self._collector.close,
            None if self._runner is None else self._runner.close,
        )
        for close in last:
            try:
                if close is not None:
                    close()
            except Exception:  # of a lost device, say: what follows is closed all the same
                log.exception("the engine could not be closed as a whole")
