"""KV memory with fixed rows and a length for each row; transformers' attention uses it as its cache.

A row belongs to one sequence. Rows in use are dense (0 … n−1), so that a decode step over all of them reads plain
slices; when a row is freed the last one moves into its place. Memory grows by doubling, in rows and in tokens, and is
freed when no row is in use. Invariants: of row r exactly the first `lengths[r]` positions are valid; every layer has
memory for at least `_num_rows` rows of `_num_tokens`, also after a growth that failed in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from server.model.runner import StepMemoryError
from server.model.seam.forward import REMEDY, ran_out

MIN_TOKENS = 64


class RowCache(Cache):
    """Keys and values of every attention layer, [rows, KV heads, tokens, head dim] each, allocated on first use.

    Args:
        max_rows: most sequences at once.
        max_tokens: most tokens of a row.
        device: device of the KV memory.
    """

    def __init__(self, *, max_rows: int, max_tokens: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.device = device
        self.lengths: list[int] = []
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._row_of: dict[int, int] = {}
        self._handle_of: list[int] = []
        self._next_handle = 0
        self._num_rows = 0
        self._num_tokens = 0
        self._step_rows: list[int] = []
        self._write_rows: Tensor | None = None
        self._write_at: Tensor | None = None
        self._start = 0
        self._end = 0

    # -- rows ----------------------------------------------------------------------------------------------------------

    @property
    def num_used_rows(self) -> int:
        """Rows that belong to a sequence."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of KV memory allocated now."""
        return sum(t.nbytes for t in (*self._keys.values(), *self._values.values()))

    def allocate(self) -> int:
        """Take a row; return a handle that is valid until `free`. The caller must not exceed `max_rows`."""
        assert len(self.lengths) < self.max_rows, f"all {self.max_rows} rows are in use"
        handle = self._next_handle
        self._next_handle += 1
        self._row_of[handle] = len(self.lengths)
        self._handle_of.append(handle)
        self.lengths.append(0)
        return handle

    @torch.inference_mode()
    def free(self, handle: int) -> None:
        """Free a row; the last row moves into its place."""
        row = self._row_of.pop(handle)
        last = len(self.lengths) - 1
        if row != last:
            used = self.lengths[last]
            for memory in (*self._keys.values(), *self._values.values()):
                if last < memory.shape[0]:
                    memory[row, :, :used] = memory[last, :, :used]
            self.lengths[row] = used
            self._handle_of[row] = self._handle_of[last]
            self._row_of[self._handle_of[row]] = row
        self.lengths.pop()
        self._handle_of.pop()
        if not self.lengths:
            self._keys.clear()
            self._values.clear()
            self._num_rows = self._num_tokens = 0

    def length(self, handle: int) -> int:
        """Valid tokens of a row."""
        return self.lengths[self._row_of[handle]]

    def order(self, handles: Sequence[int]) -> list[int]:
        """Positions in `handles`, in the order of their rows: a step in this order needs no gather."""
        return sorted(range(len(handles)), key=lambda position: self._row_of[handles[position]])

    # -- steps ---------------------------------------------------------------------------------------------------------

    def begin_prefill(self, handle: int, num_tokens: int) -> int:
        """Start a step that appends `num_tokens` to one row; return the first position. Raises StepMemoryError."""
        row = self._row_of[handle]
        self._step_rows = [row]
        self._start = self.lengths[row]
        self._end = self._start + num_tokens
        self._write_rows = self._write_at = None
        if not self._reserve(row + 1, self._end):
            raise self._no_memory(self._end, [0])
        return self._start

    def begin_decode(self, handles: Sequence[int]) -> Tensor:
        """Start a step that appends one token to each row; returns their positions, int64 [B] on the device.

        Raises StepMemoryError with the positions in `handles` of the rows that are too long for the free memory.
        """
        self._step_rows = [self._row_of[handle] for handle in handles]
        positions = [self.lengths[row] for row in self._step_rows]
        self._end = max(positions) + 1
        if not self._reserve(max(self._step_rows) + 1, self._end):
            rows = enumerate(self._step_rows)
            beyond = [at for at, row in rows if row >= self._num_rows or self.lengths[row] >= self._num_tokens]
            raise self._no_memory(self._end, beyond)
        both = torch.tensor([self._step_rows, positions], device=self.device)
        self._write_rows, self._write_at = both[0], both[1]
        return self._write_at

    @property
    def step_end(self) -> int:
        """KV length of the current step: that of the longest row, including the appended tokens."""
        return self._end

    @property
    def step_lengths(self) -> list[int]:
        """Number of keys of each row of the current decode step, including the appended one."""
        return [self.lengths[row] + 1 for row in self._step_rows]

    def commit(self) -> None:
        """End the step: the positions that it wrote become valid. A step without `commit` changes no length."""
        if self._write_rows is None:
            self.lengths[self._step_rows[0]] = self._end
        else:
            for row in self._step_rows:
                self.lengths[row] += 1

    # -- called by transformers ----------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values [B, heads, tokens, dim]; return those of the step's rows up to its end."""
        if layer_idx not in self._keys:
            both = [self._empty(like, self._num_rows, self._num_tokens) for like in (key_states, value_states)]
            self._keys[layer_idx], self._values[layer_idx] = both
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        rows = self._step_rows
        if self._write_rows is None or self._write_at is None:
            row = rows[0]
            keys[row, :, self._start : self._end] = key_states[0]
            values[row, :, self._start : self._end] = value_states[0]
            return keys[row : row + 1, :, : self._end], values[row : row + 1, :, : self._end]
        if len(rows) == 1:
            row, at = rows[0], self._end - 1
            keys[row, :, at] = key_states[0, :, 0]
            values[row, :, at] = value_states[0, :, 0]
            return keys[row : row + 1, :, : self._end], values[row : row + 1, :, : self._end]
        keys[self._write_rows, :, self._write_at] = key_states[:, :, 0]
        values[self._write_rows, :, self._write_at] = value_states[:, :, 0]
        if rows == list(range(len(rows))):
            return keys[: len(rows), :, : self._end], values[: len(rows), :, : self._end]
        return keys[self._write_rows, :, : self._end], values[self._write_rows, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the step (of the longest row)."""
        return max((self.lengths[row] for row in self._step_rows), default=0)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _reserve(self, num_rows: int, num_tokens: int) -> bool:
        """Grow to at least this many rows of this many tokens, if possible by doubling; return whether it succeeded."""
        held = (self._num_rows, self._num_tokens)
        least = (max(num_rows, held[0]), max(num_tokens, held[1]))
        if least == held:
            return True
        rows = least[0] if least[0] == held[0] else min(self.max_rows, max(num_rows, 2 * held[0]))
        tokens = least[1] if least[1] == held[1] else min(self.max_tokens, max(MIN_TOKENS, num_tokens, 2 * held[1]))
        for shape in ((rows, tokens), least):
            if self._grow(*shape):
                self._num_rows, self._num_tokens = shape
                return True
        return False

    def _grow(self, num_rows: int, num_tokens: int) -> bool:
        """Grow layer by layer, so that only one layer is in memory twice; return False if an allocation fails."""
        for memory in (self._keys, self._values):
            for layer_idx, old in memory.items():
                if old.shape[0] >= num_rows and old.shape[2] >= num_tokens:
                    continue
                try:
                    new = self._empty(old, max(num_rows, old.shape[0]), max(num_tokens, old.shape[2]))
                except (MemoryError, RuntimeError) as error:
                    if not ran_out(error):
                        raise
                    return False
                new[: old.shape[0], :, : old.shape[2]] = old
                memory[layer_idx] = new
        return True

    def _no_memory(self, num_tokens: int, positions: Sequence[int]) -> StepMemoryError:
        return StepMemoryError(
            f"there is no memory for the keys and values of a row of {num_tokens} tokens beside the {self.nbytes} "
            f"bytes that are held for {self._num_rows} rows of {self._num_tokens}: {REMEDY}",
            positions,
        )

    def _empty(self, like: Tensor, num_rows: int, num_tokens: int) -> Tensor:
        _, heads, _, dim = like.shape
        # zeros, not empty: masked positions are multiplied by a weight of 0, which must not meet NaN or infinity
        return torch.zeros((num_rows, heads, num_tokens, dim), dtype=like.dtype, device=self.device)
