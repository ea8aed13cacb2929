"""Growth of a cluster's stores without commands: at intervals, decided for all of them by `server.growth.fleet`.

Invariants: no store exceeds its budget; a deep expert is added only if its share of its store's demand reaches the
given minimum, and replaced only by one that is worth much more. All knowledge comes from the replicas at each look, so
the process that looks can be replaced at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from server.errors import ServerError
from server.growth.fleet import FleetPlan, FleetStore
from server.growth.status import GrowthError
from server.settings.schema import GrowthSettings

log = logging.getLogger(__name__)
MAX_WAIT_SECONDS = 3600.0

Experts = tuple[int, ...]


class Stores(Protocol):
    """The stores of a cluster, and changes of them; a change raises GrowthError where a replica refuses it."""

    async def stores(self) -> Mapping[str, FleetStore]: ...
    async def grow(self, replica: str, named: Sequence[Experts]) -> None: ...
    async def shrink(self, replica: str, index: int) -> None: ...


class FleetGrower:
    """Grows the stores that have a budget.

    Args:
        stores: of the cluster.
        settings: interval, least share, most deep experts for each store at a look, and whether to replace.
    """

    def __init__(self, stores: Stores, settings: GrowthSettings) -> None:
        self._stores, self._settings = stores, settings

    async def run(self) -> None:
        """Look at intervals, which double while a look fails."""
        usual = wait = self._settings.grow_interval_seconds
        while True:
            await asyncio.sleep(wait)
            try:
                await self.look()
                wait = usual
            except ServerError as error:
                log.warning("the cluster's stores could not grow: %s", error)
                wait = min(wait * 2, max(MAX_WAIT_SECONDS, usual))

    async def look(self) -> int:
        """Start what is worth it; returns the number of deep experts that are being added.

        Raises:
            GrowthError: a store that should grow refuses. NotReadyError: no replica answers.
        """
        stores = await self._stores.stores()
        demands = {name: one.demand for name, one in stores.items()}
        if not stores or any(one.status.state != "idle" for one in demands.values()):
            return 0
        bounded = [name for name, one in demands.items() if one.room is not None]
        plan = FleetPlan(demands)
        by_store: dict[str, list[Experts]] = defaultdict(list)
        for one in plan.candidates(self._settings.grow_step * len(bounded), bounded):
            if one.candidate.missing_share >= self._settings.grow_min_share:
                by_store[one.store].append(one.candidate.experts)
        if self._settings.grow_replace:
            for name in bounded:
                by_store.update(await self._replaced(name, plan, stores[name]))
        for name, named in by_store.items():
            await self._stores.grow(stores[name].replicas[0], named)
            log.info("a store of the cluster grows", extra={"store": name, "num_added": len(named)})
        return sum(map(len, by_store.values()))

    async def _replaced(self, name: str, plan: FleetPlan, store: FleetStore) -> dict[str, list[Experts]]:
        """Remove a deep expert of a full store for one that is worth much more, which is returned."""
        found = plan.replacement(name)
        if found is None or found[0].candidate.missing_share < self._settings.grow_min_share:
            return {}
        missing, index = found
        try:
            await self._stores.shrink(store.replicas[0], index)
        except GrowthError as error:  # a profile may need it
            log.warning("deep expert %d of the store %s is not replaced: %s", index, name, error)
            return {}
        return {name: [missing.candidate.experts]}
