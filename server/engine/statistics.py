"""Statistics of calibration, collected while serving from a sample of steps: norms of outputs, co-activation, windows.

Invariant: collecting takes at most `MAX_SHARE` of the time of steps. The time is measured, and a step is observed only
while the share is below that. All tokens are added to one domain, `DOMAIN`, except those of requests with a router
temperature. Under a mask the served experts are counted, and demand is computed from hidden states that the mask has
changed. Captured steps do not give the experts' outputs: there, norms come from prompts, co-activation and windows from
demand.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expert_store.manifest import Manifest
from extractor.statistics.statistics import WINDOW_TOKENS, ExpertStatistics
from router.ledger import StepRecord
from server.engine.sequence import Sequence
from server.engine.snapshots import StatisticsFile
from server.engine.token_statistics import add_tokens, window_masses
from server.model.runner import Runner, StepOutput
from server.model.seam.observation import ExpertOutputs, OutputObserver, observe_outputs

log = logging.getLogger(__name__)

DOMAIN = "served"
MAX_SHARE = 0.0075
"""Share of the steps' time that collecting may take, as measured on the engine thread. With the costs that cannot be
measured there, such as colder caches, the total stays below 2 %: `benchmarks/choosing/online_statistics.py`."""
FLUSH_TOKENS = 256
"""Tokens that are added to the totals together; adding them one by one would take many times as long."""
FLUSH_WINDOWS = 8

Window = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]


@dataclass
class _Tokens:
    """Observed tokens, [L, T, K] and [L, T]; `outputs` is None where only routing is known."""

    record: StepRecord
    outputs: ExpertOutputs | None


class OnlineStatistics:
    """Collects from the steps of an engine; its thread alone calls it.

    Args:
        file: keeps the statistics that are added to.
        observer: records the norms of outputs; None if the runner does not give outputs; then only demand is collected.

    Attributes:
        spent_seconds, served_seconds: on collecting and on steps, since start.
        num_observed_tokens: tokens in the totals or pending.
    """

    def __init__(self, file: StatisticsFile, observer: OutputObserver | None) -> None:
        self._file = file
        self._statistics = file.statistics
        self._observer = observer
        self._pending: list[_Tokens] = []
        self._num_pending = 0
        self._windows: list[npt.NDArray[np.float32]] = []
        self._watched: weakref.ref[Sequence] | None = None  # weak: an ended sequence must be freed
        self._window: Window = []
        self._random = np.random.default_rng()
        self._is_due = False
        self._own_seconds = 0.0
        self.served_seconds = 0.0
        self.num_observed_tokens = 0

    @property
    def spent_seconds(self) -> float:
        """Seconds of the engine's thread that collecting took."""
        return self._own_seconds + (0.0 if self._observer is None else self._observer.seconds)

    def begin_step(self) -> None:
        """Decide whether the step about to begin is observed."""
        self._is_due = self.spent_seconds <= MAX_SHARE * self.served_seconds
        if self._observer is not None:
            self._observer.is_on = self._is_due

    def end_step(self, seconds: float) -> None:
        """Count a step that took `seconds`, collecting included. Saves at intervals."""
        self.served_seconds += seconds
        if self._observer is not None:
            self._observer.is_on = False
        self.save_if_due()

    def save_if_due(self) -> None:
        """Begin to save if the file's interval has passed and the statistics have changed."""
        if self._file.is_due:
            self.flush()
            started = time.perf_counter()
            self._file.save()
            self._own_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Save the collected statistics."""
        self.flush()
        self._file.close()

    def add(self, output: StepOutput, sequences: Items[Sequence]) -> None:
        """Add a step over the same number of tokens of each sequence."""
        started = time.perf_counter()
        if self._is_due:
            self._observe(output, sequences)
        if output.record.served_index.shape[1] == len(sequences):
            self._watch(output.record, sequences)
        else:
            self._cut_windows(output.record, sequences)
        self._own_seconds += time.perf_counter() - started

    def flush(self) -> ExpertStatistics:
        """Add the pending tokens to the totals; returns the statistics, which later calls change."""
        started = time.perf_counter()
        kinds: dict[tuple[bool, bool], list[_Tokens]] = {}
        for part in self._pending:
            kinds.setdefault((part.record.demand_index is None, part.outputs is None), []).append(part)
        for parts in kinds.values():
            self._add_to_totals(parts)
        self._pending, self._num_pending = [], 0
        self._offer_windows()
        self._own_seconds += time.perf_counter() - started
        return self._statistics

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _observe(self, output: StepOutput, sequences: Items[Sequence]) -> None:
        record, outputs = output.record, output.outputs
        chosen = [at for at, sequence in enumerate(sequences) if sequence.request.router_temperature == 1.0]
        if not chosen:
            return
        if len(chosen) < len(sequences):
            record = record.select(chosen)
            outputs = None if outputs is None else outputs.select(chosen)
        if record.missed_mass is not None and not record.missed_mass.any():
            record = StepRecord(record.served_index, record.served_weight)  # the masks hid no demanded expert
        self._pending.append(_Tokens(record, outputs))
        num_tokens = record.served_index.shape[1]
        self._num_pending += num_tokens
        self.num_observed_tokens += num_tokens
        if self._num_pending >= FLUSH_TOKENS:
            self.flush()

    def _add_to_totals(self, parts: list[_Tokens]) -> None:
        record = StepRecord.concat([part.record for part in parts])
        noted = [part.outputs for part in parts if part.outputs is not None]
        outputs = ExpertOutputs.concat(noted) if len(noted) == len(parts) else None
        add_tokens(self._statistics, DOMAIN, record, outputs, self._keys(record.served_index.shape[1]))

    def _keys(self, count: int) -> npt.NDArray[np.uint64]:
        """Random keys: a sample keeps the smallest keys, so it is uniform over the whole time of serving."""
        return self._random.integers(0, 1 << 63, size=count).astype(np.uint64)

    # -- windows -------------------------------------------------------------------------------------------------------

    def _watch(self, record: StepRecord, sequences: Items[Sequence]) -> None:
        """Collect one window of tokens from one sequence, then from the next."""
        watched = None if self._watched is None else self._watched()
        at = next((at for at, sequence in enumerate(sequences) if sequence is watched), None)
        if at is None:
            at = int(self._random.integers(len(sequences)))
            self._watched, self._window = weakref.ref(sequences[at]), []
        if sequences[at].request.router_temperature != 1.0:
            self._watched = None
            return
        self._window.append(record.demand_of(slice(at, at + 1)))
        if len(self._window) == WINDOW_TOKENS:
            index, weight = (np.concatenate([pair[side] for pair in self._window], axis=1) for side in (0, 1))
            self._add_windows(index, weight)
            self._watched = None

    def _cut_windows(self, record: StepRecord, sequences: Items[Sequence]) -> None:
        """Add the windows of a chunk of one prompt; called only for observed steps."""
        num_windows = record.served_index.shape[1] // WINDOW_TOKENS
        if self._is_due and num_windows and sequences[0].request.router_temperature == 1.0:
            self._add_windows(*record.demand_of(slice(0, num_windows * WINDOW_TOKENS)))

    def _add_windows(self, index: npt.NDArray[np.int64], weight: npt.NDArray[np.float32]) -> None:
        """Add windows of demanded mass from index and weight [L, W · WINDOW_TOKENS, K]."""
        self._windows += list(window_masses(index, weight, self._statistics.num_experts))
        if len(self._windows) >= FLUSH_WINDOWS:
            self._offer_windows()

    def _offer_windows(self) -> None:
        if self._windows:
            keys = self._keys(len(self._windows))
            domain = np.full(len(keys), self._statistics.domain_index(DOMAIN))
            self._statistics.windows.offer(keys, domain, {"mass": np.stack(self._windows)})
            self._windows = []


def collect_from(runner: Runner, file: StatisticsFile) -> OnlineStatistics:
    """Make the collector for a runner; it collects demand alone if the experts do not give their outputs."""
    model = runner.model
    model.observer = observe_outputs(model.model, model.num_layers)
    if model.observer is None:
        log.info(
            "statistics are of what is wanted alone: the %s-driven path does not show the experts' outputs",
            runner.decode_path,
        )
    return OnlineStatistics(file, model.observer)


def empty_statistics(manifest: Manifest) -> ExpertStatistics:
    """Empty statistics for a store's checkpoint."""
    model = manifest.model
    return ExpertStatistics(
        manifest.source.fingerprint,
        model.num_layers,
        model.num_experts,
        model.top_k,
        expert_bytes=max(deep.bytes for deep in manifest.deep_experts),
        trunk_bytes=sum(file.bytes for file in manifest.trunk),
    )
