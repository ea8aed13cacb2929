"""The engine: one thread that owns sequences, rows, slots and the usage ledger.

Other threads only `submit`, `cancel` and read `status`; their requests wait in the inbox. One turn of the thread drops
cancelled requests, gives rows to waiting ones, and runs one step of the batch. Invariant: every accepted request gets
exactly one final event, also if it or the engine fails.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace

from extractor.statistics.statistics import ExpertStatistics
from router.ledger import UsageLedger
from server.engine.admission import EngineLimits, check_ability, check_request
from server.engine.batch import Batch
from server.engine.inbox import Inbox
from server.engine.request import (
    ContextTooLongError,
    EngineState,
    EngineStatus,
    EngineStoppedError,
    EngineTotals,
    GenerationRequest,
    InvalidRequestError,
    OnEvent,
    QueueFullError,
)
from server.engine.sequence import Sequence
from server.engine.snapshots import StatisticsFile, UsageFile
from server.engine.statistics import OnlineStatistics, collect_from, empty_statistics
from server.engine.unreadable import CorruptExperts
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.rows import NO_BLOCKS
from server.model.kv_memory import NO_MEMORY
from server.model.load_progress import Phase, Progress
from server.model.runner import Runner

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
STOP_MARGIN_SECONDS = 8.0
"""Time after the drain, for the running step and for saving."""


class Engine:
    """Generates for many requests at once.

    Args:
        loader: makes the runner, on the engine thread; its argument is a callback for progress.
        limits: bounds on memory and queue.
        usage: opens the file that keeps the ledger across restarts; None keeps the ledger in memory alone.
        statistics: opens the file of the collected statistics; None collects nothing.
        corrupt_experts: the handling of requests that need an expert whose bytes are damaged: see `unreadable.py`.

    Attributes:
        loaded: a future that is done when the model is loaded; it holds the error that the loader raised.
    """

    def __init__(
        self,
        loader: Callable[[Progress], Runner],
        limits: EngineLimits | None = None,
        usage: Callable[[UsageLedger], UsageFile] | None = None,
        corrupt_experts: CorruptExperts = "fail",
        statistics: Callable[[ExpertStatistics], StatisticsFile] | None = None,
    ) -> None:
        self.limits = limits or EngineLimits()
        self._loader = loader
        self._open_usage, self._open_statistics = usage, statistics
        self._corrupt_experts = corrupt_experts
        self._usage: UsageFile | None = None
        self._collector: OnlineStatistics | None = None
        self._runner: Runner | None = None
        self._batch: Batch | None = None
        self._ledger: UsageLedger | None = None
        self._inbox = Inbox(self.limits)
        self._lock = threading.RLock()  # guards the fields below
        self._progress = 0.0
        self._is_wedged = False
        self._drain_until: float | None = None
        self._num_requests = 0
        self._num_refused = 0
        self._last_progress = time.monotonic()
        self._become("loading", "not started")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.loaded: Future[None] = Future()

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
        self._inbox.check_takes_requests()
        runner = self.runner
        try:
            check_request(request, self.limits, vocab_size=runner.model.vocab_size, max_tokens=runner.max_tokens)
            check_ability(request, runner)
            self._inbox.put(Sequence(request, on_event, on_end=self._inbox.forget))
        except (InvalidRequestError, ContextTooLongError, QueueFullError):
            with self._lock:
                self._num_refused += 1
            raise
        with self._lock:
            self._num_requests += 1

    def cancel(self, request_id: str) -> None:
        """Drop a waiting or running request before the next step; ignores an unknown or finished one."""
        self._inbox.cancel(request_id)

    def between_steps(self, action: Callable[[], None]) -> Future[None]:
        """Run `action` on the engine thread before its next step. An error of `action` goes to the future only.

        Raises:
            EngineStoppedError: the engine has no model, or no longer.
        """
        return self._inbox.put_action(action)

    def stop(self, drain_seconds: float) -> None:
        """Refuse new requests, let accepted ones finish for at most `drain_seconds`, then end the thread.

        Returns at the latest after the drain and `STOP_MARGIN_SECONDS`. If the thread has not ended by then, the status
        reports it as wedged, the log shows its stack, and the method returns without it.
        """
        with self._lock:
            until = time.monotonic() + drain_seconds
            self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
            wait_seconds = max(0.0, self._drain_until - time.monotonic()) + STOP_MARGIN_SECONDS
            if self._state in ("ready", "loading"):
                self._become("draining", "shutting down")
        self._inbox.wake()
        if self._thread.ident is None:
            return
        self._thread.join(wait_seconds)
        if self._thread.is_alive():
            self._say_wedged(wait_seconds)

    def _say_wedged(self, waited_seconds: float) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = "" if frame is None else "".join(traceback.format_stack(frame))
        where = "" if frame is None else f", stuck in {frame.f_code.co_filename}:{frame.f_lineno}"
        reason = f"the engine's thread did not end within {waited_seconds:.0f} s{where}"
        with self._lock:
            self._is_wedged = True
            self._become("failed", reason)
        log.error("%s\n%s", reason, stack)

    def status(self) -> EngineStatus:
        """A snapshot; any thread may call it."""
        num_waiting, num_waiting_tokens = self._inbox.waiting
        with self._lock:
            runner, batch = self._runner, self._batch
            totals = EngineTotals() if batch is None else batch.totals()
            return EngineStatus(
                state=self._state,
                reason=self._reason,
                progress=self._progress,
                is_wedged=self._is_wedged,
                num_running=0 if batch is None else len(batch),
                num_waiting=num_waiting,
                num_waiting_tokens=num_waiting_tokens,
                seconds_since_progress=time.monotonic() - self._last_progress,
                kv_tokens=0 if runner is None else runner.kv.num_tokens,
                kv_capacity_tokens=0 if runner is None else runner.kv.pool.num_blocks * BLOCK_TOKENS,
                kv=NO_BLOCKS if runner is None else runner.kv.usage(),
                memory=NO_MEMORY if runner is None else runner.shares(),
                totals=replace(totals, num_requests=self._num_requests, num_refused=self._num_refused),
            )

    def held_prefixes(self) -> frozenset[int]:
        """Digests of the beginnings of prompts that KV memory holds (`server.model.kv.prefixes.block_digests`); any
        thread may call it."""
        runner = self._runner
        return frozenset() if runner is None else runner.kv.held_prefixes()

    def _become(self, state: EngineState, reason: str) -> None:
        """Enter a state and open or close the inbox accordingly."""
        with self._lock:
            self._state, self._reason = state, reason
            refusal = f"the engine is {state}" + (f": {reason}" if reason else "")
            has_model = self._runner is not None
            self._inbox.gate(
                requests=state == "ready", actions=has_model and state in ("ready", "draining"), refusal=refusal
            )

    # -- engine thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            batch = self._load()
        except BaseException as error:  # logged once, by the thread that waits for `loaded`
            self._end("failed", f"{type(error).__name__}: {error}")
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(None)
        try:
            while self._wait_for_work(batch):
                self.step(batch)
        except BaseException as error:  # the thread must leave no request without its final event
            log.exception("the engine stopped")
            self._end("failed", f"{type(error).__name__}: {error}")
        else:
            self._end("stopped", "shut down")

    def _load(self) -> Batch:
        def report(phase: Phase, share: float) -> None:
            with self._lock:
                self._progress, self._last_progress = share, time.monotonic()
                if self._state == "loading":
                    self._become("loading", phase)

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
                self._become("ready", "")
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
        """Sleep until there is work; return False when the engine must end."""
        while True:
            with self._lock:
                self._last_progress = time.monotonic()
                drain_until = self._drain_until
            is_busy = len(batch) > 0 or not self._inbox.is_empty
            if drain_until is not None and (not is_busy or time.monotonic() >= drain_until):
                return False
            if is_busy:
                return True
            self._inbox.wait(IDLE_SECONDS)
            for file in (self._usage, self._collector):
                if file is not None:
                    file.save_if_due()

    def step(self, batch: Batch) -> None:
        """One step: schedule, run, postprocess."""
        self._inbox.run_actions()
        dropped, cancelled = self._inbox.take_cancelled()
        for sequence in dropped:
            batch.finish(sequence, "cancelled")
        batch.cancel(cancelled)
        batch.readmit()
        while batch.has_room and (waiting := self._inbox.first()) is not None and batch.admit(waiting):
            self._inbox.next()
        if len(batch):
            batch.step()
        if self._usage is not None:
            self._usage.save_if_due()

    def _end(self, state: EngineState, reason: str) -> None:
        """Refuse new requests, fail the remaining ones, save usage, free memory."""
        self._become(state, reason)
        error = EngineStoppedError(f"the engine {state}: {reason}")
        left = self._inbox.close(error)
        if self._batch is not None:
            self._batch.fail_all(error)
            for sequence in left:
                self._batch.fail(sequence, error)
        try:
            with ExitStack() as closing:  # closes the others also if one raises, for instance on a lost device
                for part in (self._runner, self._collector, self._usage):  # the last one first
                    if part is not None:
                        closing.callback(part.close)
        except Exception:
            log.exception("the engine could not be closed as a whole")
