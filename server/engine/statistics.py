"""Statistics of calibration, collected while serving from a sample of steps: norms of outputs, co-activation, windows.

Invariant: collecting takes at most `MAX_SHARE` of the time of steps. Its time is measured, and a step is observed only
while the share is kept. Everything is added to one domain, `DOMAIN`. Tokens of requests with a router temperature are
left out. Under a mask the served experts are collected, and demand is that of hidden states that have drifted. Captured
steps do not show the experts' outputs: norms come from prompts there, co-activation and windows from demand.
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
"""Of the time that steps take, for collecting, as far as it can be timed where it happens. With what cannot, such as
caches that are colder afterwards, the whole cost stays below 2 %: `benchmarks/choosing/online_statistics.py`."""
FLUSH_TOKENS = 256
"""Tokens that are added to the totals together: one by one would cost many times as much."""
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
        observer: notes outputs; None where they cannot be seen, and only what was wanted is collected.

    Attributes:
        spent_seconds, served_seconds: on collecting and on steps, since start.
        num_observed_tokens: in the totals or about to be.
    """

    def __init__(self, file: StatisticsFile, observer: OutputObserver | None) -> None:
        self._file = file
        self._statistics = file.statistics
        self._observer = observer
        self._pending: list[_Tokens] = []
        self._num_pending = 0
        self._windows: list[npt.NDArray[np.float32]] = []
        self._watched: weakref.ref[Sequence] | None = None  # a sequence that ended is not kept for it
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
        """The step took `seconds`, with what was spent on collecting in it. Saves now and then."""
        self.served_seconds += seconds
        if self._observer is not None:
            self._observer.is_on = False
        self.save_if_due()

    def save_if_due(self) -> None:
        """Begin to save when the file's interval has passed and there is something new."""
        if self._file.is_due:
            self.flush()
            started = time.perf_counter()
            self._file.save()
            self._own_seconds += time.perf_counter() - started

    def close(self) -> None:
        """Save what was collected."""
        self.flush()
        self._file.close()

    def add(self, output: StepOutput, sequences: Items[Sequence]) -> None:
        """Take in a step over as many tokens of each of the sequences."""
        started = time.perf_counter()
        if self._is_due:
            self._observe(output, sequences)
        if output.record.served_index.shape[1] == len(sequences):
            self._watch(output.record, sequences)
        else:
            self._cut_windows(output.record, sequences)
        self._own_seconds += time.perf_counter() - started

    def flush(self) -> ExpertStatistics:
        """Add what is pending to the totals; returns the statistics, which further calls change."""
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
            record = StepRecord(record.served_index, record.served_weight)  # masks that hid nothing that was wanted
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
        """Fresh ones: samples keep the smallest keys, so random keys make them even over all time."""
        return self._random.integers(0, 1 << 63, size=count).astype(np.uint64)

    # -- windows -------------------------------------------------------------------------------------------------------

    def _watch(self, record: StepRecord, sequences: Items[Sequence]) -> None:
        """Follow one sequence for a window of tokens, then the next."""
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
        """The windows of a chunk of one prompt, in observed steps alone."""
        num_windows = record.served_index.shape[1] // WINDOW_TOKENS
        if self._is_due and num_windows and sequences[0].request.router_temperature == 1.0:
            self._add_windows(*record.demand_of(slice(0, num_windows * WINDOW_TOKENS)))

    def _add_windows(self, index: npt.NDArray[np.int64], weight: npt.NDArray[np.float32]) -> None:
        """Windows of wanted mass from index and weight [L, W · WINDOW_TOKENS, K]."""
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
    """A collector of what a runner does; of what is wanted alone, where no experts show what they put out."""
    model = runner.model
    model.observer = observe_outputs(model.model, model.num_layers)
    if model.observer is None:
        log.info(
            "statistics are of what is wanted alone: the %s-driven path does not show the experts' outputs",
            runner.decode_path,
        )
    return OnlineStatistics(file, model.observer)


def empty_statistics(manifest: Manifest) -> ExpertStatistics:
    """Statistics of a store's checkpoint with nothing in them."""
    model = manifest.model
    return ExpertStatistics(
        manifest.source.fingerprint,
        model.num_layers,
        model.num_experts,
        model.top_k,
        expert_bytes=sum(spec.span_bytes for spec in manifest.layers),
        trunk_bytes=sum(file.bytes for file in manifest.trunk),
    )
