"""Changing the store of a running server: growing it in the background, shrinking it, reloading changes of others.

Invariant: one change at a time; a running model takes a change between two steps, so that every token is computed under
one mask; files are deleted only when no reader needs them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from expert_store.errors import ManifestError, StoreError
from expert_store.manifest import DeepExpert, Manifest, read_manifest
from expert_store.shrink import without
from expert_store.store import Store
from extractor.errors import TargetError
from extractor.statistics.statistics import ExpertStatistics
from extractor.writing.shrink import shrink_store
from router.mask import ExpertMask
from server.engine.request import EngineStoppedError
from server.errors import ServerError
from server.growth.ranking import (
    NOTHING_LEFT,
    Float,
    check_masks,
    deep_expert_bytes,
    expected_norms,
    rank_held,
    rank_missing,
    score_held,
    within_budget,
)
from server.growth.status import (
    REPLACE_FACTOR,
    Candidate,
    GrowthBusyError,
    GrowthError,
    GrowthSourceError,
    GrowthState,
    GrowthStatus,
    NothingToGrowError,
    Reloaded,
    Shrunk,
    StoreDemand,
)
from server.growth.store import grow_store, unfinished_growth

log = logging.getLogger(__name__)

NICENESS = 10
"""Priority of the thread that extracts, in the OS's terms; serving goes first."""


class _StoppedError(ServerError):
    """The server stops; the next growth uses the files that this one finished."""


