"""Growing a store while it serves: what to extract next, extracting it, and taking it into use.

The router sees every expert's score, so demand for experts that the store lacks is known exactly; only their output
norm is not, and the layer's median stands in for it unless statistics say. Invariant: a store only grows by whole deep
experts, each of the best missing expert of every layer; a running model takes them between two steps, so that every
token is computed under one mask, before or after.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expert_store.manifest import read_manifest
from expert_store.store import Store
from extractor.checkpoint import resolve_checkpoint
from extractor.plan import Plan, PlannedExpert, write_plan
from extractor.prepare import prepare
from extractor.selection import SelectionRequest
from extractor.statistics import ExpertStatistics
from router.ledger import UsageLedger
from router.mask import ExpertMask
from server.growth_errors import GrowthError
from server.model.routing import StepRouting

log = logging.getLogger(__name__)

Float = npt.NDArray[np.float64]
NICENESS = 10
"""Priority of the thread that extracts, in the OS's terms; serving goes first."""


@dataclass(frozen=True)
class Candidate:
    """A deep expert that the store could have.

    Attributes:
        experts: of each layer.
        score: wanted and missing mass × expected output norm ÷ byte.
        missing_share: of all demanded mass, that these experts would serve.
        num_bytes: that it would take.
    """

    experts: tuple[int, ...]
    score: float
    missing_share: float
    num_bytes: int

    @property
    def reason(self) -> str:
        """Why, in words."""
        return f"{self.missing_share:.2%} of the router mass asked for its experts and could not have them"


def expected_norms(statistics: ExpertStatistics | None, available: npt.NDArray[np.bool_]) -> Float:
    """Mean output norm of each expert, float64 [L, E]: measured, or the layer's median, or 1 where nothing is known."""
    if statistics is None:
        return np.ones(available.shape)
    picks = statistics.total("picks")
    means: Float = np.divide(statistics.total("output_norm"), picks, out=np.full(picks.shape, np.nan), where=picks > 0)
    for row in means:
        row[np.isnan(row)] = np.nanmedian(row) if np.isfinite(row).any() else 1.0
    return means


def rank_missing(
    available: npt.NDArray[np.bool_],
    demand_mass: Float,
    num_bytes: int,
    statistics: ExpertStatistics | None = None,
) -> list[Candidate]:
    """Deep experts that the store lacks, best first; none when it has all.

    Args:
        available, demand_mass: [L, E], what the store has and what the unmasked router wanted.
        num_bytes: of a deep expert.
    """
    missing = np.where(available, 0.0, demand_mass)
    worth = np.where(available, -np.inf, missing * expected_norms(statistics, available))
    order = np.argsort(-worth, axis=1, kind="stable")
    layers = np.arange(len(available))
    demanded = max(float(demand_mass.sum()), np.finfo(np.float64).tiny)
    candidates = []
    for place in range(int((~available).sum(axis=1).min())):
        experts = order[:, place]
        candidates.append(
            Candidate(
                experts=tuple(int(expert) for expert in experts),
                score=float(worth[layers, experts].sum()) / max(num_bytes, 1),
                missing_share=float(missing[layers, experts].sum()) / demanded,
                num_bytes=num_bytes,
            )
        )
    return candidates


def grow_store(
    store: Path, checkpoint: str, added: list[tuple[int, ...]], on_bytes: Callable[[int], None] = lambda count: None
) -> int:
    """Extract deep experts into a finished store; returns how many bytes were written. A reader may have it open.

    Args:
        checkpoint: directory or hub name of the store's source.
        added: for each new deep expert the expert of every layer.

    Raises:
        GrowthError: nothing to add. ExtractError: see `extractor.prepare`. StoreError: no store.
    """
    if not added:
        raise GrowthError("there is nothing to grow by: the store has every expert that was asked for")
    manifest = read_manifest(store)
    held = [deep.experts for deep in manifest.deep_experts]
    plan = Plan(
        manifest.model.num_layers,
        manifest.model.num_experts,
        {"kind": "grown"},
        tuple(PlannedExpert(tuple(experts)) for experts in (*held, *added)),
    )
    with tempfile.TemporaryDirectory(prefix="deepfew-grow-") as folder:
        path = Path(folder) / "plan.json"
        write_plan(path, plan)
        work = prepare(resolve_checkpoint(checkpoint), store, SelectionRequest(plan=path))
        work.check_disk()
        num_bytes = work.remaining_bytes
        work.run(on_bytes)
    return num_bytes


