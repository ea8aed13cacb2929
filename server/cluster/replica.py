"""One replica: a service with its engine behind the HTTP application, and the statistics by which routers know it.

It knows no Ray. Invariant: what a request demanded is counted to the topics of that request, whatever else is in the
batch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_store.manifest import MANIFEST_NAME
from router.ledger import sum_by_expert
from server.api.app import create_app
from server.api.front import answer_of
from server.api.readiness import checked
from server.api.replicas import AsgiMessage, PassedRequest
from server.cluster.likeness import Likeness
from server.cluster.statistics import TopicLedger, sketch_layers
from server.engine.request import EngineStatus, GenerationRequest, OnEvent
from server.errors import ServerError, message_of
from server.growth.status import GrowthBusyError, GrowthError, GrowthLike, StoreDemand
from server.model.kv.prefixes import block_digests
from server.model.load_progress import LoadProgress
from server.serving.loading import check_store, load
from server.serving.metrics import Metrics
from server.serving.service import EngineLike, LoadedModel, Loader, Service
from server.settings.schema import Settings

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05


class ReplicaFailedError(ServerError):
    """A replica cannot serve; the message is the reason."""


@dataclass(frozen=True)
class ReplicaFacts:
    """The profiles that a replica knows, and the share of the checkpoint's experts that it has."""

    profiles: tuple[str, ...]
    share: float


