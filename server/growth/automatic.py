"""Growth by itself: now and then a look at what the grower ranks first, and a step towards having it.

Invariant: never beyond the grower's byte budget, never for less than a given share of the router mass, nothing goes for
something that is wanted hardly more, and after a failure later and later, so that a full disk costs neither the service
nor the log.
"""

from __future__ import annotations

import logging
import threading

from server.growth.errors import GrowthBusyError, GrowthError
from server.growth.grower import Grower

log = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 3600.0


class AutoGrower:
    """Looks at intervals, on a thread of its own, until the grower is told to stop.

    Args:
        grower: does what is found to be worth it.
        interval_seconds: between two looks.
        min_share: of the router mass, that a deep expert must have been missed for.
        step: most deep experts at one look.
        replace: when the budget is full, give up what is wanted least for what is wanted much more.
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
        """Begin to look."""
        threading.Thread(target=self._run, name="grow-by-itself", daemon=True).start()

    def look(self) -> int:
        """Look once, and start a growth if it is worth it; returns by how many deep experts.

        Raises:
            GrowthError: it would be worth it and is not possible.
        """
        candidates = self._grower.candidates()
        worth = [one for one in candidates if one.missing_share >= self._min_share]
        if not candidates and self._replace and self._make_room():
            worth = self._grower.candidates()[:1]
        if not worth:
            return 0
        chosen = self._grower.grow(min(len(worth), self._step))
        log.info("the store grows by itself", extra={"num_added": len(chosen), "reason": chosen[0].reason})
        return len(chosen)

    def _make_room(self) -> bool:
        """Give up the least wanted deep expert that may go, if what is missing is worth it."""
        found = self._grower.replacements()
        if found is None or found[0].missing_share < self._min_share:
            return False
        refusal: GrowthError | None = None
        for deep in found[1]:
            try:
                self._grower.shrink([deep.index])
            except GrowthBusyError:
                raise
            except GrowthError as error:  # a profile may need this one, and not the next
                refusal = error
                continue
            log.info("a deep expert goes for one that is wanted more", extra={"index": deep.index})
            return True
        raise refusal or GrowthError("nothing may go")

    def _run(self) -> None:
        wait = self._interval_seconds
        while not self._grower.stopping.wait(wait):
            failures = self._grower.status().num_failures
            try:
                self.look()
                self._grower.wait()
            except GrowthError as error:
                log.warning("the store cannot grow by itself: %s", error)
                failures -= 1
            has_failed = self._grower.status().num_failures > failures
            wait = (
                min(wait * 2, max(MAX_WAIT_SECONDS, self._interval_seconds)) if has_failed else self._interval_seconds
            )
