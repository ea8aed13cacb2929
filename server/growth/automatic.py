"""Automatic growth: at intervals, extract the grower's best candidates if their share of the demand is large enough.

Invariants: the store never exceeds the grower's byte budget; a deep expert is added only if its share of the router
mass reaches the given minimum, and replaced only by one in much higher demand. After a failure the interval doubles, so
that a full disk disturbs neither serving nor the log.
"""

from __future__ import annotations

import logging
import threading

from server.growth.grower import Grower
from server.growth.status import GrowthBusyError, GrowthError

log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 3600.0


class AutoGrower:
    """Grows the store at intervals, on its own thread, until the grower stops.

    Args:
        grower: grows and shrinks the store.
        interval_seconds: time between two checks.
        min_share: a missing deep expert is added if its share of the demanded router mass is at least this.
        step: most deep experts added at a time.
        replace: when the budget is full, replace deep experts in low demand by missing ones in much higher demand.
    """

    def __init__(
        self,
        grower: Grower,
        *,
        interval_seconds: float,
        min_share: float,
        step: int,
        replace: bool = False,
    ) -> None:
        self._grower, self._replace = grower, replace
        self._interval_seconds, self._min_share, self._step = interval_seconds, min_share, step

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="automatic-growth", daemon=True).start()

    def look(self) -> int:
        """Start a growth if a candidate has enough demand; return the number of deep experts that it adds.

        Raises:
            GrowthError: a candidate has enough demand, but the growth is not possible.
        """
        candidates = self._grower.candidates()
        worth = [one for one in candidates if one.missing_share >= self._min_share]
        if not candidates and self._replace and self._make_room():
            worth = self._grower.candidates()[:1]
        if not worth:
            return 0
        chosen = self._grower.grow(min(len(worth), self._step))
        log.info("automatic growth has started", extra={"num_added": len(chosen), "reason": chosen[0].reason})
        return len(chosen)

    def _make_room(self) -> bool:
        """Remove the removable deep expert in least demand if a missing one may replace it; return whether it did."""
        found = self._grower.replacements()
        if found is None or found[0].missing_share < self._min_share:
            return False
        missing, removable = found
        refusal: GrowthError | None = None
        for deep in removable:
            try:
                self._grower.shrink([deep.index])
            except GrowthBusyError:
                raise
            except GrowthError as error:  # a profile may need this one; try the next
                refusal = error
                continue
            log.info("removed a deep expert for one in more demand", extra={"index": deep.index})
            return True
        raise GrowthError(
            f"a missing deep expert would serve {missing.missing_share:.2%} of the demand, but none of the "
            f"{len(removable)} deep experts in less demand can be removed for it ({refusal}); raise `grow_budget`"
        ) from refusal

    def _run(self) -> None:
        wait = self._interval_seconds
        while not self._grower.stopping.wait(wait):
            failures = self._grower.status().num_failures
            try:
                self.look()
                self._grower.wait()
            except GrowthError as error:
                log.warning("automatic growth is not possible: %s", error)
                failures -= 1
            has_failed = self._grower.status().num_failures > failures
            wait = (
                min(wait * 2, max(MAX_WAIT_SECONDS, self._interval_seconds)) if has_failed else self._interval_seconds
            )
