"""Efficiency metrics of a mixture of experts, from statistics and from accuracy on questions.

Definitions: CES (configuration entropy score) = entropy of a layer's routing ÷ log E. Activation ratio = active ÷ total
parameters. P3 = accuracy ÷ billions of active parameters. P2F = accuracy ÷ TFLOP a token (2 × active parameters). MER =
accuracy ÷ GiB of the model's memory. R3 = activation ratio × accuracy ÷ chance. SAA = accuracy × (1 − activation
ratio).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.model.runner import SelectiveModel


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model under a mask.

    Attributes:
        trunk: of the trunk.
        expert: of one expert of every layer together.
        expert_bytes: of the same in memory.
        active_experts: experts of a layer that one token uses, mean over the layers.
        kept_experts: experts of a layer that the mask allows, mean over the layers.
        bytes_per_parameter: of the trunk, in the model's dtype.
    """

    trunk: int
    expert: int
    expert_bytes: int
    active_experts: float
    kept_experts: float
    bytes_per_parameter: int

    @classmethod
    def of(cls, model: SelectiveModel, mask: ExpertMask | None = None) -> Parameters:
        """The parameters of `model` masked to `mask` (None: the model's own mask)."""
        manifest = model.store.manifest
        tensors = [tensor for spec in manifest.layers for tensor in spec.tensors]
        sizes = [int(np.prod(tensor.shape)) for tensor in tensors]
        allowed = (mask or model.routing.mask).num_allowed
        return cls(
            trunk=sum(parameter.numel() for parameter in model.model.parameters()),
            expert=sum(sizes),
            expert_bytes=sum(
                size * model.dtype.itemsize if tensor.encoding is None else tensor.bytes
                for size, tensor in zip(sizes, tensors, strict=True)
            ),
            active_experts=float(np.minimum(manifest.model.top_k, allowed).mean()),
            kept_experts=float(allowed.mean()),
            bytes_per_parameter=model.dtype.itemsize,
        )

    @property
    def active(self) -> float:
        """Parameters that one token uses."""
        return self.trunk + self.expert * self.active_experts

    @property
    def total(self) -> float:
        """Parameters of the whole model."""
        return self.trunk + self.expert * self.kept_experts

    @property
    def activation_ratio(self) -> float:
        """Active ÷ total."""
        return self.active / self.total

    @property
    def memory_gib(self) -> float:
        """GiB of the whole model."""
        return (self.trunk * self.bytes_per_parameter + self.expert_bytes * self.kept_experts) / 2**30

    def efficiency(self, accuracy: float, chance: float) -> dict[str, float]:
        """The metrics of an accuracy, by their names in lower case; `accuracy` and `chance` are from 0 to 1.

        Args:
            accuracy: share of right answers.
            chance: the accuracy of guessing.
        """
        ratio = self.activation_ratio
        return {
            "accuracy": accuracy,
            "activation_ratio": ratio,
            "p3": accuracy / (self.active / 1e9),
            "p2f": accuracy / (2 * self.active / 1e12),
            "mer": accuracy / self.memory_gib,
            "r3": ratio * accuracy / chance,
            "saa": accuracy * (1 - ratio),
        }


def configuration_entropy(picks: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """CES of each layer, float64 [L], from picks [L, E]: 1 if all experts are used alike, 0 if always the same one."""
    shares = picks / np.maximum(picks.sum(axis=1, keepdims=True), 1e-300)
    logs = np.log(shares, out=np.zeros_like(shares, dtype=np.float64), where=shares > 0)
    return np.asarray(-(shares * logs).sum(axis=1) / np.log(picks.shape[1]))
