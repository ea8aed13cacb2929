"""The rows of a device's KV memory: their lengths and blocks, and the experts that their tokens may choose from.

A sequence joins, leaves, grows or changes its mask by writing device tensors, never by another capture. Invariant: when
a step begins, lengths, blocks, masks and temperatures of its rows on the device equal the host's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from router.mask import ExpertMask
from server.model.device.kernels.routing import ABSENT
from server.model.device.step.state import RowState
from server.model.kv.rows import KvRows

Table = npt.NDArray[np.int8]
"""[L, E] of one row: 0 hidden, 1 servable, 2 (`ABSENT`) allowed, and in no memory."""


class Rows:
    """Bookkeeping over `RowState`, which it mutates.

    Args:
        kv: the rows' blocks; others may change them between steps.
        servable: bool [L, E], experts that a step can use.
    """

    def __init__(self, state: RowState, kv: KvRows, servable: npt.NDArray[np.bool_]) -> None:
        self._state, self._kv = state, kv
        self._servable = servable
        max_rows = kv.max_rows
        self._lengths = [0] * max_rows  # those on the device, as the blocks
        self._blocks: list[list[int]] = [[]] * max_rows
        self._asked: list[ExpertMask | None] = [None] * max_rows  # to detect a change
        everything = np.ones(servable.shape, dtype=np.int8)
        self._tables: list[Table] = [everything] * max_rows  # the tables on the device
        self._is_open, self._lacks = [True] * max_rows, [False] * max_rows  # summaries of the tables
        self._temperatures = [1.0] * max_rows

    def begin(self, needs: Sequence[tuple[int, int]]) -> None:
        """Give the rows of a step (row, tokens after it) their blocks, and tell the device what has changed of them.

        Raises NoBlocksError; then no row was changed.
        """
        self._kv.reserve(needs)
        for row, _ in needs:
            self._tell_blocks(row)
            if self._lengths[row] != self._kv.length(row):
                self._tell_length(row)

    def set_length(self, row: int, length: int) -> None:
        """Tokens that the row holds, here and on the device."""
        self._kv.set_length(row, length)
        self._tell_length(row)

    def advanced(self, rows: Sequence[int]) -> None:
        """Count the token that a step has added to each of the rows on the device."""
        for row in rows:
            self._kv.set_length(row, self._kv.length(row) + 1)
            self._lengths[row] += 1

    def take_back(self, rows: Sequence[int], count: int = 0) -> None:
        """Remove the last `count` tokens of the rows, and tokens that a step has added only on the device."""
        for row in rows:
            self.set_length(row, self._kv.length(row) - count)

    def _tell_length(self, row: int) -> None:
        self._lengths[row] = self._kv.length(row)
        self._state.lengths[row : row + 1].fill_(self._lengths[row])

    def _tell_blocks(self, row: int) -> None:
        blocks, told = self._kv.blocks(row), self._blocks[row]
        if blocks == told:
            return
        pairs = enumerate(zip(blocks, told, strict=False))
        start = next((at for at, (wanted, got) in pairs if wanted != got), min(len(blocks), len(told)))
        changed = torch.tensor(blocks[start:], dtype=torch.int32)
        self._state.table[row, start : len(blocks)].copy_(changed, non_blocking=True)  # unpinned: staged before return
        self._blocks[row] = list(blocks)

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
