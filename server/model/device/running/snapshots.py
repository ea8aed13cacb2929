"""Rows of the captured path that keep states: copies of these on the device, for which it has room."""

from __future__ import annotations

from torch import Tensor

from server.model.device.step.state import RowState
from server.model.kv.snapshots import SnapshotRows


class StateRows(SnapshotRows):
    """`SnapshotRows` over the states of a `RowState`, which it mutates, with so many copies."""

    def __init__(
        self, state: RowState, num_copies: int, *, max_rows: int, num_blocks: int, shares: bool, most_blocks: int
    ) -> None:
        super().__init__(max_rows=max_rows, num_blocks=num_blocks, shares=shares, most_blocks=most_blocks)
        self._state, self._num_copies = state, num_copies

    def copy_state(self, handle: int) -> tuple[Tensor, Tensor]:
        """See `SnapshotRows.copy_state`."""
        half = self._state.states[:, handle, self.length(handle) % 2]
        return half.clone(), self._state.rings[:, handle].clone()

    def put_state(self, handle: int, state: tuple[Tensor, Tensor]) -> None:
        """See `SnapshotRows.put_state`."""
        self._state.states[:, handle, self.length(handle) % 2].copy_(state[0])
        self._state.rings[:, handle].copy_(state[1])

    def cost(self, num_tokens: int) -> int:
        """One copy."""
        return 1

    @property
    def most_cost(self) -> int:
        """See `SnapshotRows.most_cost`."""
        return self._num_copies
