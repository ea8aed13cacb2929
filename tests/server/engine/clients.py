"""A client of the engine that collects the events of one request."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from server.constraints.compiler import CompiledConstraint
from server.engine.engine import Engine
from server.engine.request import (
    EngineError,
    Event,
    FailedEvent,
    FinishedEvent,
    GenerationRequest,
    Masking,
    OnMissing,
    SamplingParams,
    TokenEvent,
)

WAIT_SECONDS = 60


def held_until_stopped(engine: Engine, step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` of the engine's runner, which does not begin before the engine was told to stop."""

    def held(*args: Any, **options: Any) -> Any:
        while engine.status().state == "ready":
            time.sleep(0.001)
        return step(*args, **options)

    return held


_ENDS = itertools.count()


class Client:
    """Submits one request and collects its events.

    With `hold` its first event keeps the engine's thread until `go_on` is set: what a test does meanwhile happens
    before the next step, however fast that would be. `end_number` counts the ends of all requests, in their order.
    """

    def __init__(
        self,
        engine: Engine,
        text: str,
        name: str | None = None,
        num_logprobs: int = 0,
        prompt_logprobs: bool = False,
        masking: Masking | None = None,
        on_missing: OnMissing = "mask",
        router_temperature: float = 1.0,
        adapter: str = "auto",
        hold: bool = False,
        constraint: CompiledConstraint | None = None,
        **sampling: Any,
    ) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.first, self.go_on = threading.Event(), threading.Event()
        if not hold:
            self.go_on.set()
        self.name = name or f"request-{id(self)}"
        ids = tuple(engine.runner.model.tokenizer(text).input_ids)
        params = SamplingParams(**sampling)
        request = GenerationRequest(
            self.name,
            ids,
            params,
            num_logprobs=num_logprobs,
            prompt_logprobs=prompt_logprobs,
            masking=masking,
            on_missing=on_missing,
            router_temperature=router_temperature,
            adapter=adapter,
            constraint=constraint,
        )
        engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        assert not self.ended.is_set(), f"{event} after the final event"
        self.events.append(event)
        self.first.set()
        assert self.go_on.wait(WAIT_SECONDS), "the test held the engine for too long"
        if not isinstance(event, TokenEvent):
            self.end_number = next(_ENDS)
            self.ended.set()

    def result(self) -> FinishedEvent:
        assert self.ended.wait(WAIT_SECONDS), "the request did not end"
        last = self.events[-1]
        assert isinstance(last, FinishedEvent), last
        return last

    def error(self) -> EngineError:
        assert self.ended.wait(WAIT_SECONDS), "the request did not end"
        last = self.events[-1]
        assert isinstance(last, FailedEvent), last
        return last.error

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    @property
    def tokens(self) -> list[TokenEvent]:
        return [event for event in self.events if isinstance(event, TokenEvent)]
