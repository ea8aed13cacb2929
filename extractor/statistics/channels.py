"""Squares of the experts' inputs by channel: how much an error in each column of their matrices matters.

`gate_up_proj` is multiplied with the MoE layer's input, `down_proj` with what lies between the two. Invariant: all
numbers are sums over tokens, so those of two runs add up to those of one run over both texts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]


class ChannelSquares:
    """Sums of squares; layers may differ in width, and have the width 0 until tokens were added.

    Attributes:
        input: of each MoE layer, Σ h² over tokens, float64 [H].
        inner: of each MoE layer, Σ of squares over the picks of each expert, float64 [E, I].
        picks: numbers of those picks, float64 [L, E].
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.input: list[Float] = [np.zeros(0) for _ in range(num_layers)]
        self.inner: list[Float] = [np.zeros((num_experts, 0)) for _ in range(num_layers)]
        self.picks: Float = np.zeros((num_layers, num_experts))

    def add_input(self, layer: int, squares: Float) -> None:
        """Add the sums [H] over some tokens."""
        self.input[layer] = _added(self.input[layer], squares)

    def add_inner(self, layer: int, expert: int, squares: Float, picks: float) -> None:
        """Add the sums [I] over some picks of an expert."""
        if not self.inner[layer].size:
            self.inner[layer] = np.zeros((len(self.inner[layer]), len(squares)))
        self.inner[layer][expert] += squares
        self.picks[layer, expert] += picks

    def add(self, other: ChannelSquares) -> None:
        """Add the sums over other tokens of the same checkpoint."""
        for mine, theirs in ((self.input, other.input), (self.inner, other.inner)):
            mine[:] = [_added(*pair) for pair in zip(mine, theirs, strict=True)]
        self.picks = self.picks + other.picks


def _added(mine: Float, theirs: Float) -> Float:
    return mine + theirs if mine.size and theirs.size else (mine if mine.size else theirs.copy())
