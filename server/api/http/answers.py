"""Several generations that answer one request: submitted together, read together, and left together.

Invariant: either all of them were taken by the engine or none goes on; leaving the `with` block cancels what
still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

from server.api.http.context import ApiContext
from server.api.http.generation import Generation
from server.engine.request import FinishedEvent, GenerationRequest, TokenEvent
from server.serving.service import LoadedModel

Batch = list[TokenEvent | FinishedEvent]


class Answers:
    """The generations of one request, in the order of its choices.

    Raises (on construction):
        EngineError: one was refused; those before it were cancelled.
    """

    def __init__(self, context: ApiContext, model: LoadedModel, requests: Sequence[GenerationRequest]) -> None:
        self._stack = contextlib.ExitStack()
        self._generations: list[Generation] = []
        with contextlib.ExitStack() as undo:
            for request in requests:
                self._generations.append(undo.enter_context(context.submit(model, request)))
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
            await _end(tasks)

    async def batches(self, idle_seconds: float) -> AsyncIterator[tuple[int, Batch]]:
        """(choice, events) as they arrive; an empty list after `idle_seconds` without any from one of them.

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
            except Exception as error:
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
            await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