class Grower:
    """Grows and shrinks the store of a running server, one change at a time.

    Args:
        store: the store that is served.
        checkpoint: directory or hub name of its source.
        demand_mass: returns a snapshot [L, E] of the demand that ranks deep experts; called on any thread.
        between_steps: runs a function on the engine's thread between two steps and waits for it, as
            `Engine.between_steps(…).result` does.
        adopt_change: `server.growth.store.adopt`, bound to the running model.
        budget_bytes: bound on the size of all shards; None has no bound.
        served: the mask that the server was started with; None is all of the store.
        profiles: masks that requests may name; each keeps at least one expert of every layer.
        find_source: attaches the source checkpoint, if it exists, so that removed experts can be read from it.

    Attributes:
        error: the name of the error of the last growth; None if it succeeded.
        stopping: set by `stop`.
    """

    def __init__(
        self,
        store: Store,
        checkpoint: str,
        demand_mass: Callable[[], Float],
        between_steps: Callable[[Callable[[], None]], None],
        adopt_change: Callable[[], object],
        *,
        budget_bytes: int | None = None,
        statistics: ExpertStatistics | None = None,
        served: ExpertMask | None = None,
        profiles: Mapping[str, ExpertMask] | None = None,
        find_source: Callable[[], object] = lambda: None,
    ) -> None:
        self._store, self._checkpoint = store, checkpoint
        self._demand_mass, self._between_steps, self._adopt = demand_mass, between_steps, adopt_change
        self._budget_bytes, self._statistics = budget_bytes, statistics
        self._served, self._profiles = served, profiles or {}
        self._find_source = find_source
        self._turn = threading.Lock()  # held while a change runs
        self._counting = threading.Lock()
        self.stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._state: GrowthState = "idle"
        self._done_bytes = self._total_bytes = 0
        self._num_growths = self._num_failures = self._num_shrinks = self._grown_bytes = 0
        self.error: str | None = None

    def status(self) -> GrowthStatus:
        """A snapshot; any thread may call it."""
        manifest = self._store.manifest
        return GrowthStatus(
            state=self._state,
            done_bytes=self._done_bytes,
            total_bytes=self._total_bytes,
            error=self.error,
            num_growths=self._num_growths,
            num_failures=self._num_failures,
            num_shrinks=self._num_shrinks,
            grown_bytes=self._grown_bytes,
            num_deep_experts=len(manifest.deep_experts),
            held_bytes=sum(deep.bytes for deep in manifest.deep_experts),
            budget_bytes=self._budget_bytes,
        )

    def candidates(self) -> list[Candidate]:
        """The deep experts to extract next, best first, within the budget."""
        return within_budget(self._missing(self._demand_mass()), self._store.manifest, self._budget_bytes)

    def replacements(self) -> tuple[Candidate, list[DeepExpert]] | None:
        """The best missing deep expert and the ones that it may replace, lowest demand first; None if there are none.

        It may replace those whose demand is less than `1 / REPLACE_FACTOR` of its own.
        """
        demand_mass = self._demand_mass()
        missing = self._missing(demand_mass)
        if not missing:
            return None
        scored = score_held(self._store.manifest, demand_mass, self._statistics)
        worse = [deep for score, deep in scored if score * REPLACE_FACTOR < missing[0].score]
        return (missing[0], worse) if worse else None

    def demand(self) -> StoreDemand:
        """The store's experts and what was wanted of it, for a growth that is decided for several stores."""
        manifest, available = self._store.manifest, self._store.available.copy()
        demand_mass = self._demand_mass()
        return StoreDemand(
            available,
            demand_mass if self._served is None else np.where(self._served.allowed, demand_mass, 0.0),
            expected_norms(self._statistics, available),
            {deep.index: deep.experts for deep in manifest.deep_experts},
            deep_expert_bytes(manifest),
            self.status(),
        )

    def grow(self, count: int, named: Sequence[tuple[int, ...]] = ()) -> list[Candidate]:
        """Start to extract the `count` best candidates, or the `named` deep experts, and return them; `error` names a
        later failure.

        If an earlier growth was interrupted, finish that one instead.

        Raises:
            GrowthError: another change runs, the count is below 1, no candidate is left, a named one has an expert that
                the model or the budget does not allow or that the store has already, or the source is missing.
        """
        if count < 1:
            raise GrowthError(f"growing by {count} deep experts, wanted at least 1: name a larger number")
        if Path(self._checkpoint).is_absolute() and not Path(self._checkpoint).is_dir():
            raise GrowthSourceError(
                "the checkpoint that the store was extracted from is not where it was; say where it is with "
                "`growth.grow_from`"
            )
        self._take_turn("growing")
        try:
            begun, ranked = unfinished_growth(self._store.path), self.candidates()
            num_bytes = deep_expert_bytes(self._store.manifest)
            if named and not begun:
                self._check_named(named, most=len(ranked))
            known = {one.experts: one for one in ranked}
            asked = begun or list(named)
            chosen = [known.get(experts) or Candidate(experts, 0.0, 0.0, num_bytes) for experts in asked]
            chosen = chosen or ranked[:count]
            if not chosen:
                raise NothingToGrowError(NOTHING_LEFT)
            self.error, self._done_bytes = None, 0
            self._total_bytes = num_bytes * len(chosen)
            self._thread = threading.Thread(target=self._run, args=(chosen,), name="grow", daemon=True)
            self._thread.start()
        except BaseException:
            self._end_turn()
            raise
        return chosen

    def shrink(self, indices: Collection[int] | None = None, *, count: int | None = None) -> Shrunk:
        """Remove the deep experts of these indices, or the `count` in least demand. Waits until the model has done so.

        Raises:
            GrowthError: another change runs, too few experts would remain, or the store cannot be written.
        """
        self._take_turn("shrinking")
        try:
            before = self._store.manifest
            if indices is None:
                indices = [
                    deep.index for deep in rank_held(before, self._demand_mass(), self._statistics)[: count or 0]
                ]
            try:
                self._check_masks(without(before, indices))
            except ManifestError as error:
                raise GrowthError(str(error)) from error
            try:
                shrink_store(self._store.path, indices)
            except (ManifestError, TargetError) as error:  # its message names paths of the server
                raise GrowthBusyError(
                    "another process is changing the store, or did not finish: wait for it, or finish it, and reload"
                ) from error
            except OSError as error:
                raise GrowthError(f"the store cannot be written: {error.strerror}") from error
            self._find_source()
            self._take_over()
            with self._counting:
                self._num_shrinks += 1
            removed = tuple(deep for deep in before.deep_experts if deep.index in set(indices))
            log.info("the store shrank", extra={"num_removed": len(removed)})
            return Shrunk(removed, self._store.remove_unnamed())
        finally:
            self._end_turn()

    def reload(self) -> Reloaded:
        """Adopt changes that another process made to the store's directory. Waits until the model has done so.

        Raises:
            GrowthError: another change runs, or the store on disk cannot be used; the old one stays in use.
        """
        self._take_turn("reloading")
        try:
            before = {deep.index for deep in self._store.manifest.deep_experts}
            try:
                self._check_masks(read_manifest(self._store.path))
                self._find_source()
                self._take_over()
            except StoreError as error:
                log.exception("the store on disk cannot be taken over")
                raise GrowthError(
                    "the store on disk cannot be taken over, so what was served stays served; the log says why"
                ) from error
            after = {deep.index for deep in self._store.manifest.deep_experts}
            self._store.remove_unnamed()
            return Reloaded(len(after - before), len(before - after), len(after))
        finally:
            self._end_turn()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the running growth, if there is one."""
        if self._thread is not None:
            self._thread.join(seconds)

    def stop(self) -> None:
        """Interrupt the running growth soon; the next growth finishes it."""
        self.stopping.set()

    def _missing(self, wanted: Float) -> list[Candidate]:
        if self._served is not None:
            wanted = np.where(self._served.allowed, wanted, 0.0)
        num_bytes = deep_expert_bytes(self._store.manifest)
        return rank_missing(self._store.available, wanted, num_bytes, self._statistics)

    def _check_named(self, named: Sequence[tuple[int, ...]], most: int) -> None:
        available = self._store.available.copy()
        num_layers, num_experts = available.shape
        if len(named) > most:
            raise NothingToGrowError(
                f"{len(named)} deep experts were named, and there is room for {most}: name fewer, raise "
                "the budget, or remove deep experts first"
            )
        for experts in named:
            if len(experts) != num_layers or not all(0 <= expert < num_experts for expert in experts):
                raise GrowthError(
                    f"a deep expert to add is {list(experts)}, wanted one expert from 0 to {num_experts - 1} for "
                    f"each of {num_layers} layers"
                )
            for layer, expert in enumerate(experts):
                if available[layer, expert]:
                    raise GrowthError(
                        f"expert {expert} of layer {layer} is in the store, or was named twice: name missing ones, as "
                        "GET /experts/plan does"
                    )
                available[layer, expert] = True

    def _take_turn(self, state: GrowthState) -> None:
        if not self._turn.acquire(blocking=False):
            raise GrowthBusyError(f"the store is already {self._state}: wait until that is done")
        self._state = state

    def _end_turn(self) -> None:
        self._state = "idle"
        self._turn.release()

    def _take_over(self) -> None:
        self._between_steps(lambda: _ignore(self._adopt()))

    def _check_masks(self, left: Manifest) -> None:
        check_masks(left, self._store.available, self._served, self._profiles)

    def _run(self, chosen: list[Candidate]) -> None:
        try:
            _lower_priority()
            added = [candidate.experts for candidate in chosen]
            num_bytes = grow_store(self._store.path, self._checkpoint, added, self._count)
            self._state = "adopting"
            self._take_over()
            with self._counting:
                self._num_growths += 1
                self._grown_bytes += num_bytes
            log.info("the store grew", extra={"num_added": len(added), "num_bytes": num_bytes})
        except _StoppedError:
            log.info("a growth was interrupted; the next one finishes it")
        except EngineStoppedError:
            log.info("the store grew while the server ended; the next one has it from the start")
        except Exception as error:
            self.error = type(error).__name__
            with self._counting:
                self._num_failures += 1
            log.exception("growing %s failed; what was served stays served", self._store.path)
        finally:
            self._end_turn()

    def _count(self, num_bytes: int) -> None:
        if self.stopping.is_set():
            raise _StoppedError
        with self._counting:
            self._done_bytes += num_bytes


def _ignore(value: object) -> None:
    del value


def _lower_priority() -> None:
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError:  # a container may forbid it; then extraction has the same priority as serving
            log.debug("the priority of the growing thread cannot be lowered", exc_info=True)
