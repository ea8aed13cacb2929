"""The application's shared state: service, metrics, limits, and the thread that tokenises prompts.

Invariant: there is one `ApiContext` for one application, at `app.state.context`. The engine's tokenizer is never used
here; prompts are tokenised with a copy of it.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from server.api.http.body import read_model
from server.api.http.errors import ValidationFailed
from server.constraints.grammar import Constraint, ConstraintError
from server.engine.request import QueueFullError
from server.serving.metrics import Metrics
from server.serving.service import LoadedModel, NotReadyError, Service
from server.settings.schema import HttpSettings

if TYPE_CHECKING:
    from server.constraints.compiler import CompiledConstraint

log = logging.getLogger(__name__)

MAX_WAITING_TEXTS = 256
MAX_COMPILING = 32

Body = TypeVar("Body", bound=BaseModel)
Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Watchers:
    """Counts the viewers whose stream is open."""

    def __init__(self) -> None:
        self.num_open = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """One more for the length of the block."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


class TextEncoder:
    """A copy of the tokenizer, used by one thread only.

    A tokenizer changes its own state in a call (truncation, padding), so the engine's cannot be shared. A long prompt
    must not block the event loop, so the work is done on a thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deepfew-encode")
        self._tokenizer: Future[Any] = self._thread.submit(copy.deepcopy, tokenizer)
        self._waiting = 0

    async def encode(self, text: str) -> list[int]:
        """Token ids of `text`. The text of a special token becomes that token. Raises QueueFullError."""
        return await self.run(_encode, text)

    async def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens included. Raises QueueFullError."""
        return await self.run(_decode, ids)

    async def run(self, work: Callable[[Any, Argument], Result], argument: Argument) -> Result:
        """`work(tokenizer, argument)` on the thread.

        Raises:
            QueueFullError: too many texts are waiting for the thread.
        """
        if self._waiting >= MAX_WAITING_TEXTS:
            raise QueueFullError(f"{MAX_WAITING_TEXTS} prompts are waiting to be tokenised; try again")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, lambda: work(self._tokenizer.result(), argument))
        finally:
            self._waiting -= 1


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass
class ApiContext:
    """Shared by all routes; `app.state.context`."""

    service: Service
    metrics: Metrics
    http: HttpSettings
    version: str
    log_prompts: bool = False
    watchers: Watchers = field(default_factory=Watchers)
    _encoders: dict[int, TextEncoder] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _num_compiling: int = 0
    _compiling: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="deepfew-compile")
    )

    async def read(self, request: Request, schema: type[Body], *, optional: bool = False) -> Body:
        """The request's body as a `schema`; see `read_model`. Raises `ApiError`."""
        return await read_model(
            request,
            schema,
            max_bytes=self.http.max_body_bytes,
            receive_seconds=self.http.receive_seconds,
            optional=optional,
        )

    def loaded(self) -> LoadedModel:
        """The model, whether it takes requests now or not. Raises NotReadyError until it is loaded."""
        model = self.service.loaded
        if model is None:
            raise NotReadyError(self.service.health().reason)
        return model

    def encoder(self, model: LoadedModel) -> TextEncoder:
        """The encoder of the model that is served."""
        with self._lock:
            if id(model) not in self._encoders:
                self._encoders = {id(model): TextEncoder(model.tokenizer)}
            return self._encoders[id(model)]

    async def compiled(
        self, model: LoadedModel, constraint: Constraint | None, param: str
    ) -> CompiledConstraint | None:
        """The constraint, compiled on a thread of its own; None is none.

        Args:
            param: where the constraint stands in the body, for messages.

        Raises:
            ValidationFailed: it cannot be enforced. QueueFullError: too many wait for the thread.
        """
        if constraint is None:
            return None
        if model.constraints is None:
            raise ValidationFailed(f"`{param}`: what is served here takes no constraints; leave it out", param=param)
        if self._num_compiling >= MAX_COMPILING:
            raise QueueFullError(f"{MAX_COMPILING} constraints are waiting to be compiled; try again")
        self._num_compiling += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._compiling, model.constraints.compile, constraint
            )
        except ConstraintError as error:
            raise ValidationFailed(f"`{param}`: {error}", param=param) from error
        finally:
            self._num_compiling -= 1

    def log_text(self, request: Request, kind: str, text: object) -> None:
        """Log a prompt or an answer if `log_prompts` is set. Nothing else logs them."""
        if self.log_prompts:
            log.info(kind, extra={"request_id": request.state.request_id, "text": str(text)})


def context_of(request: Request) -> ApiContext:
    """The application's context."""
    context: ApiContext = request.app.state.context
    return context
