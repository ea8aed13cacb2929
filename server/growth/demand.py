"""Recent demand, which ranks the deep experts for every change of a store, manual or automatic.

Time is divided into intervals. Demand of the running interval counts in full, that of the interval before half, and so
on; the demand of earlier runs counts as the interval before the start. Invariant: an interval without demand changes no
weight, so an idle server keeps its ranking.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from server.growth.ranking import Float

DECAY = 0.5
"""The weight of an interval, relative to the next one."""


class RecentDemand:
    """Demand whose weight falls with its age.

    Args:
        demand_mass: a snapshot [L, E] of all demand, earlier runs included; called on any thread.
        interval_seconds: length of an interval.
    """

    def __init__(self, demand_mass: Callable[[], Float], interval_seconds: float) -> None:
        self._demand_mass, self._interval_seconds = demand_mass, interval_seconds
        seen = demand_mass()
        self._faded_and_seen = (DECAY * seen, seen)  # one object, so that a thread reads values of the same moment

    def snapshot(self) -> Float:
        """The weighted demanded mass [L, E], a copy; any thread may call it."""
        faded, seen = self._faded_and_seen
        recent: Float = faded + (self._demand_mass() - seen)
        return recent

    def end_interval(self) -> None:
        """End the running interval and begin the next; only one thread calls it."""
        faded, seen = self._faded_and_seen
        now = self._demand_mass()
        if (now != seen).any():
            self._faded_and_seen = (DECAY * (faded + (now - seen)), now)

    def start(self, stopping: threading.Event) -> None:
        """End intervals on a thread of their own, until `stopping` is set."""

        def run() -> None:
            while not stopping.wait(self._interval_seconds):
                self.end_interval()

        threading.Thread(target=run, name="recent-demand", daemon=True).start()
