"""Tensors that are kept between decode steps: KV memory, the state of each row, and the report of the last step.

Invariant: they never move, since captured graphs hold their addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from server.model.device.step.weights import DecodeShape


class RowState:
    """KV memory and per-row device state, shared by the steps of all batch sizes.

    keys, values: per layer [rows, kv_heads, max_tokens, head_dim]; lengths [rows] int32; masks [rows, L, E] int8
    (see `kernels.routing.route`) and temperatures [rows] fp32 of the routers, both read by masked steps; bias_range [L]
    fp32, the running range of the router's logits.
    """

    def __init__(self, shape: DecodeShape, device: torch.device | str) -> None:
        size = (shape.num_layers, shape.max_rows, shape.num_kv_heads, shape.max_tokens, shape.head_dim)
        self.keys = torch.zeros(size, dtype=shape.dtype, device=device)
        self.values = torch.zeros(size, dtype=shape.dtype, device=device)
        self.lengths = torch.zeros(shape.max_rows, dtype=torch.int32, device=device)
        layers = shape.num_moe_layers
        self.masks = torch.ones(shape.max_rows, layers, shape.num_experts, dtype=torch.int8, device=device)
        self.temperatures = torch.ones(shape.max_rows, dtype=torch.float32, device=device)
        self.bias_range = torch.zeros(layers, dtype=torch.float32, device=device)


class PrefillRow(Cache):
    """One row of the device's KV memory as transformers' cache: appends a chunk's keys and values at `start`."""

    def __init__(self, state: RowState, row: int, start: int, end: int) -> None:
        super().__init__(layers=[])
        self._state, self._row, self._start, self._end = state, row, start, end

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [1, heads, tokens, dim]; returns the row up to the chunk's end."""
        keys, values = self._state.keys[layer_idx, self._row], self._state.values[layer_idx, self._row]
        keys[:, self._start : self._end] = key_states[0]
        values[:, self._start : self._end] = value_states[0]
        return keys[None, :, : self._end], values[None, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk."""
        return self._start


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
