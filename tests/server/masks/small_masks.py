"""Masks of two layers of six experts, and tokens that demand them."""

import numpy as np

from router.mask import ExpertMask

L, E = 2, 6
FULL = ExpertMask(np.ones((L, E), dtype=np.bool_))


def picks(*experts: int) -> tuple[np.ndarray, np.ndarray]:
    """One token for each expert, which it wants alone, in both layers."""
    index = np.tile(np.array(experts)[None, :, None], (L, 1, 1))
    return index, np.ones(index.shape, dtype=np.float32)


def allowed(mask: ExpertMask | None, layer: int = 0) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(mask.allowed[layer]))
