"""KV memory in blocks, as transformers' attention reads and writes it.

Of every attention layer there is one tensor of keys and one of values, in which block b is the tokens
[32 b, 32 b + 32). A row whose blocks follow on one another is read as a view; another is gathered, block by block.
Invariant: `kv` says which blocks are whose; a step without `commit` changes no length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from expert_store.residency.returnable import ReturnableMemory
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv.rows import KvRows


class BlockCache(Cache):
    """Keys and values of every attention layer, [blocks · 32, KV heads, head dim] each, allocated on first use.

    Args:
        kv: the rows and their blocks.
        device: device of the KV memory.
        by_rows: whether the model's attention reads each row's keys by itself (`seam.rows.attends_by_rows`), and does
            nothing with the tensors that `update` returns but hand them over.

    Attributes:
        by_rows: as given; may be changed between two steps.
        apart: in a step of several rows whose attention reads each row's keys by itself, those of the layer that runs:
            the tensor that `update` returned, and the rows' own, by the id of the former.
    """

    def __init__(self, kv: KvRows, device: torch.device, *, by_rows: bool) -> None:
        super().__init__(layers=[])
        self.kv, self.device, self.by_rows = kv, device, by_rows
        self.apart: dict[int, tuple[Tensor, list[Tensor]]] = {}
        kv.on_resize = self.give_back
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._returnable: list[ReturnableMemory] = []  # that the layers' tensors show
        self._step: list[tuple[int, int]] = []  # (row, tokens after the step)
        self._places: list[slice | Tensor] = []  # of each row's tokens: positions, or blocks to be gathered
        self._write = torch.empty(0)
        self._start = 0

    @property
    def nbytes(self) -> int:
        """Bytes of KV memory in blocks that a row or the prefix tree holds."""
        whole = sum(tensor.nbytes for both in list(self._layers.values()) for tensor in both)
        return whole * self.kv.pool.num_used // self.kv.pool.most_blocks

    def release(self) -> None:
        """Free the memory if no block is in use."""
        if not self.kv.pool.num_used:
            self._layers.clear()
            self._returnable.clear()

    def give_back(self, blocks: list[int]) -> None:
        """Give the memory of blocks that were closed, if any, back to the system."""
        for memory in self._returnable:
            block_bytes = len(memory.bytes) // self.kv.pool.most_blocks
            for first, last in _runs(blocks) if blocks else ():
                memory.give_back(first * block_bytes, (last + 1) * block_bytes)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def begin_prefill(self, row: int, num_tokens: int) -> int:
        """Start a step that appends `num_tokens` to one row; return the first position. Raises NoBlocksError."""
        start = self.kv.length(row)
        self._begin([(row, start + num_tokens)], start)
        at = np.arange(start, start + num_tokens)
        blocks = np.array(self.kv.blocks(row))
        self._write = torch.from_numpy(blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS).to(self.device)
        return start

    def begin_decode(self, rows: Sequence[int]) -> Tensor:
        """Start a step that appends one token to each row; return their positions, int64 [B] on the device.

        Raises NoBlocksError with the positions in `rows` of those that got no block.
        """
        starts = [self.kv.length(row) for row in rows]
        self._begin([(row, start + 1) for row, start in zip(rows, starts, strict=True)], max(starts))
        places = [
            self.kv.blocks(row)[start // BLOCK_TOKENS] * BLOCK_TOKENS + start % BLOCK_TOKENS
            for row, start in zip(rows, starts, strict=True)
        ]
        both = torch.tensor([starts, places], device=self.device)
        self._write = both[1]
        return both[0]

    def _begin(self, step: list[tuple[int, int]], start: int) -> None:
        self.kv.reserve(step)
        self._step, self._start = step, start
        self._places = [self._place(*one) for one in step]
        self.apart.clear()

    def _place(self, row: int, end: int) -> slice | Tensor:
        blocks = self.kv.blocks(row)[: num_blocks_of(end)]
        if blocks[-1] - blocks[0] == len(blocks) - 1 and blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(blocks[0] * BLOCK_TOKENS, blocks[0] * BLOCK_TOKENS + end)
        return torch.tensor(blocks, device=self.device)

    @property
    def step_end(self) -> int:
        """KV length of the current step: that of the longest row, including the appended tokens."""
        return max(end for _, end in self._step)

    @property
    def step_lengths(self) -> list[int]:
        """Number of keys of each row of the current step, including the appended ones."""
        return [end for _, end in self._step]

    def commit(self) -> None:
        """End the step: the tokens that it wrote become valid."""
        for row, end in self._step:
            self.kv.set_length(row, end)
        self.apart.clear()

    # -- called by transformers ----------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values [B, heads, tokens, dim]; return those of the step's rows up to its end.

        Of several rows whose attention reads `apart`, it returns tensors of the same shape that hold no number.
        """
        if layer_idx not in self._layers:
            self._layers[layer_idx] = self._empty(key_states), self._empty(value_states)
        found = []
        self.apart.clear()
        for memory, states in zip(self._layers[layer_idx], (key_states, value_states), strict=True):
            memory[self._write] = states.transpose(1, 2).flatten(0, 1)
            rows = [self._read(memory, place, end) for place, (_, end) in zip(self._places, self._step, strict=True)]
            if len(rows) == 1:
                found.append(rows[0])
            elif self.by_rows:
                none = memory.new_full((1, 1, 1, 1), torch.nan)
                found.append(none.expand(len(rows), states.shape[1], self.step_end, states.shape[3]))
                self.apart[id(found[-1])] = found[-1], rows
            else:
                found.append(_padded(rows, self.step_end))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the step (of the longest row)."""
        return self._start if self._step else 0

    @staticmethod
    def _read(memory: Tensor, place: slice | Tensor, end: int) -> Tensor:
        """[1, heads, end, dim] of a row."""
        if isinstance(place, slice):
            tokens = memory[place]
        else:
            tokens = memory.view(-1, BLOCK_TOKENS, *memory.shape[1:]).index_select(0, place).flatten(0, 1)[:end]
        return tokens.transpose(0, 1)[None]

    def _empty(self, like: Tensor) -> Tensor:
        """Zeros for all blocks; on a CPU the system gives the memory of a block when it is first written."""
        shape = (self.kv.pool.most_blocks * BLOCK_TOKENS, like.shape[1], like.shape[3])
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=self.device)
        memory = ReturnableMemory(like.dtype.itemsize * shape[0] * shape[1] * shape[2])
        self._returnable.append(memory)
        return memory.bytes.view(like.dtype).view(shape)


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each run of consecutive blocks, which must be in order: pages across two of them count too."""
    edges = [at for at in range(1, len(blocks)) if blocks[at] != blocks[at - 1] + 1]
    return [(blocks[start], blocks[end - 1]) for start, end in itertools.pairwise([0, *edges, len(blocks)])]


def _padded(rows: Sequence[Tensor], end: int) -> Tensor:
    """Join rows [1, heads, tokens, dim] of different lengths, with zeros behind the shorter ones."""
    joined = rows[0].new_zeros((len(rows), rows[0].shape[1], end, rows[0].shape[3]))
    for at, row in enumerate(rows):
        joined[at, :, : row.shape[2]] = row[0]
    return joined
