"""The cluster as an application of Ray Serve: fronts that take requests, and the replicas of each part.

`serve run server.cluster.application:application config=FILE` and a RayService manifest take it, and so does `deepfew
cluster`. Invariant: all that a replica knows comes from its settings; nothing but requests, answers and statistics
passes between processes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from server.api.front import AsgiMessage, Front, PassedRequest, ReplicaLostError
from server.cluster.choice import DEFAULT_OPTIONS, ChoiceOptions
from server.cluster.likeness import Likeness, likeness_of, parsed_body, profile_of
from server.cluster.replica import Replica
from server.cluster.router import AffinityRouter
from server.cluster.settings import ClusterSettings, Part, read_cluster
from server.serving.logging_setup import configure_logging
from server.serving.service import NotReadyError
from server.settings.schema import HttpSettings, Settings
from server.settings.version import package_version

log = logging.getLogger(__name__)
STATUS_REQUESTS = 32
"""Requests about its state that a replica takes beside its running and waiting ones."""
ASK_SECONDS = 10.0


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
    replicas = {part.name: _replicas(cluster, part, options) for part in parts}
    fronts = serve.deployment(
        serve.ingress()(_Front), name="front", num_replicas=cluster.fronts, max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0},
    )  # fmt: skip
    profiles = {profile: part.name for part in parts for profile in part.profiles}
    return fronts.bind(replicas, profiles, parts[0].settings.http, cluster.wait_seconds)


def _replicas(cluster: ClusterSettings, part: Part, options: ChoiceOptions) -> serve.Application:
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
    return deployment.bind(part.settings)


class _Replica:
    """`Replica` as Ray calls it."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        configure_logging(settings.log.log_format, settings.log.log_level)
        context = serve.get_replica_context()
        self._name = str(context.replica_id.unique_id)
        # Replicas of one store would overwrite each other's usage; a replica that replaces another takes up its own.
        own = (settings.usage.usage_directory or _store_usage(settings)) / f"{context.deployment}-{context.rank.rank}"
        usage = settings.usage.model_copy(update={"usage_directory": own})
        self._replica = Replica(settings.model_copy(update={"usage": usage}), package_version())
        await self._replica.load()

    async def serve(self, request: PassedRequest, likeness: Likeness | None) -> AsyncGenerator[list[AsgiMessage], None]:
        yield []  # says that the request was taken
        async with aclosing(self._replica.serve(request, likeness)) as batches:
            async for batch in batches:
                yield batch

    async def answer(self, request: PassedRequest) -> tuple[str, int, bytes]:
        return self._name, *await self._replica.answer(request)

    async def record_routing_stats(self) -> dict[str, Any]:
        return self._replica.statistics()

    def check_health(self) -> None:
        self._replica.check()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._replica.close)


def _store_usage(settings: Settings) -> Path:
    assert settings.store is not None  # `Replica` says so in better words
    return settings.store / "usage"


class _Front:
    """The ingress."""

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], profiles: Mapping[str, str], http: HttpSettings,
        wait_seconds: float,
    ) -> None:  # fmt: skip
        self._http = http
        self._parts = _Parts(replicas, profiles, wait_seconds)

    def __serve_build_asgi_app__(self) -> Front:
        return Front(self._parts, self._http)


class _Parts:
    """The replicas of all parts, called over Ray; `server.api.front.Replicas` says what it does."""

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], profiles: Mapping[str, str], wait_seconds: float
    ) -> None:
        self._replicas, self._profiles, self._wait_seconds = replicas, profiles, wait_seconds
        self._first = next(iter(replicas))

    async def open(self, request: PassedRequest) -> AsyncGenerator[AsgiMessage, None]:
        body = parsed_body(request.body) if request.method == "POST" else None
        likeness = None if body is None else likeness_of(body)
        part = self._profiles.get(profile_of(body or {}) or "", self._first)
        answer = self._replicas[part].options(stream=True).serve.remote(request, likeness)
        try:
            await self._taken(answer, part)
            async for batch in answer:
                for message in batch:
                    yield _without_request_id(message)
        except (RayActorError, RequestCancelledError, TaskCancelledError) as error:
            log.warning("a replica ended with a request", extra={"part": part, "error": type(error).__name__})
            raise ReplicaLostError("the replica that ran this request ended; send the request again") from error
        finally:
            answer.cancel()

    async def _taken(self, answer: Any, part: str) -> None:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await anext(answer)
        except (TimeoutError, RayServeException) as error:
            if isinstance(error, RequestCancelledError):
                raise
            raise NotReadyError(f"no replica of {part!r} took the request in {self._wait_seconds:g} s") from error

    async def ask_all(self, request: PassedRequest) -> Mapping[str, tuple[int, bytes]]:
        answers: dict[str, tuple[int, bytes]] = {}
        for part, handle in self._replicas.items():
            try:
                results = await handle.broadcast("answer", request).results_async(
                    timeout_s=ASK_SECONDS, return_exceptions=True
                )
            except RayServeException as error:
                raise NotReadyError(f"no replica of {part!r} is there") from error
            for result in results:
                if isinstance(result, tuple):
                    name, status, content = result
                    answers[f"{part}-{name}"] = (status, content)
                else:  # of a replica that just ended, or a bug of ours
                    log.warning("a replica gave no answer", extra={"part": part, "path": request.path}, exc_info=result)
        if not answers:
            raise NotReadyError("no replica answers")
        return answers


def _without_request_id(message: AsgiMessage) -> AsgiMessage:
    """A message without the header that Ray's proxy adds itself."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [header for header in message["headers"] if header[0] != b"x-request-id"]}