def wanted_growth(
    store: Path, usage: Path, statistics: ExpertStatistics | None, budget_bytes: int | None, count: int
) -> tuple[list[Candidate], str]:
    """The `count` best candidates of a store on disk from its usage file, and where its checkpoint lay.

    Raises:
        GrowthError: nothing to grow by, or usage of another checkpoint.
        LedgerError: no usage file. StoreError: no store.
    """
    manifest = read_manifest(store)
    ledger = UsageLedger.load(usage)
    if ledger.fingerprint != manifest.source.fingerprint:
        raise GrowthError(f"{usage} is of checkpoint {ledger.fingerprint}, the store of {manifest.source.fingerprint}")
    available = np.zeros(ledger.demand_mass.shape, dtype=np.bool_)
    for deep in manifest.deep_experts:
        available[np.arange(len(deep.experts)), list(deep.experts)] = True
    num_bytes = sum(spec.span_bytes for spec in manifest.layers)
    held = sum(deep.bytes for deep in manifest.deep_experts)
    chosen = _within(rank_missing(available, ledger.demand_mass, num_bytes, statistics), held, budget_bytes)[:count]
    if not chosen:
        raise GrowthError("the store has every expert, or its byte budget holds no more")
    return chosen, manifest.source.location


def _within(ranked: list[Candidate], held_bytes: int, budget_bytes: int | None) -> list[Candidate]:
    if budget_bytes is None or not ranked:
        return ranked
    return ranked[: max(0, (budget_bytes - held_bytes) // max(ranked[0].num_bytes, 1))]


def adopt(store: Store, routing: StepRouting, served: ExpertMask | None) -> bool:
    """Take what a store has grown by into use; call between two steps. Returns whether there was anything.

    Args:
        served: the mask that the server was started with; None is all of the store.

    Raises:
        ManifestError, ShardCorruptError: the new manifest cannot be used; the old one stays in force.
    """
    if not store.reload():
        return False
    available = ExpertMask.of(store.available)
    routing.set_mask(available if served is None else available & served)
    return True


class Grower:
    """Grows the store of a running server in the background, at most one growth at a time.

    Args:
        store: that is being served.
        checkpoint: directory or hub name of its source.
        demand_mass: a snapshot [L, E] of what was wanted so far; called on the growing thread.
        between_steps: runs a function on the engine's thread between two steps and waits for it, as
            `Engine.between_steps(…).result` does.
        adopt_growth: see `adopt`, bound to the running model.
        budget_bytes: of all shards; None has no bound.
    """

    def __init__(
        self,
        store: Store,
        checkpoint: str,
        demand_mass: Callable[[], Float],
        between_steps: Callable[[Callable[[], None]], None],
        adopt_growth: Callable[[], object],
        *,
        budget_bytes: int | None = None,
        statistics: ExpertStatistics | None = None,
    ) -> None:
        self._store, self._checkpoint = store, checkpoint
        self._demand_mass, self._between_steps, self._adopt = demand_mass, between_steps, adopt_growth
        self._budget_bytes, self._statistics = budget_bytes, statistics
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.error: str | None = None

    @property
    def is_growing(self) -> bool:
        """Whether a growth is under way."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def candidates(self) -> list[Candidate]:
        """What to extract next, best first, as far as the budget allows."""
        manifest = self._store.manifest
        num_bytes = sum(spec.span_bytes for spec in manifest.layers)
        ranked = rank_missing(self._store.available, self._demand_mass(), num_bytes, self._statistics)
        return _within(ranked, sum(deep.bytes for deep in manifest.deep_experts), self._budget_bytes)

    def grow(self, count: int) -> list[Candidate]:
        """Start extracting the `count` best candidates and return them; `error` says later if it failed.

        Raises:
            GrowthError: a growth is under way, the count is below 1, or there is nothing (more) to grow by.
        """
        if count < 1:
            raise GrowthError(f"growing by {count} deep experts, wanted at least 1")
        with self._lock:
            if self.is_growing:
                raise GrowthError("the store is already growing: wait until that is done")
            chosen = self.candidates()[:count]
            if not chosen:
                raise GrowthError("the store has every expert, or its byte budget holds no more")
            self.error = None
            self._thread = threading.Thread(target=self._run, args=(chosen,), name="grow", daemon=True)
            self._thread.start()
        return chosen

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the growth under way, if there is one."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, chosen: list[Candidate]) -> None:
        try:
            _lower_priority()
            grow_store(self._store.path, self._checkpoint, [candidate.experts for candidate in chosen])
            self._between_steps(lambda: _ignore(self._adopt()))
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            log.exception("growing %s failed; what was served stays served", self._store.path)


def _ignore(value: object) -> None:
    del value


def _lower_priority() -> None:
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        except OSError:  # a container may forbid it; extracting is then merely not polite
            log.debug("the priority of the growing thread cannot be lowered", exc_info=True)
