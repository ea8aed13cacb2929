"""How far loading is: one share over all of its phases, which never falls.

A phase weighs the seconds that it is likely to take: the bytes that it moves at a plausible rate, or what was seen
where it moves none. It gets, of what is left when it begins, the part that its weight has among the phases that may
still come. So a phase that is left out, or loading that begins anew on another path, makes the share jump or slow down.
Phases have the names that `server.model` gives what it does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from expert_store.manifest import Manifest

STARTING = "starting torch and transformers"
OPENING = "opening the store"
TRUNK = "loading the trunk"
READING = "reading experts"
PINNING = "pinning host memory"
SLOTS = "filling slots"
SOURCE = "looking for the checkpoint"
COMPILING = "compiling kernels"
CAPTURING = "capturing decode"
TRYING = "trying the captured step out"
WARMING = "warming up"
DEVICE_PHASES = (READING, PINNING, COMPILING, CAPTURING, TRYING, WARMING)
"""Of the device-driven path alone."""

READ_BYTES_PER_SECOND = 1e9
PIN_BYTES_PER_SECOND = 4e9
UNKNOWN_SECONDS = 0.1
"""Of a phase that has no weight."""


def load_weights(manifest: Manifest, num_slots: int | None = None) -> dict[str, float]:
    """Likely seconds of each phase, in order.

    Args:
        num_slots: a layer; None is one for every expert of the store.
    """
    trunk_bytes = sum(file.bytes for file in manifest.trunk)
    experts_bytes = sum(deep.bytes for deep in manifest.deep_experts)
    if num_slots is not None:
        experts_bytes = experts_bytes * min(num_slots, len(manifest.deep_experts)) // len(manifest.deep_experts)
    return {
        STARTING: 5.0,
        OPENING: UNKNOWN_SECONDS,
        TRUNK: 1.0 + trunk_bytes / READ_BYTES_PER_SECOND,
        READING: experts_bytes / READ_BYTES_PER_SECOND,
        PINNING: experts_bytes / PIN_BYTES_PER_SECOND,
        SLOTS: UNKNOWN_SECONDS + experts_bytes / READ_BYTES_PER_SECOND,
        COMPILING: 20.0,
        CAPTURING: 3.0,
        TRYING: 2.0,
        WARMING: 3.0,
        SOURCE: UNKNOWN_SECONDS,
    }


class LoadProgress:
    """Makes one share of phases and the shares of each.

    Args:
        weights: of the phases, in the order in which they come.

    Attributes:
        share: done of everything, in [0, 1].
        phase: the one under way; empty before the first.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._order = {phase: place for place, phase in enumerate(weights)}
        self._start = self._end = 0.0
        self.share = 0.0
        self.phase = ""

    def leave_out(self, phases: Collection[str]) -> None:
        """These are not going to come."""
        for phase in phases:
            self._weights.pop(phase, None)

    def at(self, phase: str, share: float) -> float:
        """`share` of a phase, in [0, 1], is done; returns the share of everything."""
        if phase != self.phase:
            self._begin(phase)
        done = self._start + (self._end - self._start) * min(max(share, 0.0), 1.0)
        self.share = max(self.share, done)
        return self.share

    def _begin(self, phase: str) -> None:
        before = self._order.get(self.phase, -1)
        place = self._order.get(phase, before)
        if place >= before:
            self.share = self._end  # the one before is done, whether it said so or not
        weight = self._weights.get(phase, UNKNOWN_SECONDS)
        later = sum(weight for other, weight in self._weights.items() if self._order[other] > place)
        self.phase, self._start = phase, self.share
        self._end = self._start + (1.0 - self._start) * weight / (weight + later)
