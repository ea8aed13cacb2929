"""The phases of loading a model, and the share of all loading that is done, which never falls.

A phase's weight is its expected time in seconds: its bytes at a typical rate, or a measured time if it moves no bytes.
When a phase begins, it gets its part, by weight, of the remaining share. So a skipped phase, or a second load on
another path, makes the share rise faster or slower, never fall. This module is used before torch is imported, so it
imports nothing slow.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import StrEnum

from expert_store.manifest import Manifest


class Phase(StrEnum):
    """One part of loading, as users read it."""

    STARTING = "starting torch and transformers"
    OPENING = "opening the store"
    PROVING = "trying the captured step out"
    TRUNK = "loading the trunk"
    READING = "reading experts"
    SLOTS = "filling slots"
    COMPILING = "compiling kernels"
    CAPTURING = "capturing decode"
    WARMING = "warming up"
    SOURCE = "looking for the checkpoint"


Progress = Callable[[Phase, float], None]
"""Called with the phase under way and the share of that phase that is done, in [0, 1]."""

DEVICE_PHASES = frozenset({Phase.PROVING, Phase.READING, Phase.COMPILING, Phase.CAPTURING, Phase.WARMING})
"""Phases of the device-driven path alone."""

READ_BYTES_PER_SECOND = 1e9
UNKNOWN_SECONDS = 0.1
"""The weight of a phase that has none of its own."""


def load_weights(manifest: Manifest, num_slots: int | None = None) -> dict[Phase, float]:
    """The expected seconds of each phase, in order.

    Args:
        num_slots: slots of each layer; None is one for every expert of the store.
    """
    trunk_bytes = sum(file.bytes for file in manifest.trunk)
    experts_bytes = sum(deep.bytes for deep in manifest.deep_experts)
    if num_slots is not None:
        experts_bytes = experts_bytes * min(num_slots, len(manifest.deep_experts)) // len(manifest.deep_experts)
    return {
        Phase.STARTING: 5.0,
        Phase.OPENING: UNKNOWN_SECONDS,
        Phase.PROVING: 2.0,
        Phase.TRUNK: 1.0 + trunk_bytes / READ_BYTES_PER_SECOND,
        Phase.READING: experts_bytes / READ_BYTES_PER_SECOND,
        Phase.SLOTS: UNKNOWN_SECONDS + experts_bytes / READ_BYTES_PER_SECOND,
        Phase.COMPILING: 20.0,
        Phase.CAPTURING: 3.0,
        Phase.WARMING: 3.0,
        Phase.SOURCE: UNKNOWN_SECONDS,
    }


class LoadProgress:
    """A `Progress` that combines all phases into one share. One thread at a time reports; any thread reads.

    Args:
        weights: seconds of the expected phases, in order; see `expect`.
        on_change: called after every report.

    Attributes:
        share: the done share of all loading, in [0, 1].
        phase: the current phase; None before the first.
    """

    def __init__(
        self,
        weights: Mapping[Phase, float] | None = None,
        on_change: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        self._on_change = on_change
        self._start = self._end = 0.0
        self.share = 0.0
        self.phase: Phase | None = None
        self.expect(weights or {})

    def expect(self, weights: Mapping[Phase, float]) -> None:
        """Set the expected phases, in order, with their seconds; call it before the first report."""
        self._weights = dict(weights)
        self._order = {phase: place for place, phase in enumerate(weights)}

    def leave_out(self, phases: Collection[Phase]) -> None:
        """Remove these phases from the expected ones."""
        for phase in phases:
            self._weights.pop(phase, None)

    def __call__(self, phase: Phase, share: float) -> None:
        """Report that `share` of `phase`, in [0, 1], is done."""
        if phase != self.phase:
            self._begin(phase)
        done = self._start + (self._end - self._start) * min(max(share, 0.0), 1.0)
        self.share = max(self.share, done)
        self._on_change(self)

    def _begin(self, phase: Phase) -> None:
        before = -1 if self.phase is None else self._order.get(self.phase, -1)
        place = self._order.get(phase, before)
        if place >= before:
            self.share = self._end  # the phase before is done, even if it did not report it
        weight = self._weights.get(phase, UNKNOWN_SECONDS)
        later = sum(weight for other, weight in self._weights.items() if self._order[other] > place)
        self.phase, self._start = phase, self.share
        self._end = self._start + (1.0 - self._start) * weight / (weight + later)
