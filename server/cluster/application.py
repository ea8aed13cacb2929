"""The cluster as an application of Ray Serve: fronts that take requests, and the replicas of each part.

`serve run server.cluster.application:application config=FILE` and a RayService manifest take it, and so does `deepfew
cluster`. Invariant: all that a replica knows comes from its settings; nothing but requests, answers and statistics
passes between processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from expert_store.copying import copy_store
from server.api.front import Front
from server.api.replicas import AsgiMessage, PassedRequest
from server.cluster.choice import DEFAULT_OPTIONS, ChoiceOptions
from server.cluster.growth import FleetGrower
from server.cluster.likeness import Likeness
from server.cluster.parts import ASK_SECONDS, Parts
from server.cluster.replica import Replica, ReplicaFacts
from server.cluster.router import AffinityRouter
from server.cluster.settings import ClusterSettings, Part, read_cluster
from server.errors import SettingsError
from server.growth.status import GrowthError, StoreDemand
from server.serving.logging_setup import configure_logging
from server.serving.service import NotReadyError
from server.settings.schema import HttpSettings, Settings
from server.settings.version import package_version

STATUS_REQUESTS = 32
"""Requests about its state that a replica takes beside its running and waiting ones."""


def application(arguments: Mapping[str, str]) -> serve.Application:
    """The application that `serve run` and a RayService build.

    Args:
        arguments: `config`, the path of the settings file on every machine.

    Raises:
        SettingsError: see `read_cluster`; or the address is reachable and no key is set.
    """
    cluster, parts = read_cluster(Path(arguments["config"]))
    for part in parts:
        part.settings.require_safe_address()
    return build(cluster, parts)


def build(
    cluster: ClusterSettings, parts: Sequence[Part], options: ChoiceOptions = DEFAULT_OPTIONS
) -> serve.Application:
    """The application of a cluster's settings; `options` are of the choice of a replica."""
    names: dict[Path | None, str] = {}  # parts of one folder have one store, called as the first of them
    stores = {part.name: names.setdefault(part.settings.store, part.name) for part in parts}
    replicas = {part.name: _replicas(cluster, part, stores[part.name], options) for part in parts}
    fronts = serve.deployment(
        serve.ingress()(_Front), name="front", num_replicas=cluster.fronts, max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    profiles = {profile: part.name for part in parts for profile in part.profiles}
    grower = None
    if any(part.settings.growth.grow_budget is not None for part in parts):
        grower = serve.deployment(_Grower, name="grower", num_replicas=1, ray_actor_options={"num_cpus": 0}).bind(
            replicas, parts[0].settings
        )
    return fronts.bind(replicas, profiles, parts[0].settings.http, cluster.wait_seconds, grower)


def _replicas(cluster: ClusterSettings, part: Part, store: str, options: ChoiceOptions) -> serve.Application:
    engine, http = part.settings.engine, part.settings.http
    deployment = serve.deployment(
        _Replica,
        name=part.name,
        num_replicas=part.replicas,
        max_ongoing_requests=engine.max_batch_size + engine.max_queue_requests + STATUS_REQUESTS,
        ray_actor_options={"num_cpus": cluster.cpus_per_replica, "num_gpus": cluster.gpus_per_replica},
        graceful_shutdown_timeout_s=http.drain_seconds,
        health_check_period_s=cluster.statistics_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs=asdict(options),
            request_routing_stats_period_s=cluster.statistics_seconds,
            request_routing_stats_timeout_s=ASK_SECONDS,
        ),
    )
    return deployment.bind(part.settings, store, part.profiles, cluster.own_stores)


class _Replica:
    """`Replica` as Ray calls it. A method whose first argument is a name does nothing but in the replica of that name.

    Args:
        store: name of the part's store.
        profiles: that it has to know.
        own_stores: see `ClusterSettings`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: Settings, store: str, profiles: tuple[str, ...], own_stores: Path | None
    ) -> None:
        configure_logging(settings.log.log_format, settings.log.log_level)
        context = serve.get_replica_context()
        place = f"{context.deployment}-{context.rank.rank}"
        self._name, self._store = f"{context.deployment}-{context.replica_id.unique_id}", store
        # Replicas of one store would overwrite each other's usage; a replica that replaces another takes up its own.
        usage = (settings.usage.usage_directory or _store_of(settings) / "usage") / place
        own: dict[str, Any] = {"usage": settings.usage.model_copy(update={"usage_directory": usage})}
        if own_stores is not None:
            self._store, own["store"] = place, own_stores / place
            await asyncio.to_thread(copy_store, _store_of(settings), own["store"])
        self._replica = Replica(settings.model_copy(update=own), package_version())
        await self._replica.load()
        unknown = sorted(set(profiles) - set(self._replica.facts().profiles))
        if unknown:
            raise SettingsError(
                f"the part {context.deployment} names profiles that its settings do not give ({', '.join(unknown)}): "
                "add their files to `profiles`, or take the names out"
            )

    async def serve(self, request: PassedRequest, likeness: Likeness | None) -> AsyncGenerator[list[AsgiMessage], None]:
        yield []  # says that the request was taken
        async with aclosing(self._replica.serve(request, likeness)) as batches:
            async for batch in batches:
                yield batch

    async def answer(self, only: str | None, request: PassedRequest) -> tuple[str, int, bytes] | None:
        return None if self._is_not(only) else (self._name, *await self._replica.answer(request))

    def facts(self) -> ReplicaFacts:
        return self._replica.facts()

    def demand(self) -> tuple[str, str, StoreDemand] | None:
        found = self._replica.demand()
        return None if found is None else (self._store, self._name, found)

    async def grow(self, only: str, named: Sequence[tuple[int, ...]]) -> str | None:
        return None if self._is_not(only) else await _refusal_of(self._replica.grow(named))

    async def shrink(self, only: str, index: int) -> str | None:
        return None if self._is_not(only) else await _refusal_of(self._replica.shrink(index))

    def _is_not(self, only: str | None) -> bool:
        return only is not None and only != self._name

    async def record_routing_stats(self) -> dict[str, Any]:
        return self._replica.statistics()

    async def check_health(self) -> None:
        self._replica.check()
        await self._replica.follow_store()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._replica.close)


def _store_of(settings: Settings) -> Path:
    if settings.store is None:
        raise SettingsError("no store is named: give `store` in the settings file, or in the settings of the part")
    return settings.store


async def _refusal_of(change: Awaitable[None]) -> str:
    """Why a change was refused, or an empty text."""
    try:
        await change
    except (GrowthError, NotReadyError) as error:
        return str(error)
    return ""


class _Front:
    """The ingress.

    Args:
        grower: bound here so that it runs; nothing calls it.
    """

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], profiles: Mapping[str, str], http: HttpSettings,
        wait_seconds: float, grower: DeploymentHandle | None,
    ) -> None:  # fmt: skip
        del grower
        self._http = http
        self._parts = Parts(replicas, profiles, wait_seconds)

    def __serve_build_asgi_app__(self) -> Front:
        return Front(self._parts, self._http)


class _Grower:
    """Looks at what the stores lack, as the settings say."""

    def __init__(self, replicas: Mapping[str, DeploymentHandle], settings: Settings) -> None:
        configure_logging(settings.log.log_format, settings.log.log_level)
        grower = FleetGrower(Parts(replicas, {}, ASK_SECONDS), settings.growth)
        self._running = asyncio.ensure_future(grower.run())

    def check_health(self) -> None:
        if self._running.done():
            self._running.result()  # raises why it ended, so that Ray starts another
