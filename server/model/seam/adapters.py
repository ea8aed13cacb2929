"""Adapters at work: the changes that the tokens of masked rows see in the trunk's linear layers, norms and routers.

Invariant: a token without an adapter keeps the bits that it has without this module, and a row's change does not depend
on the other rows of the step. `expert_store.adapter` has the parts of an adapter and their meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expert_store.adapter import Changes
from expert_store.errors import AdapterError
from server.model.seam.rows import is_decode


@dataclass(frozen=True)
class Part:
    """The tokens of a step that share an adapter.

    Attributes:
        changes: of the adapter, by module and part, on the model's device.
        tokens: int64 [N], positions among the step's tokens; None: all of them.
        share: [N, 1], the factor of each token's change, 0 or 1; None: 1 for all.
    """

    changes: Changes
    tokens: Tensor | None
    share: Tensor | None = None

    def of(self, change: Tensor) -> Tensor:
        """The change [N, ..] of its tokens."""
        return change if self.share is None else change * self.share.to(change.dtype)


class StepAdapters:
    """The adapters of a model, and the tokens of the current step that have one."""

    def __init__(self) -> None:
        self._known: dict[str, Changes] = {}
        self._names: dict[nn.Module, str] = {}
        self._products: dict[nn.Module, str] = {}  # the name of a router's product, by router
        self._parts: Sequence[Part] = ()
        self._num_tokens = 0

    @property
    def is_on(self) -> bool:
        """Whether a token of the step has an adapter."""
        return bool(self._parts)

    def add(self, name: str, changes: Changes, device: torch.device, dtype: torch.dtype | None) -> None:
        """Rows may have the adapter `name` from now on; its tensors are on the device, in `dtype` (None: their own)."""
        self._known[name] = {
            module: {part: tensor.to(device, dtype) for part, tensor in parts.items()}
            for module, parts in changes.items()
        }

    def install(self, model: nn.Module, modules: Iterable[str], routers: Mapping[nn.Module, nn.Module | None]) -> None:
        """Hook the modules of the model that adapters change.

        Args:
            routers: each with its product, whose change is one of the router's logits (None: it has none of this kind);
                their hooks are those of `StepRouting`.

        Raises AdapterError: the model has no such module.
        """
        found = dict(model.named_modules())
        owners = {product: router for router, product in routers.items() if product is not None}
        for name in modules:
            module = found.get(name)
            if module is None:
                raise AdapterError(
                    f"an adapter changes {name}, which this model does not have: train one for this model"
                )
            if module not in self._names:
                self._names[module] = name
                if module in owners:
                    self._products[owners[module]] = name
                elif module not in routers:
                    module.register_forward_hook(partial(self._changed, name))

    def begin_rows(self, num_rows: int, tokens_per_row: int, names: Sequence[str | None]) -> None:
        """Start a step in which each row has the adapter of that name; no names at all: no adapter."""
        parts = []
        for name in dict.fromkeys(name for name in names if name is not None):
            rows = [row for row, own in enumerate(names) if own == name]
            changes = self._known[name]
            tokens = None
            if len(rows) < num_rows:
                device = next(iter(next(iter(changes.values())).values())).device
                starts = torch.tensor(rows, device=device) * tokens_per_row
                tokens = (starts[:, None] + torch.arange(tokens_per_row, device=device)).flatten()
            parts.append(Part(changes, tokens))
        self.begin(num_rows * tokens_per_row, parts)

    def begin(self, num_tokens: int, parts: Sequence[Part]) -> None:
        """Start a step of `num_tokens` tokens, of which those of `parts` have an adapter."""
        self._num_tokens, self._parts = num_tokens, parts

    def end(self) -> None:
        """Forget the step: a forward outside a step sees no adapter."""
        self._parts = ()

    def logits(self, router: nn.Module, hidden: Tensor, logits: Tensor) -> Tensor:
        """A router's logits [T, E] for hidden [T, H], changed where a token has an adapter."""
        names = (self._names.get(router, ""), self._products.get(router, ""))
        for part, name in product(self._parts, names):
            parts = part.changes.get(name, {})
            if "delta" in parts or "lora_A" in parts:
                rows = hidden if part.tokens is None else hidden[part.tokens]
                logits = _added(logits, part.tokens, part.of(self._linear(parts, rows)).to(logits.dtype))
        return logits

    def weights(self, router: nn.Module, index: Tensor, weights: Tensor) -> Tensor:
        """The weights of the chosen experts, index and weights [T, K], changed where a token has an adapter."""
        name = self._names.get(router)
        for part in self._parts:
            gain = part.changes.get(name or "", {}).get("gain")
            if gain is not None:
                tokens = part.tokens
                chosen, own = (index, weights) if tokens is None else (index[tokens], weights[tokens])
                factor = 1 + part.of(
                    _taken(functional.pad(gain, (0, 1)), chosen)
                )  # a pick that does not exist has id E
                weights = _replaced(weights, tokens, own * factor.to(own.dtype))
        return weights

    def _changed(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The forward hook of a linear layer, a norm or a layer's experts."""
        if not self._parts:
            return None
        flat = output.reshape(self._num_tokens, -1, output.shape[-1])
        for part in self._parts:
            parts, tokens = part.changes.get(name), part.tokens
            if parts is None:
                continue
            if "scale" in parts:
                own = flat if tokens is None else flat[tokens]
                scale = parts["scale"] if part.share is None else parts["scale"] * part.share[:, None]
                flat = _replaced(flat, tokens, own * (1 + scale).to(own.dtype))
            else:
                x = args[0].reshape(self._num_tokens, args[0].shape[-1])
                change = self._linear(parts, x if tokens is None else x[tokens])
                flat = _added(flat, tokens, part.of(change)[:, None].to(flat.dtype))
        return flat.view_as(output)

    def _linear(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The change of a linear layer's or of experts' output for x [N, in]; in decode steps each row is computed by
        itself."""
        if is_decode(self._num_tokens) and len(x) > 1:
            return torch.cat([_product(parts, row) for row in torch.split(x, 1)])
        return _product(parts, x)


def _product(parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if "delta" in parts:
        return functional.linear(x, parts["delta"].to(x.dtype))
    if "down" in parts:
        gate, up, down = (parts[part].to(x.dtype) for part in ("gate", "up", "down"))
        return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
    return functional.linear(functional.linear(x, parts["lora_A"].to(x.dtype)), parts["lora_B"].to(x.dtype))


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """values [N] at index [T, K]; in training by a product, since many additions to one number would wait in line."""
    if not values.requires_grad:
        return values[index]
    return (index[..., None] == torch.arange(len(values), device=index.device)).to(values.dtype) @ values


def _added(values: Tensor, tokens: Tensor | None, change: Tensor) -> Tensor:
    return values + change if tokens is None else values.index_add(0, tokens, change)


def _replaced(values: Tensor, tokens: Tensor | None, own: Tensor) -> Tensor:
    return own if tokens is None else values.index_copy(0, tokens, own)
