"""The norms of what experts put out, noted while a model serves: what calibration measures, for a sample of steps.

The experts' forward has the unweighted outputs in hand, so noting them costs a few small operations a layer and
changes nothing. Invariant: what is taken was noted by the forward that just ended; one that fails is noted over.
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


@dataclass(frozen=True)
class ExpertOutputs:
    """What the experts put out over T tokens.

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
        """The outputs of several forwards as those of one over all their tokens."""
        norms, changes = ([getattr(part, name) for part in parts] for name in ("norms", "changes"))
        return ExpertOutputs(np.concatenate(norms, axis=1), np.concatenate(changes, axis=1))


@runtime_checkable
class ShowsOutputs(Protocol):
    """One MoE layer's experts that tell an observer of every forward, while it is on."""

    observer: OutputObserver | None


class OutputObserver:
    """Notes the outputs of the forward under way, where it is on.

    Args:
        num_layers: L.

    Attributes:
        is_on: whether the next forward is noted; the engine thread sets it between two steps.
        seconds: that noting took since start, on the thread that runs the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.is_on = False
        self.seconds = 0.0
        self._norms: list[Tensor | None] = [None] * num_layers
        self._changes: list[Tensor | None] = [None] * num_layers

    def note(self, layer: int, hidden: Tensor, outputs: Tensor, result: Tensor) -> None:
        """Note one layer: its input [T, H], every pick's output [T·K, H] in order of tokens, and their sum [T, H]."""
        started = time.perf_counter()
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
        self._norms[layer] = norms.view(len(hidden), -1)
        before = hidden.float()
        self._changes[layer] = 1 - torch.nn.functional.cosine_similarity(before, before + result.float(), dim=-1)
        self.seconds += time.perf_counter() - started

    def take(self) -> ExpertOutputs | None:
        """What the forward that just ended noted, and forget it; None where it was not noted."""
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


def observe_outputs(model: Any, num_layers: int) -> OutputObserver | None:
    """An observer of what the experts of a transformers model put out; None where they do not show it."""
    from server.model.seam.experts import LAYER_ATTRIBUTE

    layers = [getattr(module, LAYER_ATTRIBUTE, None) for module in model.modules()]
    ours = [layer for layer in layers if isinstance(layer, ShowsOutputs)]
    if len(ours) != num_layers:
        return None
    observer = OutputObserver(num_layers)
    for layer in ours:
        layer.observer = observer
    return observer
