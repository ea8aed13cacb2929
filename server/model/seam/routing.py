"""Masked routing at the model's routers, and the record of each step's demanded and served experts.

A forward hook on every router module receives transformers' own result. Without a mask the hook does not change it, so
unmasked routing is exact; with a mask, the family's gating rule chooses as if the masked experts did not exist.
Invariant: between `begin` and `finish` each MoE layer's router runs exactly once over the step's tokens. A row's choice
depends on its own tokens, mask and temperature alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from router.errors import UnsupportedGatingError
from router.gating import GatingRule, Picks, RouterCall, find_gating_rule
from router.gating.rules import TopKRule
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.seam.adapters import Part, StepAdapters


@dataclass(frozen=True)
class RowShare:
    """Demanded and missed router mass of each sequence in a step, for its deficit.

    Attributes:
        demanded, missed: float64 [B, L].
    """

    demanded: np.ndarray[Any, np.dtype[np.float64]]
    missed: np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class _LayerStep:
    served_index: Tensor
    served_weight: Tensor
    demand_index: Tensor
    demand_weight: Tensor
    missed: Tensor | None


class StepRouting:
    """Chooses experts under masks and records a step's routing.

    Args:
        model_type: transformers' name of the family, for its gating rule.
        num_layers: L.
        device: device of the routers.
        mask: the mask of every sequence that has no mask of its own.

    Attributes:
        adapters: changes of the trunk for rows that are masked.
    """

    def __init__(self, model_type: str, num_layers: int, device: torch.device, mask: ExpertMask) -> None:
        self._model_type = model_type
        self._device = device
        self._num_layers = num_layers
        self._routers: list[nn.Module | None] = [None] * num_layers
        self._rules: list[GatingRule | None] = [None] * num_layers
        self._steps: list[_LayerStep | None] = [None] * num_layers
        self._table: Tensor | None = None
        self._token_masks: Tensor | None = None
        self._temperature: Tensor | None = None
        self._num_rows = 0
        self._tokens_per_row = 0
        self.adapters = StepAdapters()
        self.set_mask(mask)

    def set_mask(self, mask: ExpertMask) -> None:
        """Set the default mask, from the next step on."""
        self.mask = mask
        self._default = None if mask.is_full else torch.from_numpy(np.array(mask.allowed)).to(self._device)

    def install(self, layer: int, router: nn.Module) -> None:
        """Hook the router of MoE layer `layer`; called once for each layer while the model is assembled."""
        self._routers[layer] = router
        router.register_forward_hook(lambda *call: self._choose(layer, *call), with_kwargs=True)

    def temperature_refusal(self) -> str | None:
        """The reason why the routers' logits cannot be divided by a temperature; None if they can."""
        for layer in range(self._num_layers):
            router = self.router(layer)
            try:
                rule = self._rule(layer, router)
            except UnsupportedGatingError as error:
                return str(error)
            if not rule.takes_temperature:
                return f"the router {type(router).__name__} of {self._model_type} is no plain scored top-k"
        return None

    def mask_refusal(self, mask: ExpertMask | None) -> str | None:
        """The reason why routing cannot keep to a mask; None if it can. Without a mask, one that hides experts of every
        layer is meant."""
        for layer in range(self._num_layers):
            if not self._rule(layer, self.router(layer)).takes_mask and (mask is None or not mask.allowed[layer].all()):
                return f"MoE layer {layer} of {self._model_type} routes by token id, and needs all of its experts"
        return None

    def begin(
        self,
        num_rows: int,
        tokens_per_row: int,
        masks: Sequence[ExpertMask | None] | None = None,
        temperatures: Sequence[float] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> None:
        """Start a step over `num_rows` × `tokens_per_row` tokens.

        Args:
            masks: one for each row, which the caller has intersected with the default; None is the default.
            temperatures: one for each row, which divides the router's logits; None is 1 for all. A row's demand is the
                unmasked choice at its temperature.
            adapters: for each row the name of its adapter, or None; None is none for all. A row's demand is the choice
                of the checkpoint's own router.
        """
        self.adapters.begin_rows(num_rows, tokens_per_row, adapters or ())
        self._num_rows, self._tokens_per_row = num_rows, tokens_per_row
        self._steps = [None] * self._num_layers
        self._table = self._default
        self._token_masks = self._temperature = None
        if temperatures is not None and any(value != 1.0 for value in temperatures):
            rows = torch.tensor(list(temperatures), dtype=torch.float32, device=self._device)
            self._temperature = rows.repeat_interleave(tokens_per_row)  # [T]
        if masks is not None and any(mask is not None for mask in masks):
            table = np.stack([(mask or self.mask).allowed for mask in masks], axis=1)  # [L, B, E]
            self._token_masks = torch.from_numpy(table).to(self._device).repeat_interleave(tokens_per_row, dim=1)

    def begin_tokens(self, num_rows: int, tokens_per_row: int, masks: Tensor, parts: Sequence[Part]) -> None:
        """Start a step whose tokens differ in mask within a row; masks is bool [L, T, E]."""
        self.begin(num_rows, tokens_per_row)
        self._token_masks = masks
        self.adapters.begin(num_rows * tokens_per_row, parts)

    def install_adapters(self, model: nn.Module, modules: Iterable[str]) -> None:
        """Hook the modules of the model that adapters change. Raises AdapterError."""
        routers = {self.router(layer): self._product(layer) for layer in range(self._num_layers)}
        self.adapters.install(model, modules, routers)

    def router(self, layer: int) -> nn.Module:
        """The router of MoE layer `layer`."""
        router = self._routers[layer]
        assert router is not None, f"no router was installed for layer {layer}"
        return router

    def takes_delta(self, layer: int) -> bool:
        """Whether an adapter may change the logits of a layer's router."""
        try:
            rule = self._rule(layer, self.router(layer))
        except UnsupportedGatingError:
            return False
        return isinstance(rule, TopKRule) and rule.scores_returned_logits

    def _product(self, layer: int) -> nn.Module | None:
        """The one linear layer of a router that returns its results as logits; None if the router has another form."""
        products = [child for child in self.router(layer).children() if isinstance(child, nn.Linear)]
        return products[0] if len(products) == 1 and self.takes_delta(layer) else None

    def finish(self) -> tuple[StepRecord, RowShare]:
        """End the step and return its record; the only method that waits for the device."""
        self.adapters.end()
        steps = [step for step in self._steps if step is not None]
        assert len(steps) == self._num_layers, f"{len(steps)} of {self._num_layers} routers ran in the step"
        served_index = torch.stack([step.served_index for step in steps]).cpu().numpy()
        served_weight = torch.stack([step.served_weight for step in steps]).float().cpu().numpy()
        shape = (self._num_layers, self._num_rows, -1)
        if steps[0].missed is None:
            record = StepRecord(served_index, served_weight)
            demanded = served_weight.reshape(shape).sum(axis=2, dtype=np.float64)
            return record, RowShare(demanded.T, np.zeros_like(demanded.T))
        demand_index = torch.stack([step.demand_index for step in steps]).cpu().numpy()
        demand_weight = torch.stack([step.demand_weight for step in steps]).float().cpu().numpy()
        missed = torch.stack([step.missed for step in steps if step.missed is not None]).cpu().numpy()  # [L, T]
        per_row = missed.reshape(shape).sum(axis=2, dtype=np.float64)
        record = StepRecord(served_index, served_weight, demand_index, demand_weight, per_row.sum(axis=1))
        demanded = demand_weight.reshape(shape).sum(axis=2, dtype=np.float64)
        return record, RowShare(demanded.T, per_row.T)

    def demand_mass(self) -> Tensor:
        """Router mass [L, B, E] that each row of the step demands, float32; the step goes on, nothing waits."""
        found = []
        for step in self._steps:
            assert step is not None, "a router has not run yet"
            index, weight = (one.reshape(self._num_rows, -1) for one in (step.demand_index, step.demand_weight))
            mass = torch.zeros(self._num_rows, self.mask.allowed.shape[1], device=index.device)
            found.append(mass.scatter_add_(1, index.long(), weight.float()))
        return torch.stack(found)

    def rows_served_by(self, layer: int, expert: int) -> list[int]:
        """Rows of the step whose tokens chose (layer, expert); empty if that layer's router has not run."""
        step = self._steps[layer]
        if step is None:
            return []
        served = (step.served_index == expert).reshape(self._num_rows, -1).any(dim=1)
        return [row for row, is_served in enumerate(served.tolist()) if is_served]

    def abandon(self) -> None:
        """Discard a step that failed."""
        self._steps = [None] * self._num_layers
        self.adapters.end()

    def _choose(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        wanted = Picks.of(output)
        mask, temperature = self._mask_of(layer, wanted.index.shape[0]), self._temperature
        if mask is None and temperature is None:
            self._steps[layer] = _LayerStep(wanted.index, wanted.weights, wanted.index, wanted.weights, None)
            return None
        rule, call = self._rule(layer, module), RouterCall(module, args, kwargs, wanted)
        if temperature is not None:
            everything = torch.ones_like(wanted.logits, dtype=torch.bool)
            tempered = rule.masked(call, everything, temperature)
            wanted = Picks.of(tempered)
            if mask is None:
                self._steps[layer] = _LayerStep(wanted.index, wanted.weights, wanted.index, wanted.weights, None)
                return tempered
        assert mask is not None
        if self.adapters.is_on:
            logits = self.adapters.logits(module, call.hidden_states, call.picks.logits)
            call = replace(call, picks=replace(call.picks, logits=logits))
        masked = rule.masked(call, mask, temperature)
        if self.adapters.is_on:
            index, weights = Picks.of(masked).index, masked[1]
            masked = (masked[0], self.adapters.weights(module, index, weights), *masked[2:])
        served = Picks.of(masked)
        missed = wanted.weights.float().masked_fill(mask.gather(-1, wanted.index), 0.0).sum(dim=-1)  # [T]
        self._steps[layer] = _LayerStep(served.index, served.weights, wanted.index, wanted.weights, missed)
        return masked

    def _rule(self, layer: int, router: nn.Module) -> GatingRule:
        rule = self._rules[layer]
        if rule is None:
            rule = self._rules[layer] = find_gating_rule(self._model_type, router)
        return rule

    def _mask_of(self, layer: int, num_tokens: int) -> Tensor | None:
        if self._token_masks is not None:
            return self._token_masks[layer]
        return None if self._table is None else self._table[layer].expand(num_tokens, -1)
