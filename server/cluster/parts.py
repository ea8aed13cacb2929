"""The replicas of all parts, called over Ray, and the part for a request.

Invariant: a request for a profile goes to a part that has it; any other to the first part that has the whole
checkpoint, or else to the one with the most experts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from server.api.http.errors import ValidationFailed
from server.api.replicas import AsgiMessage, PassedRequest, ReplicaLostError
from server.cluster.likeness import likeness_of, parsed_body, profile_of
from server.cluster.replica import ReplicaFacts
from server.growth.fleet import FleetStore, together
from server.growth.status import GrowthError, StoreDemand
from server.serving.service import NotReadyError

log = logging.getLogger(__name__)
ASK_SECONDS = 10.0
FACTS_SECONDS, FIRST_FACTS_SECONDS = 10.0, 0.5
"""A part is asked again what it has after the first, and after the second if a part never answered."""


class Parts:
    """The replicas of all parts; `server.api.replicas.Replicas` says what it does.

    Args:
        replicas: of each part, by its name.
        profiles: the part of each profile that the settings name.
        wait_seconds: time a request waits for a replica to take it.
    """

    def __init__(
        self, replicas: Mapping[str, DeploymentHandle], profiles: Mapping[str, str], wait_seconds: float
    ) -> None:
        self._replicas, self._profiles, self._wait_seconds = replicas, profiles, wait_seconds
        self._facts: dict[str, ReplicaFacts] = {}
        self._asked_at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def open(self, request: PassedRequest) -> AsyncGenerator[AsgiMessage, None]:
        body = parsed_body(request.body) if request.method == "POST" else None
        likeness = None if body is None else likeness_of(body)
        part = await self._part_of(None if body is None else profile_of(body))
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

    async def _part_of(self, profile: str | None) -> str:
        """The part for a request.

        Raises:
            ValidationFailed: no part has the profile. NotReadyError: a part that may be the one has never answered.
        """
        if profile is not None and profile in self._profiles:
            return self._profiles[profile]
        if len(self._replicas) == 1:
            return next(iter(self._replicas))  # its replicas say what they lack
        await self._ask_facts()
        known = {part: self._facts[part] for part in self._replicas if part in self._facts}
        silent = [part for part in self._replicas if part not in known]
        if profile is None:
            best = max(known, key=lambda part: known[part].share, default="")
            if best and (known[best].share == 1.0 or not silent):
                return best
        else:
            found = next((part for part, facts in known.items() if profile in facts.profiles), None)
            if found is not None:
                return found
            if not silent:
                raise ValidationFailed(
                    f"no part of this cluster has the profile {profile!r}: GET /experts/profiles lists all",
                    param="profile",
                )
        raise NotReadyError(f"it is not known yet what the parts {', '.join(silent)} have; try again")

    async def _ask_facts(self) -> None:
        """Ask all parts what they have, if that was long ago; a request waits for it only if a part never answered."""
        is_complete = len(self._facts) == len(self._replicas)
        age = time.monotonic() - self._asked_at
        if self._asking is None and age > (FACTS_SECONDS if is_complete else FIRST_FACTS_SECONDS):
            self._asking = asyncio.ensure_future(self._learn_facts())
        if self._asking is not None and not is_complete:
            await asyncio.shield(self._asking)

    async def _learn_facts(self) -> None:
        try:
            for part, found in (await self._broadcast("facts")).items():
                if found:  # a part without a replica keeps what it had
                    self._facts[part] = found[0]
        finally:
            self._asked_at, self._asking = time.monotonic(), None

    async def _taken(self, answer: Any, part: str) -> None:
        try:
            async with asyncio.timeout(self._wait_seconds):
                await anext(answer)
        except (TimeoutError, RayServeException) as error:
            if isinstance(error, RequestCancelledError):
                raise
            raise NotReadyError(f"no replica of {part!r} took the request in {self._wait_seconds:g} s") from error

    async def ask_all(self, request: PassedRequest) -> Mapping[str, tuple[int, bytes]]:
        found = await self._broadcast("answer", None, request)
        answers = {name: (status, content) for part in found.values() for name, status, content in part}
        if not answers:
            raise NotReadyError("no replica answers")
        return answers

    async def ask(self, replica: str, request: PassedRequest) -> tuple[int, bytes]:
        _, status, content = await self._one("answer", replica, request)
        return status, content

    async def stores(self) -> Mapping[str, FleetStore]:
        readers: dict[str, dict[str, StoreDemand]] = defaultdict(dict)
        for part in (await self._broadcast("demand")).values():
            for store, name, demand in part:
                readers[store][name] = demand
        return {store: together(of_store) for store, of_store in sorted(readers.items())}

    async def grow(self, replica: str, named: Sequence[tuple[int, ...]]) -> None:
        """Let a replica add deep experts to its store. Raises GrowthError, NotReadyError."""
        if refusal := await self._one("grow", replica, named):
            raise GrowthError(refusal)

    async def shrink(self, replica: str, index: int) -> None:
        """Let a replica remove a deep expert of its store. Raises GrowthError, NotReadyError."""
        if refusal := await self._one("shrink", replica, index):
            raise GrowthError(refusal)

    async def _one(self, method: str, replica: str, argument: Any) -> Any:
        results = [one for part in (await self._broadcast(method, replica, argument)).values() for one in part]
        if not results:
            raise NotReadyError(f"the replica {replica} is not there, or does not answer")
        return results[0]

    async def _broadcast(self, method: str, *arguments: Any) -> dict[str, list[Any]]:
        """The results of each part's replicas, but None; failures are logged."""
        found = await asyncio.gather(*(self._of_part(part, method, *arguments) for part in self._replicas))
        return dict(zip(self._replicas, found, strict=True))

    async def _of_part(self, part: str, method: str, *arguments: Any) -> list[Any]:
        try:
            results = (
                await self._replicas[part]
                .broadcast(method, *arguments)
                .results_async(timeout_s=ASK_SECONDS, return_exceptions=True)
            )
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("a part does not answer", extra={"part": part, "method": method}, exc_info=error)
            return []
        for failure in (one for one in results if isinstance(one, BaseException)):
            log.warning("a replica gave no answer", extra={"part": part, "method": method}, exc_info=failure)
        return [one for one in results if one is not None and not isinstance(one, BaseException)]


def _without_request_id(message: AsgiMessage) -> AsgiMessage:
    """A message without the header that Ray's proxy adds itself."""
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [header for header in message["headers"] if header[0] != b"x-request-id"]}
