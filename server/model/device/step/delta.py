"""Launches of gated delta nets: for the new tokens of a step, and for a prompt's chunk.

A `DeltaLayer` stands for transformers' own module in a model that is served. Invariant: a chunk changes nothing of the
row but what `PrefillRow.commit` later makes the row's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor, nn

from server.model.device.kernels import delta as kernels
from server.model.device.step.launch import launch
from server.model.device.step.parts import DeltaKind
from server.model.device.step.state import PrefillRow, RowState
from server.model.device.step.tuning import Tuning, divisor, pow2
from server.model.device.step.weights import DecodeShape, LayerChanges, LayerWeights, Matrix

SCAN_VALUES = 4
"""Values of a program of the scan, which one warp holds with their states: its sums need no other warp."""
CHANNELS = 1024
"""Most channels of a program of the convolution."""


class DeltaRule:
    """The delta nets of a step's entries; mutates the rows' states.

    Args:
        rows: [B], row of each entry.
        run: launches a kernel; of `DecodeStep`, as the next.
        product: multiplies all entries with a weight.
    """

    def __init__(
        self, shape: DecodeShape, state: RowState, tuning: Tuning, rows: Tensor, run: Callable[..., None],
        product: Callable[..., None],
    ) -> None:  # fmt: skip
        self._eps, self._state, self._tuning, self._rows, self._run = shape.eps, state, tuning, rows, run
        self._product, kind = product, next(iter(shape.deltas.values()))
        self._parts = rows.new_zeros(len(rows) * kind.width, dtype=shape.dtype)
        self._gates = rows.new_zeros(len(rows), kind.gates if kind.rank else 0, dtype=shape.dtype)
        self._arrived = rows.new_zeros(len(rows) * kind.value_heads)

    def step(self, layer: int, kind: DeltaKind, weights: LayerWeights, given: Tensor, out: Tensor) -> None:
        """From given [B, qkv] into the first elements of out, [B, width]; the rows' states get the token."""
        small, state, place = weights.delta, self._state, self._state.places[layer]
        assert small is not None
        gates = given[:, kind.channels :]
        if small.expand is not None:
            latents, gates = gates[:, : 2 * kind.rank], self._gates
            change = (weights.changes or LayerChanges()).latents
            self._product(latents, None, small.expand, None, None, gates, self._tuning.qkv_rows, change)
        values = divisor(kind.value_dim, self._tuning.delta_values)
        self._run(
            kernels.delta_step, (kind.value_dim // values, kind.value_heads, len(self._rows)),
            given, gates, small.conv, small.decay, small.shift, small.norm, self._rows, state.lengths,
            state.rings[place], state.states[place], self._parts, self._arrived, out, self._eps,
            BV=values, KERNEL=kind.kernel, **_heads(kind), **_rates(kind, gates), SIGMOID=kind.sigmoid,
            num_warps=self._tuning.delta_warps,
        )  # fmt: skip


class DeltaLayer(nn.Module):
    """The forward of one layer over `PrefillRow`. Adapters change its products, which are modules: `input`, `output`
    and `expand` (of latents; None without).

    Args:
        kind, weights: of the layer, whose tensors others own; eps: of its norm; place: its number among the layers that
            keep a state.
    """

    def __init__(self, kind: DeltaKind, eps: float, weights: LayerWeights, place: int) -> None:
        super().__init__()
        self._kind, self._eps, self._weights, self._place = kind, eps, weights, place
        assert weights.delta is not None
        self.input, self.output = _linear(weights.qkv), _linear(weights.output)
        self.expand = None if weights.delta.expand is None else _linear(weights.delta.expand)

    def forward(self, hidden_states: Tensor, cache_params: PrefillRow, **_: Any) -> Tensor:
        """[1, T, H] -> [1, T, H]: appends T tokens to the row."""
        past, place = cache_params, self._place
        given = self.input(hidden_states[0])
        out = self._values(given, past.before(place), (past.states[place], past.rings[place]), past.start)
        result: Tensor = self.output(out)
        return result[None]

    def compile_kernels(self) -> None:
        """Compiles the kernels without a launch; those of one layer are those of all. See `graphs.in_parallel`."""
        kind, weight = self._kind, self.input.weight
        given, ring = weight.new_empty(1, kind.qkv), weight.new_empty(kind.kernel, kind.channels)
        state = torch.empty(kind.value_heads, kind.value_dim, kind.key_dim, device=weight.device)
        self._values(given, (state, ring), (state, ring), 0, compiles=True)

    def _values(
        self, given: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], start: int,
        *, compiles: bool = False,
    ) -> Tensor:  # fmt: skip
        """The input [T, width] of the output product, from the products [T, qkv] of the layer's input. Writes state and
        ring `after` the chunk from those `before` it, or only compiles."""
        kind, small, num_tokens = self._kind, self._weights.delta, len(given)
        assert small is not None
        run = partial(launch, compiles=compiles)
        mixed, out = given.new_empty(num_tokens, kind.channels), given.new_empty(num_tokens, kind.width)
        gates = given[:, kind.channels :]
        if self.expand is not None:
            gates = self.expand(gates[:, : 2 * kind.rank])
        block, values = min(CHANNELS, pow2(kind.channels)), divisor(kind.value_dim, SCAN_VALUES)
        run(
            kernels.convolve_chunk, (num_tokens, triton.cdiv(kind.channels, block)),
            given, small.conv, before[1], after[1], mixed, start, num_tokens,
            CHANNELS=kind.channels, WIDTH=kind.qkv, KERNEL=kind.kernel, BC=block, num_warps=4,
        )  # fmt: skip
        run(
            kernels.scan_chunk, (kind.value_dim // values, kind.value_heads),
            mixed, given, gates, small.decay, small.shift, before[0], after[0], out, start, num_tokens,
            BV=values, **_heads(kind), **_rates(kind, gates), num_warps=1,
        )  # fmt: skip
        run(
            kernels.gate_chunk, (num_tokens, kind.value_heads),
            out, gates, small.norm, out, self._eps, STRIDE=gates.stride(0), VALUE_HEADS=kind.value_heads,
            DV=kind.value_dim, SIGMOID=kind.sigmoid, num_warps=1,
        )  # fmt: skip
        return out


def _heads(kind: DeltaKind) -> dict[str, Any]:
    """Constants of a kernel that reads queries, keys and values."""
    sizes = (kind.key_heads, kind.value_heads, kind.key_dim, kind.value_dim)
    return dict(zip(("KEY_HEADS", "VALUE_HEADS", "DK", "DV"), sizes, strict=True))


def _rates(kind: DeltaKind, gates: Tensor) -> dict[str, Any]:
    """Constants of a kernel that reads betas, and decays behind the gates of the norm."""
    sizes = {"WIDTH": kind.qkv, "STRIDE": gates.stride(0)}
    return sizes | {"BY_CHANNEL": kind.by_channel, "BOUND": kind.bound, "ROUNDS": kind.rounds}


def _linear(weight: Matrix) -> nn.Linear:
    """The module of a product, with the weight as it is."""
    assert isinstance(weight, Tensor), "products of a delta net are in the model's dtype"
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
