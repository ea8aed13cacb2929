"""The experts of a served model as a viewer sees them: flags and counts of every cell, and the cells that changed.

A cell is one expert of one layer, at `layer * num_experts + expert`. Invariant: a viewer that has the cells of `before`
and takes the changed ones has those of `after`, to the last bit.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

from server.serving.service import ExpertsSnapshot, ShardInfo

MAX_COUNT = 2**32 - 1


class Place(IntFlag):
    """Where an expert is, as bits; 0 is an expert that this server does not have."""

    AVAILABLE = 1
    RESIDENT = 2
    IN_HOST = 4
    CORRUPT = 8


@dataclass(frozen=True, eq=False)
class Cells:
    """Columns of one shape [C], in little-endian order.

    Attributes:
        place: uint8, see `Place`.
        demand, uses: uint32, times wanted and computed; they stop at `MAX_COUNT`.
        demand_mass, served_mass: float32, sums of router weight.
    """

    place: NDArray[np.uint8]
    demand: NDArray[np.uint32]
    uses: NDArray[np.uint32]
    demand_mass: NDArray[np.float32]
    served_mass: NDArray[np.float32]

    @classmethod
    def of(cls, found: ExpertsSnapshot) -> Cells:
        """Every cell of a snapshot."""
        place = (
            found.available * Place.AVAILABLE
            + found.resident * Place.RESIDENT
            + found.tier.in_host * Place.IN_HOST
            + found.corrupt * Place.CORRUPT
        )
        return cls(
            place.astype("u1").ravel(),
            np.minimum(found.demand, MAX_COUNT).astype("<u4").ravel(),
            np.minimum(found.uses, MAX_COUNT).astype("<u4").ravel(),
            found.demand_mass.astype("<f4").ravel(),
            found.served_mass.astype("<f4").ravel(),
        )

    def __len__(self) -> int:
        return len(self.place)

    def changed_since(self, before: Cells) -> NDArray[np.uint32]:
        """Ids of the cells that differ from those of `before`, which has as many; ascending."""
        differs = np.zeros(len(self), dtype=np.bool_)
        for column in fields(self):
            differs |= getattr(self, column.name) != getattr(before, column.name)
        return np.flatnonzero(differs).astype("<u4")

    def select(self, ids: NDArray[np.uint32]) -> Cells:
        """The cells of these ids, in their order."""
        return Cells(*(getattr(self, column.name)[ids] for column in fields(self)))

    def encoded(self) -> dict[str, str]:
        """Each column's bytes in base64, by its name."""
        return {column.name: encoded(getattr(self, column.name)) for column in fields(self)}


def encoded(values: NDArray[np.generic]) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def deep_experts(shards: tuple[ShardInfo, ...]) -> NDArray[np.uint16]:
    """Expert ids [N, L] of the deep experts of a store, in its order."""
    return np.array([shard.experts for shard in shards], dtype="<u2")
