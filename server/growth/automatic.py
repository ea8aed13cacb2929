"""Automatic growth: at intervals, extract the best candidates of the grower if enough demand missed them.

Invariants: the store never exceeds the grower's byte budget; no deep expert is added for less than a given share of the
router mass; none is removed for one in hardly more demand. After a failure the interval doubles, so that a full disk
costs neither the service nor the log.
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
        grower: does what is found to be worth it.
        interval_seconds: between two looks.
        min_share: least share of the router mass that missed a deep expert for it to be added.
        step: most deep experts added at a time.
        replace: when the budget is full, remove deep experts in little demand for ones in much more.
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
        """Start a growth if it is worth it; returns the number of deep experts that it adds.

        Raises:
            GrowthError: a growth is worth it but not possible.
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
        """Remove the deep expert in least demand that may be removed, if a missing one is worth it; returns whether."""
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
            except GrowthError as error:  # a profile may need this one, and not the next
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
