"""The generations of one HTTP request, read on the event loop while the engine runs them on its own thread.

The engine puts events into a bounded deque and wakes the loop. Invariant: the engine takes all generations of a
request or none. Leaving the `with` block of `Generations` cancels every generation that has not ended, so nothing goes
on in the engine after the client left, after a timeout or after an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from server.api.http.context import ApiContext
from server.api.http.errors import RequestTimeoutError, SlowReaderError
from server.engine.request import (
    EngineError,
    EngineStoppedError,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    TokenEvent,
)
from server.masks.masking import masking_label
from server.serving.deficit import expected_loss
from server.serving.service import LoadedModel

MAX_PENDING_EVENTS = 4096
Batch = list[TokenEvent | FinishedEvent]


class Generation:
    """One request in the engine.

    Args:
        context: counts latencies and outcomes; `max_request_seconds` limits the time from submission to the end.
        model: its engine takes the request.
        request: what to generate.
    """

    def __init__(self, context: ApiContext, model: LoadedModel, request: GenerationRequest) -> None:
        self.request = request
        self._model = model
        self._engine = model.engine
        self._metrics = context.metrics
        self._max_seconds = context.http.max_request_seconds
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
        try:
            self._engine.submit(self.request, self._on_event)
        except EngineError:
            self._metrics.request_ended("refused")
            raise
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

    async def batches(self, idle_seconds: float | None = None) -> AsyncIterator[Batch]:
        """Events as they arrive, as many as there are; an empty list after `idle_seconds` without one.

        The last list ends with the `FinishedEvent`.

        Raises:
            EngineError: the request failed, took too long, or its events were not read fast enough.
        """
        held: Batch = []
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
                held = batch  # the last token and the end are one event of `/generate`, and the end follows at once
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
        """Runs on the engine thread, and never waits."""
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

    def _take(self) -> Batch:
        if self._overflowed:
            self._abandon("failed")
            raise SlowReaderError("the stream was read too slowly and its request was cancelled")
        batch: Batch = []
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
                loss = expected_loss(event.deficit, self._model, self.request)
                self._metrics.request_finished(
                    event,
                    at - self._submitted_at,
                    masking=masking_label(self.request.masking),
                    expected_nats=None if loss is None else loss.nats,
                )
            batch.append(event)
        return batch


class Generations:
    """The generations of one HTTP request, in the order of its choices.

    Raises (on construction):
        EngineError: the engine refused one; those before it were cancelled.
    """

    def __init__(self, context: ApiContext, model: LoadedModel, requests: Sequence[GenerationRequest]) -> None:
        self._generations: list[Generation] = []
        with contextlib.ExitStack() as undo:
            for request in requests:
                self._generations.append(undo.enter_context(Generation(context, model, request).submit()))
            self._stack = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    async def finished(self) -> list[tuple[list[TokenEvent], FinishedEvent]]:
        """All tokens and the end of each. Raises EngineError as soon as one fails."""
        tasks = [asyncio.ensure_future(generation.finished()) for generation in self._generations]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _cancel(tasks)

    async def batches(self, idle_seconds: float) -> AsyncIterator[tuple[int, Batch]]:
        """(choice, events) as they arrive; an empty list when one of them had no event for `idle_seconds`.

        Raises:
            EngineError: as soon as one fails.
        """
        if len(self._generations) == 1:
            async for batch in self._generations[0].batches(idle_seconds):
                yield 0, batch
            return
        arrived: asyncio.Queue[tuple[int, Batch] | Exception | None] = asyncio.Queue(maxsize=len(self._generations))

        async def read(index: int, generation: Generation) -> None:
            try:
                async for batch in generation.batches(idle_seconds):
                    await arrived.put((index, batch))
                await arrived.put(None)
            except Exception as error:  # raised again below, by the task that reads the queue
                await arrived.put(error)

        tasks = [asyncio.ensure_future(read(*item)) for item in enumerate(self._generations)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            await _cancel(tasks)


def split(batch: Batch) -> tuple[list[TokenEvent], FinishedEvent | None]:
    """The tokens of a batch, and the end if the batch has it."""
    end = batch[-1] if isinstance(batch[-1], FinishedEvent) else None
    return [item for item in batch if isinstance(item, TokenEvent)], end


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
