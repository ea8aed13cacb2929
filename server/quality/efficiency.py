"""Efficiency metrics of a mixture of experts, from statistics and from accuracy on questions.

Definitions: CES (configuration entropy score) = entropy of a layer's routing ÷ log E. Activation ratio = active ÷ total
parameters. P3 = accuracy ÷ billions of active parameters. P2F = accuracy ÷ TFLOP a token (2 × active parameters). MER =
accuracy ÷ GiB of memory that the model takes. R3 = activation ratio × accuracy ÷ chance. SAA = accuracy × (1 −
activation ratio).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.model.runner import SelectiveModel


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model under a mask: trunk, one expert of every layer, and how many of those act and exist."""

    trunk: int
    expert: int
    active_experts: float
    kept_experts: float
    bytes_per_parameter: int

    @property
    def active(self) -> float:
        """Parameters that one token uses."""
        return self.trunk + self.expert * self.active_experts

    @property
    def total(self) -> float:
        """Parameters that the model has."""
        return self.trunk + self.expert * self.kept_experts

    @property
    def activation_ratio(self) -> float:
        """Active ÷ total."""
        return self.active / self.total

    @property
    def memory_gib(self) -> float:
        """GiB of all that the model has."""
        return self.total * self.bytes_per_parameter / 2**30


@dataclass(frozen=True)
class Efficiency:
    """The metrics that need an accuracy; see the head of the module."""

    accuracy: float
    activation_ratio: float
    p3: float
    p2f: float
    mer: float
    r3: float
    saa: float

    def to_json(self) -> dict[str, float]:
        """As JSON-ready data."""
        return asdict(self)


def parameters(model: SelectiveModel, mask: ExpertMask | None = None) -> Parameters:
    """Parameters of a model, masked to `mask`."""
    manifest = model.store.manifest
    shapes = [tensor.shape for spec in manifest.layers for tensor in spec.tensors]
    allowed = (mask or model.routing.mask).num_allowed
    return Parameters(
        trunk=sum(parameter.numel() for parameter in model.model.parameters()),
        expert=sum(int(np.prod(shape)) for shape in shapes),
        active_experts=float(np.minimum(manifest.model.top_k, allowed).mean()),
        kept_experts=float(allowed.mean()),
        bytes_per_parameter=model.dtype.itemsize,
    )


def efficiency(accuracy: float, chance: float, of: Parameters) -> Efficiency:
    """The metrics of an accuracy and the accuracy of guessing, both 0 to 1."""
    ratio = of.activation_ratio
    return Efficiency(
        accuracy=accuracy,
        activation_ratio=ratio,
        p3=accuracy / (of.active / 1e9),
        p2f=accuracy / (2 * of.active / 1e12),
        mer=accuracy / of.memory_gib,
        r3=ratio * accuracy / chance,
        saa=accuracy * (1 - ratio),
    )


def configuration_entropy(picks: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """CES of each layer, float64 [L], from picks [L, E]: 1 if all experts are used alike, 0 if always the same one."""
    shares = picks / np.maximum(picks.sum(axis=1, keepdims=True), 1e-300)
    logs = np.log(shares, out=np.zeros_like(shares, dtype=np.float64), where=shares > 0)
    return np.asarray(-(shares * logs).sum(axis=1) / np.log(picks.shape[1]))
