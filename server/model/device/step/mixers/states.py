"""The layers that keep a state of fixed size in the place of attention: their rules in a step, their chunks of prompts.

A `StateLayer` stands for transformers' own module in a model that is served. Invariant: a chunk changes nothing of the
row but what `PrefillRow.commit` later makes the row's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from server.model.device.step.launch import launch
from server.model.device.step.mixers.convolution import ConvolutionRule, convolution_chunk
from server.model.device.step.mixers.delta import DeltaRule, delta_chunk
from server.model.device.step.mixers.mamba import MambaRule, mamba_chunk
from server.model.device.step.parts import ConvolutionKind, DeltaKind, MambaKind, StateKind
from server.model.device.step.state import PrefillRow, RowState
from server.model.device.step.tuning import Tuning
from server.model.device.step.weights import DecodeShape, LayerWeights, Matrix


class StateRule(Protocol):
    """The layers of one kind for a step's entries; mutates the rows' states."""

    def step(self, layer: int, kind: Any, weights: LayerWeights, given: Tensor, out: Tensor) -> None:
        """From given [B, qkv] into the first elements of out, [B, width]; the rows' states get the token."""


Chunk = Callable[..., Tensor]
"""The input [T, width] of a layer's output product, from the products [T, qkv] of the layer's input: chunk(run, kind,
eps, weights, given, before, after, start) writes state and ring `after` the chunk of a row from those `before` it;
`run` launches its kernels, or only compiles them, and `start` is the number of tokens before the chunk."""

_RULES: dict[type[StateKind], Callable[..., StateRule]] = {
    ConvolutionKind: ConvolutionRule, DeltaKind: DeltaRule, MambaKind: MambaRule,
}  # fmt: skip
_CHUNKS: dict[type[StateKind], Chunk] = {
    ConvolutionKind: convolution_chunk, DeltaKind: delta_chunk, MambaKind: mamba_chunk,
}  # fmt: skip


def state_rule(
    shape: DecodeShape, state: RowState, tuning: Tuning, rows: Tensor, run: Callable[..., None],
    product: Callable[..., None],
) -> StateRule | None:  # fmt: skip
    """The rule of the model's layers with a state; None if there are none.

    Args:
        rows: [B], row of each entry.
        run: launches a kernel; of `DecodeStep`, as the next.
        product: multiplies all entries with a weight.
    """
    kind = next(iter(shape.stateful.values()), None)
    if kind is None:
        return None
    return _RULES[type(kind)](shape, state, tuning, rows, run, product)


class StateLayer(nn.Module):
    """The forward of one layer over `PrefillRow`. Adapters change its products, which are modules: `input`, `output`
    and `expand` (of a delta net's latents; None without).

    Args:
        kind, weights: of the layer, whose tensors others own; eps: of its norm; place: its number among the layers that
            keep a state.
    """

    def __init__(self, kind: StateKind, eps: float, weights: LayerWeights, place: int) -> None:
        super().__init__()
        self._kind, self._eps, self._weights, self._place = kind, eps, weights, place
        expand = None if weights.delta is None else weights.delta.expand
        self.input, self.output = _linear(weights.qkv, weights.qkv_bias), _linear(weights.output, weights.output_bias)
        self.expand = None if expand is None else _linear(expand)

    def forward(
        self, hidden_states: Tensor, cache_params: PrefillRow | None = None, past_key_values: PrefillRow | None = None,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        """[1, T, H] -> [1, T, H]: appends T tokens to the row, which families pass by one of two names."""
        past, place = past_key_values if cache_params is None else cache_params, self._place
        assert past is not None, "a layer with a state reads a row"
        given = self.input(hidden_states[0])
        out = self._values(given, past.before(place), (past.states[place], past.rings[place]), past.start)
        result: Tensor = self.output(out)
        return result[None]

    def compile_kernels(self) -> None:
        """Compiles the kernels without a launch; those of one layer are those of all. See `graphs.in_parallel`."""
        kind, weight = self._kind, self.input.weight
        given, ring = weight.new_empty(1, kind.qkv), weight.new_empty(kind.kernel, kind.channels)
        state = torch.empty(kind.state, device=weight.device)
        self._values(given, (state, ring), (state, ring), 0, compiles=True)

    def _values(
        self, given: Tensor, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], start: int,
        *, compiles: bool = False,
    ) -> Tensor:  # fmt: skip
        run, kind = partial(launch, compiles=compiles), self._kind
        more = {} if self.expand is None else {"expand": self.expand}
        return _CHUNKS[type(kind)](run, kind, self._eps, self._weights, given, before, after, start, **more)


def _linear(weight: Matrix, bias: Tensor | None = None) -> nn.Linear:
    """The module of a product, with weight and bias as they are."""
    assert isinstance(weight, Tensor), "products of a layer with a state are in the model's dtype"
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
