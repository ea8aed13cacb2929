"""The replicas behind a front, and the requests that are passed on to them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Message

from server.engine.request import EngineError
from server.growth.fleet import FleetStore

AsgiMessage = Message


class ReplicaLostError(EngineError):
    """The replica that ran the request ended."""


@dataclass(frozen=True)
class PassedRequest:
    """A request on its way to a replica; headers as ASGI has them."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Replicas(Protocol):
    """The replicas behind a front."""

    def open(self, request: PassedRequest) -> AsyncGenerator[Message, None]:
        """The ASGI messages of one replica's answer; closing the generator cancels the request there.

        Raises:
            NotReadyError: no replica took it in time. ReplicaLostError: the replica ended.
        """
        ...

    async def ask_all(self, request: PassedRequest) -> Mapping[str, tuple[int, bytes]]:
        """The status and the body of every replica's answer, by the replica's name; at least one.

        Raises:
            NotReadyError: there is no replica, or none answers.
        """
        ...

    async def ask(self, replica: str, request: PassedRequest) -> tuple[int, bytes]:
        """The status and the body of one replica's answer; its name as `ask_all` gives it.

        Raises:
            NotReadyError: it is not there, or does not answer.
        """
        ...

    async def stores(self) -> Mapping[str, FleetStore]:
        """The stores that can change, by name, with the names of the replicas that read them.

        Raises:
            NotReadyError: no replica answers.
        """
        ...
