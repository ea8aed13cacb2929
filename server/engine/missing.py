"""What a request does without: the most wanted expert that is not available to it.

For requests that would rather end than be answered with fewer experts than the model asked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.engine.request import ExpertMissingError


def check_nothing_missing(
    demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32], mask: ExpertMask
) -> None:
    """Raise where a token wanted an expert outside `mask`.

    Args:
        demand_index, demand_weight: [L, T, K] of the unmasked choice; ids ≥ E are picks that do not exist.

    Raises:
        ExpertMissingError: of the first such token, its first layer, the expert wanted most.
    """
    num_layers, num_experts = mask.allowed.shape
    exists = demand_index < num_experts
    allowed = mask.allowed[np.arange(num_layers)[:, None, None], np.minimum(demand_index, num_experts - 1)]
    missing = np.where(exists & ~allowed & (demand_weight > 0), demand_weight, 0.0)  # [L, T, K]
    places = np.argwhere((missing > 0).any(axis=2).T)  # (token, layer), tokens first
    if not len(places):
        return
    token, layer = (int(value) for value in places[0])
    pick = int(missing[layer, token].argmax())
    share = float(missing[layer, token, pick] / demand_weight[layer, token].sum())
    raise ExpertMissingError(layer, int(demand_index[layer, token, pick]), share)
