"""The input and output of a gating rule: a call of a router, and the router's output with other picks.

Invariant: the output keeps its shapes, its dtypes and the order of its parts, which differs between families. Source:
the router modules of transformers 5.17 to 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

Output = tuple[Tensor, ...]


@dataclass(frozen=True)
class Picks:
    """A router's output by name: logits [T, E], weights [T, K] and index [T, K] of the chosen experts, and the rest.

    Routers return (logits, weights, index, ...); some of older transformers return (index, weights, logits).
    """

    logits: Tensor
    weights: Tensor
    index: Tensor
    rest: Output
    index_first: bool

    @staticmethod
    def of(output: Output) -> Picks:
        """Reads a router's output tuple, in either order."""
        index_first = not output[0].is_floating_point()
        first, weights, third, *rest = output
        logits, index = (third, first) if index_first else (first, third)
        return Picks(logits, weights, index, tuple(rest), index_first)

    def replaced(
        self,
        weights: Tensor,
        index: Tensor,
        exists: Tensor,
        mask: Tensor,
        rest: Output | None = None,
        temperature: Tensor | None = None,
    ) -> Output:
        """The output tuple with other picks [T, K]: sentinel E and weight 0 where `exists` is False.

        `mask` is [T, E]; rows that mask nothing at temperature 1 keep the stock values. `rest` replaces what follows
        the picks.
        """
        stock = mask.all(dim=-1, keepdim=True)
        if temperature is not None:
            stock = stock & (temperature == 1.0)[:, None]
        weights = torch.where(exists, weights, 0.0).to(self.weights.dtype)
        index = torch.where(exists, index, mask.shape[-1]).to(self.index.dtype)
        weights = torch.where(stock, self.weights, weights)
        index = torch.where(stock, self.index, index)
        first, third = (index, self.logits) if self.index_first else (self.logits, index)
        return (first, weights, third, *(self.rest if rest is None else rest))


@dataclass(frozen=True)
class RouterCall:
    """One call of a router module: its arguments and its output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    picks: Picks

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> Self:
        """The call `module(*args, **kwargs)`, which returned `output`."""
        return cls(module, args, kwargs, Picks.of(output))

    @property
    def hidden_states(self) -> Tensor:
        """The hidden states that the router scored, [T, H]."""
        hidden: Tensor = self.argument(0, "hidden_states")
        return hidden.reshape(-1, hidden.shape[-1])

    def argument(self, position: int, name: str) -> Any:
        """The forward argument given by keyword or at `position`; None if absent."""
        return self.kwargs[name] if name in self.kwargs else self.args[position] if position < len(self.args) else None


class GatingRule(Protocol):
    """The gating rule of one family under a mask. `takes_temperature`: whether its logits may be divided; `takes_mask`:
    whether experts may be hidden."""

    @property
    def takes_temperature(self) -> bool: ...

    @property
    def takes_mask(self) -> bool: ...

    def masked(self, call: RouterCall, mask: Tensor, temperature: Tensor | None = None) -> Output:
        """The output that the router would give in a checkpoint without the masked experts.

        `mask` is bool [T, E] on the call's device, True = available, one row per token. Returns the output of the call
        with weights and index replaced, in the same shapes and dtypes; nothing is mutated. A pick that does not exist
        carries index E and weight 0. Rows whose mask is all True keep the stock values bit for bit.

        `temperature` [T] > 0 divides the logits before they are scored; None, or 1 for a row, leaves them as they are.
        Only rules with `takes_temperature` read it.
        """
