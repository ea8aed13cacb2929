"""The rows of a device's KV memory: their use, their lengths, and the experts that their tokens may choose from.

A sequence joins, leaves or changes its mask by writing device tensors, never by another capture. Invariant: between two
steps, `lengths` on the device equal the host's, and so do masks and temperatures of the rows that a step reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from router.mask import ExpertMask
from server.model.device.kernels.routing import ABSENT
from server.model.device.step.state import RowState
from server.model.device.step.weights import DecodeShape

Table = npt.NDArray[np.int8]
"""[L, E] of one row: 0 hidden, 1 servable, 2 (`ABSENT`) allowed, and in no memory."""


class Rows:
    """Bookkeeping over `RowState`, which it mutates.

    Args:
        servable: bool [L, E], experts that a step can use.
    """

    def __init__(self, state: RowState, shape: DecodeShape, servable: npt.NDArray[np.bool_]) -> None:
        self._state = state
        self.max_tokens = shape.max_tokens
        self.lengths = [0] * shape.max_rows
        self._servable = servable
        self._asked: list[ExpertMask | None] = [None] * shape.max_rows  # to detect a change
        everything = np.ones(servable.shape, dtype=np.int8)
        self._tables: list[Table] = [everything] * shape.max_rows  # the tables on the device
        self._is_open, self._lacks = [True] * shape.max_rows, [False] * shape.max_rows  # summaries of the tables
        self._temperatures = [1.0] * shape.max_rows

    def set_length(self, row: int, length: int) -> None:
        """Tokens that the row holds, here and on the device."""
        self.lengths[row] = length
        self._state.lengths[row : row + 1].fill_(length)

    def advanced(self, rows: Sequence[int]) -> None:
        """Count the token that a step has added to each of the rows on the device."""
        for row in rows:
            self.lengths[row] += 1

    def take_back(self, rows: Sequence[int], count: int = 0) -> None:
        """Remove the last `count` tokens of the rows, and tokens that a step has added only on the device."""
        for row in rows:
            self.set_length(row, self.lengths[row] - count)

    # -- the experts that a row may choose from ------------------------------------------------------------------------

    def serve(self, servable: npt.NDArray[np.bool_]) -> None:
        """Sets the experts that a step can use, [L, E]."""
        self._servable = servable
        self._asked = [None] * len(self._asked)

    def table(self, mask: ExpertMask) -> Table:
        """The experts that a row with this mask may choose from."""
        return np.where(mask.allowed, np.where(self._servable, 1, ABSENT.value), 0).astype(np.int8)

    def settle(self, row: int, mask: ExpertMask, temperature: float) -> None:
        """Write to the device the mask and the temperature of the row's next token, if they have changed."""
        asked = self._asked[row]
        if asked is None or not (asked is mask or np.array_equal(asked.allowed, mask.allowed)):
            self._tables[row] = self.table(mask)
            self._is_open[row] = bool((self._tables[row] == 1).all())
            self._lacks[row] = bool((self._tables[row] == ABSENT.value).any())
            self._state.masks[row] = torch.from_numpy(self._tables[row]).to(self._state.masks.device)
            self._asked[row] = mask
        if temperature != self._temperatures[row]:
            self._state.temperatures[row : row + 1].fill_(temperature)
            self._temperatures[row] = temperature

    def is_plain(self, row: int) -> bool:
        """Whether the row has every expert, all servable, and its routers have no temperature."""
        return self._temperatures[row] == 1.0 and self._is_open[row]

    def hidden(self, rows: Sequence[int]) -> npt.NDArray[np.bool_]:
        """The experts that these rows may not choose, [L, B, E]."""
        return np.stack([self._tables[row] == 0 for row in rows], axis=1)

    def absent(self, rows: Sequence[int], chosen: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_] | None:
        """bool [L, B, K]: the picks among chosen [L, B, K] (ids ≥ E: none) that a step left out because they are in no
        memory; None if no row may have such an expert."""
        if not any(self._lacks[row] for row in rows):
            return None
        num_layers, num_experts = self._servable.shape
        beyond = np.concatenate([self._servable, np.ones((num_layers, 1), dtype=np.bool_)], axis=1)
        return np.asarray(~beyond[np.arange(num_layers)[:, None, None], np.minimum(chosen, num_experts)])
