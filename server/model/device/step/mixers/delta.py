"""Launches of gated delta nets: for the new tokens of a step, and for a prompt's chunk. See `kernels.delta`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from server.model.device.kernels import delta as kernels
from server.model.device.step.mixers.convolution import convolve
from server.model.device.step.parts import DeltaKind
from server.model.device.step.state import RowState
from server.model.device.step.tuning import Tuning, divisor
from server.model.device.step.weights import DecodeShape, LayerChanges, LayerWeights

SCAN_VALUES = 4
"""Values of a program of the scan, which one warp holds with their states: its sums need no other warp."""


class DeltaRule:
    """The delta nets of a step's entries; mutates the rows' states.

    Args:
        rows, run, product: see `states.state_rule`.
    """

    def __init__(
        self, shape: DecodeShape, state: RowState, tuning: Tuning, rows: Tensor, run: Callable[..., None],
        product: Callable[..., None],
    ) -> None:  # fmt: skip
        self._eps, self._state, self._tuning, self._rows, self._run = shape.eps, state, tuning, rows, run
        self._product, kind = product, next(iter(shape.stateful.values()))
        assert isinstance(kind, DeltaKind)
        self._parts = rows.new_zeros(len(rows) * kind.width, dtype=shape.dtype)
        self._gates = rows.new_zeros(len(rows), kind.gates if kind.rank else 0, dtype=shape.dtype)
        self._arrived = rows.new_zeros(len(rows) * kind.value_heads)

    def step(self, layer: int, kind: DeltaKind, weights: LayerWeights, given: Tensor, out: Tensor) -> None:
        """See `states.StateRule`."""
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
            given, gates, small.conv.weight, small.decay, small.shift, small.norm, self._rows, state.lengths,
            state.rings[place], state.states[place], self._parts, self._arrived, out, self._eps,
            BV=values, KERNEL=kind.kernel, **_heads(kind), **_rates(kind, gates), SIGMOID=kind.sigmoid,
            num_warps=self._tuning.delta_warps,
        )  # fmt: skip


def delta_chunk(
    run: Callable[..., None], kind: DeltaKind, eps: float, weights: LayerWeights, given: Tensor,
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], start: int, expand: nn.Module | None = None,
) -> Tensor:  # fmt: skip
    """See `states.Chunk`; `expand` is the product of latents, None without."""
    small, num_tokens = weights.delta, len(given)
    assert small is not None
    gates = given[:, kind.channels :]
    if expand is not None:
        gates = expand(gates[:, : 2 * kind.rank])
    mixed = convolve(run, kind, small.conv, given, before[1], after[1], start)
    out, values = given.new_empty(num_tokens, kind.width), divisor(kind.value_dim, SCAN_VALUES)
    run(
        kernels.scan_chunk, (kind.value_dim // values, kind.value_heads),
        mixed, given, gates, small.decay, small.shift, before[0], after[0], out, start, num_tokens,
        BV=values, **_heads(kind), **_rates(kind, gates), num_warps=1,
    )  # fmt: skip
    run(
        kernels.gate_chunk, (num_tokens, kind.value_heads),
        out, gates, small.norm, out, eps, STRIDE=gates.stride(0), VALUE_HEADS=kind.value_heads,
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
