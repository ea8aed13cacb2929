"""The routing of some of a prompt's tokens, kept with their block of KV memory.

A request that takes a block from KV memory does not route its tokens, but its deficit counts them, its pool is chosen
from their demand, and it may refuse an expert that they miss. Invariant: a prompt's routing is added block by block,
whether it was computed or found, so that both give the same sums in every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.ledger import StepRecord
from router.mask import ExpertMask


@dataclass(frozen=True)
class BlockRouting:
    """The demand of T tokens, and what of it was missing.

    Attributes:
        index: uint16 [L, T, K] expert ids of the unmasked choice; ids >= E are picks that do not exist.
        weight: float32 [L, T, K].
        missed: float64 [L], demanded mass that was not available.
        top1_missing: bool [L, T], whether a token's most demanded expert was not available; None if nothing was masked.
    """

    index: npt.NDArray[np.uint16]
    weight: npt.NDArray[np.float32]
    missed: npt.NDArray[np.float64]
    top1_missing: npt.NDArray[np.bool_] | None

    @staticmethod
    def of(record: StepRecord, tokens: slice, mask: ExpertMask) -> BlockRouting:
        """The routing of some tokens of a step, which were routed under `mask`."""
        index, weight = record.demand_of(tokens)
        missed = np.zeros(len(index))
        top1_missing = record.top1_missing
        if top1_missing is not None:
            num_layers, num_experts = mask.allowed.shape
            hidden = np.concatenate([~mask.allowed, np.zeros((num_layers, 1), dtype=np.bool_)], axis=1)
            is_missed = hidden[np.arange(num_layers)[:, None, None], np.minimum(index, num_experts)]
            missed = np.where(is_missed, weight, 0.0).sum(axis=(1, 2), dtype=np.float64)
            top1_missing = top1_missing[:, tokens].copy()
        return BlockRouting(index.astype(np.uint16), weight.astype(np.float32), missed, top1_missing)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.index.shape[1])

    @property
    def record(self) -> StepRecord:
        """The demand as the record of a step, in which nothing was masked."""
        return StepRecord(self.index.astype(np.int64), self.weight)

    @property
    def demanded(self) -> npt.NDArray[np.float64]:
        """Router mass of the demand, [L]."""
        return np.asarray(self.weight.sum(axis=(1, 2), dtype=np.float64))
