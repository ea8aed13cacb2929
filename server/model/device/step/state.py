"""Tensors that are kept between decode steps: KV memory in blocks, the state of each row, and the last step's report.

A block holds the keys and values of `DecodeShape.block_tokens` following tokens of one row in every layer; the table
says which blocks a row has. Invariants: the tensors never move, since captured graphs hold their addresses; the table
changes between steps only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from server.model.device.step.parts import ConvolutionKind
from server.model.device.step.weights import DecodeShape

NO_STATE = ConvolutionKind(0, 0)


class RowState:
    """KV memory and per-row device state, shared by the steps of all batch sizes.

    memory: for each layer [blocks, elements], a block of keys [kv_heads, block_tokens, head_dim] and then values
    [kv_heads, block_tokens, value_dim], or of latents [block_tokens, rank] and then keys, or nothing; states [layers,
    rows, 2, heads, value_dim, key_dim] fp32 (see `kernels.delta`) and rings [layers, rows, kernel, channels] (see
    `kernels.convolution`) of the layers that keep a state, and places, the number of a layer among those; table [rows,
    max_blocks] int32, the block of each stretch of a row's tokens; lengths [rows] int32; masks [rows, L, E] int8 (see
    `kernels.routing.route`) and temperatures [rows] fp32 of the routers, both read by masked steps; bias_range [L]
    fp32, the running range of the router's logits.

    Args:
        num_blocks: of memory; None: as many as whole rows need, and the table gives each row blocks of its own.
        memory: as above, zero or not; None: it is made.
    """

    def __init__(
        self,
        shape: DecodeShape,
        device: torch.device | str,
        num_blocks: int | None = None,
        memory: list[Tensor] | None = None,
    ) -> None:
        of_rows = shape.max_rows * shape.max_blocks
        num_blocks = of_rows if num_blocks is None else num_blocks
        self.attentions, self.block_tokens = shape.each_attention, shape.block_tokens
        self.memory = memory or [
            torch.zeros(num_blocks, shape.block_tokens * kind.token_elements, dtype=shape.dtype, device=device)
            for kind in self.attentions
        ]
        self.places = {layer: place for place, layer in enumerate(shape.stateful)}
        kind, rows = next(iter(shape.stateful.values()), NO_STATE), (len(self.places), shape.max_rows)
        self.states = torch.zeros(*rows, 2, *kind.state, dtype=torch.float32, device=device)
        self.rings = torch.zeros(*rows, kind.kernel, kind.channels, dtype=shape.dtype, device=device)
        self.table = torch.arange(of_rows, dtype=torch.int32, device=device).view(shape.max_rows, -1)
        self.lengths = torch.zeros(shape.max_rows, dtype=torch.int32, device=device)
        layers = shape.num_moe_layers
        self.masks = torch.ones(shape.max_rows, layers, shape.num_experts, dtype=torch.int8, device=device)
        self.temperatures = torch.ones(shape.max_rows, dtype=torch.float32, device=device)
        self.bias_range = torch.zeros(layers, dtype=torch.float32, device=device)

    def blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys [blocks, kv_heads, block_tokens, head_dim] and values [..., value_dim], or latents and keys,
        views of `memory`."""
        memory, ((heads, head_dim), (others, value_dim)) = self.memory[layer], self.attentions[layer].vectors
        tokens = self.block_tokens
        keys, values = torch.split(memory, [tokens * heads * head_dim, tokens * others * value_dim], dim=1)
        return keys.view(-1, heads, tokens, head_dim), values.view(-1, others, tokens, value_dim)


class PrefillRow(Cache):
    """One row of the device's memory as transformers' cache: appends a chunk's keys and values at `start`.

    States change with `commit` alone, so a chunk that failed can be read again.

    Attributes:
        start: tokens before the chunk.
        states, rings: of those layers of the row after the chunk, which the chunk's layers write: like `RowState`'s.
    """

    def __init__(self, state: RowState, row: int, start: int, end: int) -> None:
        super().__init__(layers=[])
        self._state, self.start = state, start
        self._before = state.states[:, row, start % 2], state.rings[:, row]
        self._after = state.states[:, row, end % 2]
        self.states, self.rings = torch.empty_like(self._after), state.rings[:, row].clone()
        at = torch.arange(end, device=state.table.device)
        self._blocks, self._entries = state.table[row, at // state.block_tokens].long(), at % state.block_tokens
        """Each token's block, and its place in it, [end]."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [1, heads, tokens, dim]; returns the row up to the chunk's end, copied where blocks hold a part."""
        keys, values = self._state.blocks(layer_idx)
        new = self._blocks[self.start :], self._entries[self.start :]
        keys[new[0], :, new[1]] = key_states[0].transpose(0, 1)
        values[new[0], :, new[1]] = value_states[0].transpose(0, 1)
        if self.start == 0:
            return key_states, value_states
        keys, values = (held[self._blocks, :, self._entries].transpose(0, 1) for held in (keys, values))
        return keys[None], values[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk."""
        return self.start

    def before(self, place: int) -> tuple[Tensor, Tensor]:
        """The state and the ring of a layer before the chunk, meaningless before a row's first token."""
        states, rings = self._before
        return states[place], rings[place]

    def commit(self) -> None:
        """Makes states and rings those of the row, whose length becomes the chunk's end."""
        self._after.copy_(self.states)
        self._before[1].copy_(self.rings)


@dataclass(frozen=True)
class Report:
    """The results of a step for the host, views of one int32 tensor.

    best_token [B] int32, best_logit and normaliser (logsumexp) [B] fp32 of the logits; ids [L, B, K] int32 and weights
    fp32 of the served experts; demand and mass, the same of the demanded ones, written by masked steps only.
    """

    best_token: Tensor
    best_logit: Tensor
    normaliser: Tensor
    ids: Tensor
    weights: Tensor
    demand: Tensor
    mass: Tensor

    @staticmethod
    def num_entries(layers: int, batch: int, top_k: int) -> int:
        return 3 * batch + 4 * layers * batch * top_k

    @classmethod
    def of(cls, flat: Tensor, layers: int, batch: int, top_k: int) -> Report:
        """Views of flat [num_entries]."""
        picks = layers * batch * top_k
        *best, ids, weights, demand, mass = torch.split(flat, [batch] * 3 + [picks] * 4)
        size = (layers, batch, top_k)
        return cls(
            best[0], best[1].view(torch.float32), best[2].view(torch.float32),
            ids.view(size), weights.view(torch.float32).view(size),
            demand.view(size), mass.view(torch.float32).view(size),
        )  # fmt: skip
