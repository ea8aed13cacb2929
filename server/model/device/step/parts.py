"""The parts that a model's layers are made of, as switches of the kernels.

A part says what is computed, not which family computes it: `capture` finds the parts of a model, `DecodeShape` holds
them, and the kernels get them as constants. The kinds of routers are in `router_kind`. Invariant: the defaults are the
parts of Qwen3-MoE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GateKind:
    """The product between an expert's two matrices: (up + shift) * gate * sigmoid(alpha * gate).

    Attributes:
        limit: gate is at most this, and up between minus this and this, before the product; 0: no limit.
    """

    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0

    @property
    def constants(self) -> tuple[float, float, float]:
        """As the kernels get it; see `kernels.trunk.gated`."""
        return self.alpha, self.limit, self.shift


SILU = GateKind()


@dataclass(frozen=True)
class ExpertKind:
    """The parts of a routed expert, whose span is gate_up [2I, H], its bias [2I], down [H, I], its bias [H].

    Attributes:
        alternates: rows of gate and up alternate, gate first; else all rows of gate come first.
        bias: dtype of the two biases in a span; None: there are none.
    """

    gate: GateKind = SILU
    alternates: bool = False
    bias: torch.dtype | None = None


PLAIN_EXPERT = ExpertKind()


@dataclass(frozen=True)
class Scales:
    """Factors of a token's embedding, of what a layer adds to the residual stream, of the logits, and of the sum of a
    token's routed experts beside its shared one."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    routed: float = 1.0


UNSCALED = Scales()
