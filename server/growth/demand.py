"""Recent demand, by which every change of a store is ranked, whoever asked for it.

Time is cut into intervals. What was wanted in the running one counts whole, in the one before half, and so on; what
earlier runs wanted counts as the interval before the start. Invariant: an interval in which nothing was wanted ages
nothing, so a server that was idle ranks as it did before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from server.growth.ranking import Float

DECAY = 0.5
"""The weight of an interval, relative to the next one."""


class RecentDemand:
    """Demand with a memory that fades.

    Args:
        demand_mass: a snapshot [L, E] of all that was wanted, earlier runs included; called on any thread.
        interval_seconds: length of an interval.
    """

    def __init__(self, demand_mass: Callable[[], Float], interval_seconds: float) -> None:
        self._demand_mass, self._interval_seconds = demand_mass, interval_seconds
        seen = demand_mass()
        self._faded_and_seen = (DECAY * seen, seen)  # one object, so that any thread reads both of one moment

    def snapshot(self) -> Float:
        """Wanted mass [L, E] as it counts now; the caller's own. Any thread."""
        faded, seen = self._faded_and_seen
        recent: Float = faded + (self._demand_mass() - seen)
        return recent

    def end_interval(self) -> None:
        """The running interval ends, and another begins; one thread alone calls it."""
        faded, seen = self._faded_and_seen
        now = self._demand_mass()
        if (now != seen).any():
            self._faded_and_seen = (DECAY * (faded + (now - seen)), now)

    def start(self, stopping: threading.Event) -> None:
        """Let intervals pass, on a thread of their own, until `stopping` is set."""

        def run() -> None:
            while not stopping.wait(self._interval_seconds):
                self.end_interval()

        threading.Thread(target=run, name="recent-demand", daemon=True).start()
