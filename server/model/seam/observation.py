"""The norms of the experts' outputs, recorded while a model serves: calibration's measurements, for a sample of steps.

The experts' forward computes the unweighted outputs anyway, so recording their norms costs a few small operations a
layer and changes no result. Invariant: `take` returns the norms of the last forward alone; the next forward overwrites
the norms of one that failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from extractor.statistics.channels import ChannelSquares


@dataclass(frozen=True)
class ExpertOutputs:
    """The norms of the experts' outputs over T tokens.

    Attributes:
        norms: float32 [L, T, K], ‖E(h)‖ of each pick; 0 where it does not exist.
        changes: float32 [L, T], 1 − cos(h, h + out).
    """

    norms: npt.NDArray[np.float32]
    changes: npt.NDArray[np.float32]

    def select(self, tokens: Sequence[int]) -> ExpertOutputs:
        """The same for some of the tokens, in the order given."""
        return ExpertOutputs(self.norms[:, tokens], self.changes[:, tokens])

    @staticmethod
    def concat(parts: Sequence[ExpertOutputs]) -> ExpertOutputs:
        """Join the norms of several forwards, as if one forward had run over all their tokens."""
        norms, changes = ([getattr(part, name) for part in parts] for name in ("norms", "changes"))
        return ExpertOutputs(np.concatenate(norms, axis=1), np.concatenate(changes, axis=1))


@runtime_checkable
class ShowsOutputs(Protocol):
    """One MoE layer's experts. They pass the outputs of every forward to an observer while it is on."""

    observer: OutputObserver | None


class OutputObserver:
    """Records the norms of the outputs of each forward while it is on.

    Args:
        num_layers: L.

    Attributes:
        is_on: whether the next forward is recorded; the engine thread sets it between two steps.
        seconds: time spent on recording since the start, on the thread that runs the model.
        channels: gets the squares of the experts' inputs by channel too; None while nobody wants them.
    """

    def __init__(self, num_layers: int) -> None:
        self.is_on = False
        self.seconds = 0.0
        self.channels: ChannelSquares | None = None
        self._norms: list[Tensor | None] = [None] * num_layers
        self._changes: list[Tensor | None] = [None] * num_layers

    def note(self, layer: int, hidden: Tensor, outputs: Tensor, result: Tensor) -> None:
        """Record one layer: its input [T, H], every pick's output [T·K, H] in order of tokens, and their sum [T, H]."""
        started = time.perf_counter()
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
        self._norms[layer] = norms.view(len(hidden), -1)
        before = hidden.float()
        self._changes[layer] = 1 - torch.nn.functional.cosine_similarity(before, before + result.float(), dim=-1)
        if self.channels is not None:
            self.channels.add_input(layer, _squares(hidden))
        self.seconds += time.perf_counter() - started

    def note_inner(self, layer: int, expert: int, inner: Tensor) -> None:
        """Record one expert's activations [N, I], the input of its second matrix, of N of its picks."""
        if self.channels is not None:
            self.channels.add_inner(layer, expert, _squares(inner), len(inner))

    def take(self) -> ExpertOutputs | None:
        """Return the norms of the forward that just ended, and forget them; None if it was not recorded."""
        if not self.is_on:
            return None
        started = time.perf_counter()
        norms = [part for part in self._norms if part is not None]
        changes = [part for part in self._changes if part is not None]
        self._norms, self._changes = [None] * len(self._norms), [None] * len(self._changes)
        if len(norms) != len(self._norms):
            return None
        taken = ExpertOutputs(torch.stack(norms).cpu().numpy(), torch.stack(changes).cpu().numpy())
        self.seconds += time.perf_counter() - started
        return taken


def _squares(values: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(values.float().square().sum(dim=0, dtype=torch.float64).cpu().numpy())


def observe_outputs(model: Any, num_layers: int) -> OutputObserver | None:
    """An observer of the experts' outputs; None if the experts of this model do not give them."""
    from server.model.seam.experts import LAYER_ATTRIBUTE

    layers = [getattr(module, LAYER_ATTRIBUTE, None) for module in model.modules()]
    ours = [layer for layer in layers if isinstance(layer, ShowsOutputs)]
    if len(ours) != num_layers:
        return None
    observer = OutputObserver(num_layers)
    for layer in ours:
        layer.observer = observer
    return observer