class Replica:
    """Loads a model and serves it to the requests that fronts pass on.

    Args:
        settings: of the replica.
        version: of deepfew.
    """

    def __init__(self, settings: Settings, version: str) -> None:
        check_store(settings)
        assert settings.store is not None
        self._store = settings.store
        self._stamp = _stamp(self._store)  # before it is read, so that no change is missed
        self._drain_seconds = settings.http.drain_seconds
        self._watch: _Watch | None = None
        self._running = 0
        self._service = Service(self._loader(settings), stall_seconds=settings.engine.stall_seconds)
        self._application = create_app(
            self._service, Metrics(self._service, version), settings.http, version=version,
            log_prompts=settings.log.log_prompts,
        )  # fmt: skip

    def _loader(self, settings: Settings) -> Loader:
        def load_watched(progress: LoadProgress) -> LoadedModel:
            model = checked(load(settings, progress, grows_by_itself=False))  # growth is decided for all stores
            self._watch = _Watch(model)
            return replace(model, engine=self._watch)

        return load_watched

    async def load(self) -> None:
        """Return when requests are taken.

        Raises:
            ReplicaFailedError: the model cannot be loaded, and the message says how to correct it. Any error of loading
                that is not one of ours.
        """
        self._service.start()
        while self._service.loaded is None:
            if self._service.error is not None:
                message = message_of(self._service.error)
                if message is None:
                    raise self._service.error
                raise ReplicaFailedError(message)
            await asyncio.sleep(POLL_SECONDS)

    async def serve(self, request: PassedRequest, likeness: Likeness | None) -> AsyncGenerator[list[AsgiMessage], None]:
        """The ASGI messages of the answer, as many at once as there are. Closing it cancels the request."""
        self._running += 1
        context = copy_context()  # of the application alone: the steps of a generator may run in different contexts
        context.run(_LIKENESS.set, likeness)
        try:
            async with aclosing(answer_of(self._application, request, context)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._running -= 1

    async def answer(self, request: PassedRequest) -> tuple[int, bytes]:
        """The status and the body of a short answer."""
        status, body = 500, b""
        async for batch in self.serve(request, None):
            for message in batch:
                status = message.get("status", status)
                body += message.get("body", b"")
        return status, body

    def check(self) -> None:
        """Raise ReplicaFailedError if anything is broken, so that the replica is replaced."""
        health = self._service.health()
        if not health.is_healthy:
            raise ReplicaFailedError(health.reason)

    def statistics(self) -> dict[str, Any]:
        """`ReplicaStatistics` as sent to routers; empty until the model is loaded."""
        return {} if self._watch is None else self._watch.statistics(self._running)

    def facts(self) -> ReplicaFacts:
        """Its profiles and its share of the checkpoint. Raises NotReadyError."""
        model = self._service.model()
        profiles = () if model.masks is None else tuple(sorted(model.masks.profiles))
        return ReplicaFacts(profiles, float(model.experts().available.mean()))

    def demand(self) -> StoreDemand | None:
        """Its store's experts and their demand; None if the store cannot change. Raises NotReadyError."""
        growth = self._service.model().growth
        return None if growth is None else growth.demand()

    async def grow(self, named: Sequence[tuple[int, ...]]) -> None:
        """Begin to add these deep experts. Raises GrowthError, NotReadyError."""
        await asyncio.to_thread(self._growth().grow, len(named), named)

    async def shrink(self, index: int) -> None:
        """Remove a deep expert. Raises GrowthError, NotReadyError."""
        await asyncio.to_thread(self._growth().shrink, [index])

    def _growth(self) -> GrowthLike:
        growth = self._service.model().growth
        if growth is None:
            raise GrowthError("what is served here cannot change: it has no store on disk")
        return growth

    async def follow_store(self) -> None:
        """Serve what the manifest on disk says, if another replica has changed it since the last call."""
        growth = self._service.model().growth
        now = _stamp(self._store)
        if growth is None or now == self._stamp or growth.status().state != "idle":
            return
        try:
            found = await asyncio.to_thread(growth.reload)
        except GrowthBusyError:
            return  # seen again at the next call
        except GrowthError as error:
            log.warning("the changed store is not taken over: %s", error)
        else:
            if found.num_added or found.num_removed:
                log.info("took over a changed store", extra={"added": found.num_added, "removed": found.num_removed})
        self._stamp = now

    def close(self) -> None:
        """Finish what runs, save the usage and stop. Blocks."""
        self._service.close(self._drain_seconds)


def _stamp(store: Path) -> tuple[int, int]:
    """A value that changes with the manifest, which is replaced as a whole."""
    found = (store / MANIFEST_NAME).stat()
    return found.st_ino, found.st_mtime_ns


_LIKENESS: ContextVar[Likeness | None] = ContextVar("likeness", default=None)
"""Of the HTTP request under way; its generations are submitted in the same context."""


class _Watch:
    """An engine that counts the demand of each request to the request's topics."""

    def __init__(self, model: LoadedModel) -> None:
        self._engine: EngineLike = model.engine
        self._experts = model.experts
        self._shape = (model.num_layers, model.num_experts)
        self._layers = sketch_layers(*self._shape)
        self._ledger = TopicLedger(len(self._layers) * model.num_experts)
        self._lock = threading.Lock()  # the engine's thread adds, the event loop begins and reads

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        likeness = _LIKENESS.get()
        if likeness is not None:
            digests = block_digests(request.prompt_ids)
            with self._lock:
                keys = self._ledger.begin(likeness, digests, time.time())
            request = replace(request, observe_demand=partial(self._count, keys))
        self._engine.submit(request, on_event)

    def cancel(self, request_id: str) -> None:
        self._engine.cancel(request_id)

    def start(self) -> None:
        self._engine.start()

    def stop(self, drain_seconds: float) -> None:
        self._engine.stop(drain_seconds)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def held_prefixes(self) -> frozenset[int]:
        return self._engine.held_prefixes()

    def _count(
        self, keys: Sequence[int], demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32]
    ) -> None:
        """Add the demand [L, T, K] of a step's tokens to the topics."""
        mass = sum_by_expert(demand_index[self._layers], demand_weight[self._layers], self._shape[1])
        with self._lock:
            self._ledger.add(keys, mass.ravel(), demand_index.shape[1])

    def statistics(self, load: int) -> dict[str, Any]:
        found = self._experts()
        held, available = (places[self._layers].ravel() for places in (found.resident, found.available))
        digests = self.held_prefixes()
        with self._lock:
            return self._ledger.statistics(time.time(), load, held, available, digests).to_wire()
