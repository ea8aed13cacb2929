"""The usage ledger: the experts that routing demanded and those that were served, for every layer and expert.

Two ledgers of the same checkpoint can be added, so the ledger continues after a restart from `usage.json`, and the
ledgers of many servers can be merged. *Demand* is the unmasked choice (the output of transformers' router), *served*
are the computed experts. The *deficit* is the share of demanded router mass that was not available. One thread writes;
any thread may take a snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from router.errors import LedgerError

FORMAT = "deepfew-usage"
VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 did not count tokens whose most demanded expert was missing; they are read as 0."""
MAX_FILE_BYTES = 256 << 20
_ARRAYS = ("served_count", "served_mass", "demand_count", "demand_mass")


@dataclass(frozen=True)
class StepRecord:
    """The routing of one step, over T tokens.

    Attributes:
        served_index: int64 [L, T, K]; ids ≥ E (the sentinel) are picks that do not exist.
        served_weight: float [L, T, K].
        demand_index, demand_weight: the same of the unmasked choice; None if nothing was masked (demand = served).
        missed_mass: float [L], demanded mass that was unavailable; None if nothing was masked.
    """

    served_index: npt.NDArray[np.int64]
    served_weight: npt.NDArray[np.float32]
    demand_index: npt.NDArray[np.int64] | None = None
    demand_weight: npt.NDArray[np.float32] | None = None
    missed_mass: npt.NDArray[np.float64] | None = None

    def select(self, tokens: Sequence[int]) -> StepRecord:
        """The step's routing of some of its tokens, in the order given; `missed_mass` stays that of the whole step."""
        return replace(
            self,
            served_index=self.served_index[:, tokens],
            served_weight=self.served_weight[:, tokens],
            demand_index=None if self.demand_index is None else self.demand_index[:, tokens],
            demand_weight=None if self.demand_weight is None else self.demand_weight[:, tokens],
        )

    @staticmethod
    def concat(records: Sequence[StepRecord]) -> StepRecord:
        """Join the routing of several steps, as if it were one step over all their tokens."""
        served = (
            np.concatenate([record.served_index for record in records], axis=1),
            np.concatenate([record.served_weight for record in records], axis=1),
        )
        if all(record.demand_index is None for record in records):
            return StepRecord(*served)
        demand = [record.demand_of(slice(None)) for record in records]
        return StepRecord(
            *served,
            np.concatenate([index for index, _ in demand], axis=1),
            np.concatenate([weight for _, weight in demand], axis=1),
            np.sum([record.missed_mass for record in records if record.missed_mass is not None], axis=0),
        )

    @property
    def top1_missing(self) -> npt.NDArray[np.bool_] | None:
        """Bool [L, T]: whether the most demanded expert of a token was not served; None if nothing was masked."""
        if self.demand_index is None or self.demand_weight is None:
            return None
        first = self.demand_weight.argmax(axis=2)[:, :, None]
        wanted = np.take_along_axis(self.demand_index, first, axis=2)  # [L, T, 1]
        return np.asarray((self.served_index != wanted).all(axis=2))

    def demand_of(self, tokens: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The demand of some of the tokens, index and weight [L, T', K]."""
        if self.demand_index is None or self.demand_weight is None:
            return self.served_index[:, tokens], self.served_weight[:, tokens]
        return self.demand_index[:, tokens], self.demand_weight[:, tokens]

    def demand_mass_of(self, tokens: slice, num_experts: int) -> npt.NDArray[np.float64]:
        """Router mass [L, E] that some of the tokens demanded of each expert."""
        return sum_by_expert(*self.demand_of(tokens), num_experts)


class UsageLedger:
    """Counts and router mass per (layer, expert).

    Args:
        num_layers, num_experts: L and E.
        fingerprint: identifies the source checkpoint; ledgers of different checkpoints cannot be merged.

    Attributes:
        served_count, demand_count: int64 [L, E], times an expert was computed, times it was demanded.
        served_mass, demand_mass: float64 [L, E], sums of the gate weights of those.
        missed_mass: float64 [L], demanded mass that was unavailable.
        top1_missing: int64 [L], tokens whose most demanded expert of the layer was missing.
        num_tokens: routed tokens; top1_missing_tokens: those whose most demanded expert was missing in any layer.
    """

    def __init__(self, num_layers: int, num_experts: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        shape = (num_layers, num_experts)
        self.served_count = np.zeros(shape, dtype=np.int64)
        self.served_mass = np.zeros(shape, dtype=np.float64)
        self.demand_count = np.zeros(shape, dtype=np.int64)
        self.demand_mass = np.zeros(shape, dtype=np.float64)
        self.missed_mass = np.zeros(num_layers, dtype=np.float64)
        self.top1_missing = np.zeros(num_layers, dtype=np.int64)
        self.num_tokens = 0
        self.top1_missing_tokens = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.served_count.shape[1])

    @property
    def deficit_per_layer(self) -> npt.NDArray[np.float64]:
        """Missing share of the demanded mass, [L], 0 if nothing was demanded yet."""
        demanded = self.demand_mass.sum(axis=1)
        deficit = np.zeros_like(self.missed_mass)
        np.divide(self.missed_mass, demanded, out=deficit, where=demanded > 0)
        return deficit

    @property
    def deficit(self) -> float:
        """Missing share of the demanded mass over all layers."""
        demanded = float(self.demand_mass.sum())
        return float(self.missed_mass.sum()) / demanded if demanded else 0.0

    def add(self, record: StepRecord) -> None:
        """Add one step."""
        self.num_tokens += record.served_index.shape[1]
        _accumulate(self.served_count, self.served_mass, record.served_index, record.served_weight)
        if record.demand_index is None or record.demand_weight is None or record.missed_mass is None:
            _accumulate(self.demand_count, self.demand_mass, record.served_index, record.served_weight)
        else:
            _accumulate(self.demand_count, self.demand_mass, record.demand_index, record.demand_weight)
            self.missed_mass += record.missed_mass
            top1_missing = record.top1_missing
            assert top1_missing is not None
            self.top1_missing += top1_missing.sum(axis=1)
            self.top1_missing_tokens += int(top1_missing.any(axis=0).sum())

    def merge(self, other: UsageLedger) -> None:
        """Add another ledger of the same checkpoint to this one.

        Raises:
            LedgerError: it is of another checkpoint or shape.
        """
        if other.fingerprint != self.fingerprint or other.served_count.shape != self.served_count.shape:
            raise LedgerError(
                f"usage of checkpoint {other.fingerprint} {other.served_count.shape} cannot be added to usage of "
                f"{self.fingerprint} {self.served_count.shape}"
            )
        for name in _ARRAYS:
            getattr(self, name).__iadd__(getattr(other, name))
        self.missed_mass += other.missed_mass
        self.top1_missing += other.top1_missing
        self.num_tokens += other.num_tokens
        self.top1_missing_tokens += other.top1_missing_tokens

    def to_json(self) -> dict[str, Any]:
        """The content of `usage.json` as a JSON object."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "num_tokens": self.num_tokens,
            "top1_missing_tokens": self.top1_missing_tokens,
            **{name: getattr(self, name).tolist() for name in _ARRAYS},
            "missed_mass": self.missed_mass.tolist(),
            "top1_missing": self.top1_missing.tolist(),
        }

    @classmethod
    def load(cls, path: Path) -> UsageLedger:
        """Read a file `path` with the content of `to_json`.

        Raises:
            LedgerError: not a usage file, an unknown version, or arrays that do not fit together.
            OSError: the file cannot be read.
        """
        if path.stat().st_size > MAX_FILE_BYTES:
            raise LedgerError(f"{path} is larger than {MAX_FILE_BYTES} bytes: not a usage file")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["version"] not in READABLE_VERSIONS:
                raise LedgerError(
                    f"{path}: {data['format']} version {data['version']}; this reads {FORMAT} versions "
                    f"{', '.join(map(str, READABLE_VERSIONS))}"
                )
            shape = np.asarray(data["served_count"]).shape
            if len(shape) != 2:
                raise LedgerError(f"{path}: served_count has shape {shape}, wanted [layers, experts]")
            ledger = cls(shape[0], shape[1], str(data["fingerprint"]))
            for name in (*_ARRAYS, "missed_mass"):
                getattr(ledger, name)[...] = np.asarray(data[name])
            ledger.num_tokens = int(data["num_tokens"])
            if data["version"] >= 2:
                ledger.top1_missing[...] = np.asarray(data["top1_missing"])
                ledger.top1_missing_tokens = int(data["top1_missing_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{path} is no usage file ({error}); move it away to start a new one") from error
        return ledger


def _accumulate(
    count: npt.NDArray[np.int64],
    mass: npt.NDArray[np.float64],
    index: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float32],
) -> None:
    """Add picks index [L, T, K] with gate weights [L, T, K] to count and mass [L, E]; sentinel picks are dropped."""
    num_experts = count.shape[1]
    count += sum_by_expert(index, None, num_experts)
    mass += sum_by_expert(index, weight, num_experts)


def sum_by_expert(
    index: npt.NDArray[np.integer], weight: npt.NDArray[np.floating] | None, num_experts: int
) -> npt.NDArray[Any]:
    """[L, E]: the sum over picks index [L, T, K] of their weights, float64, or without weights their number, int64.

    Ids ≥ E are picks that do not exist.
    """
    num_layers, stride = index.shape[0], num_experts + 1
    offsets = (np.arange(num_layers, dtype=np.int64) * stride)[:, None, None]
    flat = (np.minimum(index, num_experts) + offsets).ravel()
    sums = np.bincount(flat, weights=None if weight is None else weight.ravel(), minlength=num_layers * stride)
    return sums.reshape(num_layers, stride)[:, :num_experts]
