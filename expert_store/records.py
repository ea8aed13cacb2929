"""The records that a manifest consists of, as frozen dataclasses, and the sizes of the dtypes that they name.

Plain data: `manifest.py` checks it, writes it and reads it. Sizes and offsets are bytes; `layer` counts the MoE layers
from 0; an expert's id is the one that the checkpoint gives it in its layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
"""Bytes of one element, by the safetensors name of the dtype."""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint: its name, the fingerprint of its content, and where it lay when it was read."""

    name: str
    fingerprint: str
    location: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What of the model concerns the experts; `num_layers` counts the MoE layers, `num_experts` is per layer."""

    family: str
    architecture: str
    num_layers: int
    num_experts: int
    top_k: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a span: `shape` without the expert axis, `offset` and `bytes` within the span."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """MoE layer `layer` is the model's layer `model_layer`; its experts live in `module`, one span of bytes each."""

    layer: int
    model_layer: int
    module: str
    span_bytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Alignment:
    """How experts of different layers were joined to deep experts; `statistics` is free-form JSON."""

    kind: str
    statistics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DeepExpert:
    """One shard: `experts[layer]` is the expert of that MoE layer, `span_hashes[layer]` the XXH3-64 of its span."""

    index: int
    file: str
    bytes: int
    sha256: str
    data_offset: int
    experts: tuple[int, ...]
    span_hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrunkFile:
    """One file below `trunk/`; `name` is its path below the store."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a reader knows about a store.

    `deep_experts` ascend by `index`; a store that has shrunk has gaps. `retired_below` is 0, or the index below which
    no new deep expert may be numbered, because a reader may still know the file of a removed one.
    """

    source: Source
    model: ModelSpec
    layers: tuple[LayerSpec, ...]
    alignment: Alignment
    deep_experts: tuple[DeepExpert, ...]
    trunk: tuple[TrunkFile, ...]
    retired_below: int = 0

    @property
    def next_index(self) -> int:
        """Index of the next deep expert to be added: of none that the store has or had."""
        return max(self.retired_below, *(deep.index + 1 for deep in self.deep_experts), 0)

    @property
    def absent_experts(self) -> tuple[tuple[int, ...], ...]:
        """For each MoE layer the ids of the experts that exist nowhere in the store, ascending."""
        everyone = range(self.model.num_experts)
        held = [{deep.experts[layer] for deep in self.deep_experts} for layer in range(self.model.num_layers)]
        return tuple(tuple(expert for expert in everyone if expert not in here) for here in held)
