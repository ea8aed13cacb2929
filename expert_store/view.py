"""What a manifest says of each expert: which deep expert holds it, and where in its shard.

Invariant: a view never changes; a store that changes takes a new one, so that reads in flight keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expert_store.errors import ExpertUnavailableError
from expert_store.manifest import DeepExpert, Manifest
from expert_store.shard import ShardLayout


@dataclass(frozen=True)
class StoreView:
    """One manifest with what is derived from it.

    Attributes:
        layouts: by the deep expert's index.
        deep_of: int32 [L, E], the place in `manifest.deep_experts` of what holds the expert, -1: none does.
        available: bool [L, E], read-only.
    """

    manifest: Manifest
    layouts: dict[int, ShardLayout]
    deep_of: npt.NDArray[np.int32]
    available: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, manifest: Manifest, excluded: frozenset[tuple[int, int]] = frozenset()) -> StoreView:
        """`excluded` are (layer, index of a deep expert) that count as not held."""
        deep_of = np.full((manifest.model.num_layers, manifest.model.num_experts), -1, dtype=np.int32)
        for place, deep in enumerate(manifest.deep_experts):
            kept = [layer for layer in range(len(deep.experts)) if (layer, deep.index) not in excluded]
            deep_of[kept, np.array(deep.experts)[kept]] = place
        available = deep_of >= 0
        available.setflags(write=False)
        layouts = {deep.index: ShardLayout.of(manifest.layers, deep) for deep in manifest.deep_experts}
        return cls(manifest, layouts, deep_of, available)

    def lacks(self, layer: int, expert: int) -> bool:
        """Whether (layer, expert) exists in the model and not in the store."""
        num_layers, num_experts = self.deep_of.shape
        return 0 <= layer < num_layers and 0 <= expert < num_experts and bool(self.deep_of[layer, expert] < 0)

    def locate(self, root: Path, layer: int, expert: int) -> DeepExpert:
        """The deep expert that holds (layer, expert); `root` is the store's directory, for messages.

        Raises:
            ExpertUnavailableError: the model has no such expert, or the store does not hold it.
        """
        model = self.manifest.model
        if not (0 <= layer < model.num_layers and 0 <= expert < model.num_experts):
            raise ExpertUnavailableError(
                f"there is no expert {expert} in MoE layer {layer}; this model has layers 0 to {model.num_layers - 1} "
                f"and experts 0 to {model.num_experts - 1}"
            )
        index = int(self.deep_of[layer, expert])
        if index < 0:
            raise ExpertUnavailableError(
                f"expert {expert} of MoE layer {layer} is not in {root}; mask it, or extract a larger selection into "
                "the same store"
            )
        return self.manifest.deep_experts[index]
