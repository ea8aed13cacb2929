"""The choice of a replica as a request router of Ray Serve; it runs in each front.

Invariant: all that it knows comes again with the next statistics, so a front can end at any time.

Source: `ray.serve.request_router.RequestRouter`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from server.cluster.choice import ChoiceOptions, Fleet
from server.cluster.likeness import Likeness

ON_THEIR_WAY_SECONDS = 1.0
"""A request that was chosen a replica and was not sent for so long was given up."""


class AffinityRouter(RequestRouter):
    """Chooses by `server.cluster.choice`, from the statistics that Ray's controller collects."""

    def initialize_state(self, **options: float) -> None:
        """Called by Ray with `request_router_kwargs`: the fields of `ChoiceOptions`."""
        self._fleet = Fleet(ChoiceOptions(**options))
        self._draw = random.Random()
        self._on_their_way: dict[str, tuple[str, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, then the second best, then all: a rank is tried when all before it are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # the last rank has all; wait before the next try
        likeness = _likeness(pending_request)
        if pending_request is None or likeness is None or not candidate_replicas:
            return [self._draw.sample(candidate_replicas, min(2, len(candidate_replicas))), candidate_replicas]
        by_name = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        self._fleet.keep(by_name)
        now = time.time()
        ranked = self._fleet.ranked(likeness, self._loads(by_name, now), now, self._draw)
        self._on_their_way[pending_request.metadata.internal_request_id] = (ranked[0].replica, now)
        return [*([by_name[candidate.replica]] for candidate in ranked), candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """From now on Ray's own count has the request, and the replica its beginning."""
        likeness = _likeness(pending_request)
        if likeness is not None:
            self._fleet.sent(replica_id.to_full_id_str(), likeness, time.time())
        self._on_their_way.pop(pending_request.metadata.internal_request_id, None)

    def _loads(self, replicas: Mapping[str, RunningReplica], now: float) -> dict[str, float]:
        """Requests at each replica, with those that were chosen for it and that Ray has not counted yet."""
        loads = {name: float(self._load(name, replica)) for name, replica in replicas.items()}
        self._on_their_way = {
            request: chosen
            for request, chosen in self._on_their_way.items()
            if 0 <= now - chosen[1] < ON_THEIR_WAY_SECONDS
        }
        for name, _ in self._on_their_way.values():
            if name in loads:
                loads[name] += 1
        return loads

    def _load(self, name: str, replica: RunningReplica) -> int:
        """Requests at the replica as this router knows it, else as the replica said."""
        statistics = self._fleet.update(name, replica.routing_stats)
        known = self._replica_queue_len_cache.get(replica.replica_id)
        return known if known is not None else 0 if statistics is None else statistics.load


def _likeness(request: PendingRequest | None) -> Likeness | None:
    arguments = [] if request is None else request.args
    return next((argument for argument in arguments if isinstance(argument, Likeness)), None)
