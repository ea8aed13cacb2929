"""Launches of causal convolutions: over a prompt's chunk, and short convolutions as layers of their own.

See `kernels.convolution`; `step.mixers.states` says how layers use these.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
from torch import Tensor

from server.model.device.kernels import convolution as kernels
from server.model.device.step.parts import ConvolutionKind, StateKind
from server.model.device.step.state import RowState
from server.model.device.step.tuning import Tuning, divisor, pow2
from server.model.device.step.weights import ConvolutionWeights, DecodeShape, LayerWeights

CHANNELS = 1024
"""Most channels of a program over a chunk."""
STEP_CHANNELS = 256
"""Most channels of a program of a step."""


class ConvolutionRule:
    """The short convolutions of a step's entries; mutates the rows' rings.

    Args:
        rows, run: see `states.state_rule`; the other arguments are those that a rule of another kind needs.
    """

    def __init__(
        self, shape: DecodeShape, state: RowState, tuning: Tuning, rows: Tensor, run: Callable[..., None],
        product: Callable[..., None],
    ) -> None:  # fmt: skip
        self._state, self._rows, self._run = state, rows, run

    def step(self, layer: int, kind: ConvolutionKind, weights: LayerWeights, given: Tensor, out: Tensor) -> None:
        """See `states.StateRule`."""
        small, state = weights.convolution, self._state
        assert small is not None
        block = divisor(kind.channels, STEP_CHANNELS)
        self._run(
            kernels.convolve_step, (kind.channels // block, len(self._rows)),
            given, *weight_and_bias(small), self._rows, state.lengths, state.rings[state.places[layer]], out,
            CHANNELS=kind.channels, KERNEL=kind.kernel, BC=block, BIAS=small.bias is not None, num_warps=4,
        )  # fmt: skip


def convolution_chunk(
    run: Callable[..., None], kind: ConvolutionKind, eps: float, weights: LayerWeights, given: Tensor,
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], start: int,
) -> Tensor:  # fmt: skip
    """A short convolution; see `states.Chunk`."""
    assert weights.convolution is not None
    return convolve(run, kind, weights.convolution, given, before[1], after[1], start, gated=True)


def convolve(
    run: Callable[..., None], kind: StateKind, weights: ConvolutionWeights, given: Tensor, ring: Tensor, after: Tensor,
    start: int, *, gated: bool = False,
) -> Tensor:  # fmt: skip
    """The convolution [T, channels] of the first columns of given [T, qkv], from the row's ring before the chunk;
    writes the ring after it. See `kernels.convolution.convolve_chunk`."""
    num_tokens, block = len(given), min(CHANNELS, pow2(kind.channels))
    out = given.new_empty(num_tokens, kind.channels)
    run(
        kernels.convolve_chunk, (num_tokens, triton.cdiv(kind.channels, block)),
        given, *weight_and_bias(weights), ring, after, out, start, num_tokens,
        CHANNELS=kind.channels, WIDTH=kind.qkv, KERNEL=kind.kernel, BC=block, BIAS=weights.bias is not None,
        GATED=gated, num_warps=4,
    )  # fmt: skip
    return out


def weight_and_bias(weights: ConvolutionWeights) -> tuple[Tensor, Tensor]:
    """As the kernels take them: the weight stands in the place of a bias that is not there."""
    return weights.weight, weights.weight if weights.bias is None else weights.bias
