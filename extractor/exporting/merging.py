"""Merging an adapter into the weights of a pruned checkpoint.

Invariant: the checkpoint's logits are those of the model masked to the kept experts whose rows have the adapter; every
change of the adapter is merged, or the export is refused. `expert_store.adapter` has the meaning of its parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expert_store.adapter import Adapter
from expert_store.manifest import LayerSpec
from expert_store.store import Store
from extractor.errors import SelectionError, UnsupportedFamilyError

Change = Callable[[Tensor], Tensor]
"""From a tensor of the trunk to the merged one, float32."""


class Merging:
    """The changes of an adapter to the tensors of a checkpoint.

    Args:
        adapter: None changes nothing.
        store: whose checkpoint is exported.
        whole: its model on the meta device.
        kept: the experts that each MoE layer keeps.

    Raises:
        SelectionError: the adapter is of another checkpoint, or was not made for these experts.
        UnsupportedFamilyError: a norm after the experts stands between them and their weights.
    """

    def __init__(self, adapter: Adapter | None, store: Store, whole: Any, kept: Sequence[Sequence[int]]) -> None:
        self._changes = {} if adapter is None else dict(adapter.changes)
        self._family = store.manifest.model.family
        self._whole = whole
        self._merged: set[str] = set()
        if adapter is None:
            return
        model = store.manifest.model
        if adapter.fingerprint != store.manifest.source.fingerprint:
            raise SelectionError("the adapter is of another checkpoint: train one for this store with `deepfew adapt`")
        allowed = np.zeros((model.num_layers, model.num_experts), dtype=np.bool_)
        for layer, experts in enumerate(kept):
            allowed[layer, list(experts)] = True
        if not adapter.is_for(allowed):
            raise SelectionError(
                "the adapter was not made for these experts: train one for this plan (`deepfew adapt --plan FILE`), or "
                "for pools of this size"
            )
        for spec in store.manifest.layers:
            if self.gain(spec) is not None and getattr(whole.get_submodule(spec.module), "has_post_expert_norm", False):
                raise UnsupportedFamilyError(
                    f"the family {model.family!r} cannot be exported with an adapter: it has a norm after experts"
                )

    def change(self, parameter: str) -> Change | None:
        """The change of a parameter of the model; None if it stays."""
        module, _, name = parameter.rpartition(".")
        parts = self._changes.get(module, {})
        if name == "weight" and "lora_A" in parts:
            self._merged |= {f"{module}.lora_A", f"{module}.lora_B"}
            return lambda weight: weight.float() + parts["lora_B"] @ parts["lora_A"]
        if name == "weight" and "delta" in parts:
            self._merged.add(f"{module}.delta")
            return lambda weight: weight.float() + parts["delta"]
        if "scale" in parts:
            self._merged.add(f"{module}.scale")
            factor = 1 + parts["scale"]
            offset = self._offset(module) if name == "weight" else 0.0
            return lambda weight: (weight.float() + offset) * factor - offset
        return None

    def gain(self, spec: LayerSpec) -> Tensor | None:
        """The factor of the output of each expert of a layer, [E]; None if they stay."""
        block = spec.module.rpartition(".")[0]
        for module, parts in self._changes.items():
            if "gain" in parts and module.rpartition(".")[0] == block:
                self._merged.add(f"{module}.gain")
                return 1 + parts["gain"]
        return None

    def check_complete(self) -> None:
        """Raise UnsupportedFamilyError if a change of the adapter found no tensor to be merged into."""
        added = next((module for module, parts in self._changes.items() if "down" in parts), None)
        if added is not None:
            raise UnsupportedFamilyError(
                f"the adapter adds an expert to {added}, which {self._family!r} has no place for: train one with "
                "--shared-width 0, or export without it, if the experts were not trained with it"
            )
        left = {f"{module}.{part}" for module, parts in self._changes.items() for part in parts} - self._merged
        if left:
            raise UnsupportedFamilyError(
                f"the adapter cannot be merged: the checkpoint has no tensor for {min(left)} alone; export without it"
            )

    def _offset(self, module: str) -> float:
        """The number that a norm adds to its weight before it multiplies: 1 in some families, else 0."""
        norm = copy.deepcopy(self._whole.get_submodule(module)).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.zero_()
            return 1.0 if bool(norm(torch.ones(1, len(norm.weight), dtype=norm.weight.dtype)).any()) else 0.0
