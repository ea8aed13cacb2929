"""Launches of Mamba-2 layers: for the new tokens of a step, and for a prompt's chunk. See `kernels.mamba`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from server.model.device.kernels import mamba as kernels
from server.model.device.step.mixers.convolution import convolve, weight_and_bias
from server.model.device.step.parts import MambaKind
from server.model.device.step.state import RowState
from server.model.device.step.tuning import Tuning, divisor, pow2
from server.model.device.step.weights import DecodeShape, LayerWeights

SCAN_VALUES = 4
"""Values of a program over a chunk, which one warp holds with their states: its sums need no other warp."""


class MambaRule:
    """The Mamba-2 layers of a step's entries; mutates the rows' states.

    Args:
        rows, run: see `states.state_rule`; `product` is for rules of another kind.
    """

    def __init__(
        self, shape: DecodeShape, state: RowState, tuning: Tuning, rows: Tensor, run: Callable[..., None],
        product: Callable[..., None],
    ) -> None:  # fmt: skip
        self._eps, self._state, self._tuning, self._rows, self._run = shape.eps, state, tuning, rows, run
        kind = next(iter(shape.stateful.values()))
        assert isinstance(kind, MambaKind)
        self._parts = rows.new_zeros(len(rows) * kind.width, dtype=torch.float32)
        self._arrived = rows.new_zeros(len(rows) * kind.norms)

    def step(self, layer: int, kind: MambaKind, weights: LayerWeights, given: Tensor, out: Tensor) -> None:
        """See `states.StateRule`."""
        small, state, place = weights.mamba, self._state, self._state.places[layer]
        assert small is not None
        conv, values = small.conv, divisor(kind.value_dim, self._tuning.delta_values)
        self._run(
            kernels.mamba_step, (kind.value_dim // values, kind.heads, len(self._rows)),
            given, *weight_and_bias(conv), small.decay, small.shift, small.skip, small.norm, self._rows, state.lengths,
            state.rings[place], state.states[place], self._parts, self._arrived, out, self._eps,
            **_sizes(kind), BV=values, NORMS=kind.norms, NP=pow2(kind.width // kind.norms),
            KERNEL=kind.kernel, BIAS=conv.bias is not None, num_warps=self._tuning.delta_warps,
        )  # fmt: skip


def mamba_chunk(
    run: Callable[..., None], kind: MambaKind, eps: float, weights: LayerWeights, given: Tensor,
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], start: int,
) -> Tensor:  # fmt: skip
    """See `states.Chunk`."""
    small, num_tokens = weights.mamba, len(given)
    assert small is not None
    mixed = convolve(run, kind, small.conv, given, before[1], after[1], start)
    values, size = divisor(kind.value_dim, SCAN_VALUES), kind.width // kind.norms
    scanned = given.new_empty(num_tokens, kind.width, dtype=torch.float32)
    out = given.new_empty(num_tokens, kind.width)
    run(
        kernels.mamba_chunk, (kind.value_dim // values, kind.heads),
        mixed, given, small.decay, small.shift, small.skip, before[0], after[0], scanned, start, num_tokens,
        **_sizes(kind), BV=values, num_warps=1,
    )  # fmt: skip
    run(
        kernels.norm_chunk, (num_tokens, kind.norms),
        scanned, given, small.norm, out, eps, GATE_AT=kind.channels, WIDTH=kind.width, GIVEN=kind.qkv, SIZE=size,
        NP=pow2(size), num_warps=4,
    )  # fmt: skip
    return out


def _sizes(kind: MambaKind) -> dict[str, Any]:
    """Constants of both kernels."""
    return {
        "GROUPS": kind.groups, "HEADS": kind.heads, "DK": kind.key_dim, "DV": kind.value_dim, "LEAST": kind.least,
        "MOST": kind.most,
    }  # fmt: skip
