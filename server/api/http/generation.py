"""One request in the engine, seen from the event loop.

The engine calls `on_event` on its own thread; events cross over through a bounded deque and one wake-up of the loop.
Invariant: leaving the `with` block of a `Generation` cancels the request unless it has ended, so whatever happens to
the handler (client gone, time out, error) nothing goes on in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from server.api.http.errors import RequestTimeoutError, SlowReaderError
from server.engine.request import EngineStoppedError, Event, FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from server.masks.profiles import masking_label
from server.serving.deficit import expected_nats
from server.serving.metrics import Metrics
from server.serving.service import LoadedModel

MAX_PENDING_EVENTS = 4096


class Generation:
    """A request on its way through the engine.

    Args:
        model: whose engine takes the request.
        request: what to generate.
        metrics: told of latencies and of the outcome.
        max_seconds: from submission to the end, else the request fails.
    """

    def __init__(self, model: LoadedModel, request: GenerationRequest, metrics: Metrics, *, max_seconds: float) -> None:
        self.request = request
        self._model = model
        self._engine = model.engine
        self._metrics = metrics
        self._max_seconds = max_seconds
        self._pending: deque[tuple[float, Event]] = deque()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_waking = False
        self._has_ended = False
        self._overflowed = False
        self._submitted_at = 0.0
        self._last_token_at = 0.0

    def submit(self) -> Self:
        """Hand the request to the engine.

        Raises:
            EngineError: the engine does not take it; nothing was queued.
        """
        self._submitted_at = time.perf_counter()
        self._engine.submit(self.request, self._on_event)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon("cancelled")

    @property
    def elapsed_seconds(self) -> float:
        """Since submission."""
        return time.perf_counter() - self._submitted_at

    async def batches(self, idle_seconds: float | None = None) -> AsyncIterator[list[TokenEvent | FinishedEvent]]:
        """Events as they arrive, all that are there at once; an empty list after `idle_seconds` without any.

        The last list ends with the `FinishedEvent`.

        Raises:
            EngineError: the request failed, took too long, or its events were not read fast enough.
        """
        held: list[TokenEvent | FinishedEvent] = []
        while True:
            remaining = self._max_seconds - self.elapsed_seconds
            if remaining <= 0:
                self._abandon("failed")
                raise RequestTimeoutError(f"the request took longer than {self._max_seconds:g} s and was cancelled")
            wait = remaining if idle_seconds is None else min(idle_seconds, remaining)
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                yield []
                continue
            self._wake.clear()
            self._is_waking = False
            batch = held + self._take()
            if batch and isinstance(batch[-1], TokenEvent) and batch[-1].is_last:
                held = batch  # the contract wants the last token and the end in one event, and the end follows at once
                continue
            if batch:
                yield batch
                if isinstance(batch[-1], FinishedEvent):
                    return

    async def finished(self) -> tuple[list[TokenEvent], FinishedEvent]:
        """All tokens and the end.

        Raises:
            EngineError: as `batches`.
        """
        tokens: list[TokenEvent] = []
        async for batch in self.batches():
            for event in batch:
                if isinstance(event, FinishedEvent):
                    return tokens, event
                tokens.append(event)
        raise AssertionError("batches ended without a FinishedEvent")

    def _abandon(self, outcome: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._engine.cancel(self.request.request_id)
            self._metrics.request_ended(outcome)

    def _on_event(self, event: Event) -> None:
        """On the engine thread: never waits."""
        if self._has_ended:
            return
        if len(self._pending) >= MAX_PENDING_EVENTS and isinstance(event, TokenEvent):
            self._overflowed = True
        else:
            self._pending.append((time.perf_counter(), event))
        if not self._is_waking:
            self._is_waking = True
            try:
                self._loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                self._has_ended = True  # the loop is closed: the server is gone

    def _take(self) -> list[TokenEvent | FinishedEvent]:
        if self._overflowed:
            self._abandon("failed")
            raise SlowReaderError("the stream was read too slowly and its request was cancelled")
        batch: list[TokenEvent | FinishedEvent] = []
        while self._pending:
            at, event = self._pending.popleft()
            if isinstance(event, FailedEvent):
                self._has_ended = True
                self._metrics.request_failed(event.error)
                raise event.error
            if isinstance(event, FinishedEvent) and event.reason == "cancelled":
                self._has_ended = True
                self._metrics.request_ended("cancelled")
                raise EngineStoppedError("the server cancelled the request, as it does when it shuts down")
            if isinstance(event, TokenEvent):
                if self._last_token_at:
                    self._metrics.inter_token(at - self._last_token_at)
                else:
                    self._metrics.first_token(at - self._submitted_at)
                self._last_token_at = at
            else:
                self._has_ended = True
                nats = expected_nats(event, self._model, self.request)
                masking = masking_label(self.request.masking)
                self._metrics.request_finished(event, at - self._submitted_at, masking=masking, expected_nats=nats)
            batch.append(event)
        return batch
