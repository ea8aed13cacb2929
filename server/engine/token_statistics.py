"""Adding tokens to statistics: totals, co-activation, the sample of tokens, and the masses of windows.

Invariant: serving and calibration add the same values for the same tokens. They differ only in the source of the tokens
and in the keys of the samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from extractor.statistics.statistics import WINDOW_TOKENS, ExpertStatistics
from router.ledger import StepRecord, sum_by_expert
from server.model.seam.observation import ExpertOutputs

Index = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


def add_tokens(
    statistics: ExpertStatistics,
    domain: str,
    record: StepRecord,
    outputs: ExpertOutputs | None,
    keys: npt.NDArray[np.uint64],
) -> None:
    """Add T tokens to one domain.

    Args:
        record: their routing; its demand is None if every demanded expert was served.
        outputs: norms of their experts' outputs; None adds demand alone.
        keys: uint64 [T], of the tokens in the sample.
    """
    at = statistics.domain_index(domain)
    statistics.num_tokens[at] += len(keys)
    served = _Places(record.served_index, statistics.num_experts)
    wanted_index, wanted_weight = record.demand_of(slice(None))
    wanted = served if record.demand_index is None else _Places(wanted_index, statistics.num_experts)
    shares = gate_shares(wanted_weight)

    def add(name: str, places: _Places, values: Float | None) -> None:
        statistics.totals[name][at] += places.sums(values)

    add("demand", wanted, None)
    add("demand_mass", wanted, shares)
    if record.demand_index is not None:
        missing = ~(wanted.index[:, :, :, None] == served.index[:, :, None, :]).any(axis=3)
        add("missing", wanted, missing.astype(np.float64))
        add("missing_mass", wanted, shares * missing)
    _add_coactivation(statistics, wanted)
    if outputs is None:
        return
    norms = np.where(served.index < statistics.num_experts, outputs.norms, 0.0).astype(np.float64)
    contributions = record.served_weight * norms
    add("picks", served, None)
    add("gate_mass", served, gate_shares(record.served_weight))
    add("output_norm", served, norms)
    add("output_norm_squared", served, np.square(norms))
    add("gate_output_norm", served, contributions)
    add("residual_change", served, contributions * outputs.changes[:, :, None])
    if record.demand_index is None:
        arrays = {"experts": served.index, "gates": shares, "contributions": contributions}
        tokens = {name: array.transpose(1, 0, 2) for name, array in arrays.items()}
        statistics.tokens.offer(keys, np.full(len(keys), at), tokens)


def gate_shares(weights: npt.NDArray[np.floating]) -> Float:
    """Weights [L, T, K] over their sum over the picks, float64; zeros where a token has none."""
    weights = weights.astype(np.float64)
    sums = weights.sum(axis=2, keepdims=True)
    return np.asarray(np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0))


def window_masses(index: Index, weights: npt.NDArray[np.floating], num_experts: int) -> npt.NDArray[np.float32]:
    """Demanded mass of each window of `WINDOW_TOKENS` tokens, float32 [W, L, E], from picks [L, T, K]; tokens after the
    last full window are left out."""
    shares = gate_shares(weights)
    masses = []
    for start in range(0, index.shape[1] - WINDOW_TOKENS + 1, WINDOW_TOKENS):
        part = slice(start, start + WINDOW_TOKENS)
        masses.append(_Places(index[:, part], num_experts).sums(shares[:, part]).astype(np.float32))
    return np.stack(masses) if masses else np.zeros((0, len(index), num_experts), dtype=np.float32)


class _Places:
    """Picks [L, T, K] of E experts; ids ≥ E do not exist."""

    def __init__(self, index: Index, num_experts: int) -> None:
        self.index, self._num_experts = np.minimum(index, num_experts), num_experts

    def sums(self, values: Float | None) -> Float:
        """Sums of values [L, T, K] (None: of ones) by layer and expert, [L, E]."""
        return np.asarray(sum_by_expert(self.index, values, self._num_experts), np.float64)


def _add_coactivation(statistics: ExpertStatistics, wanted: _Places) -> None:
    """Tokens that picked i in layer l and j in layer l + 1."""
    num_layers, num_tokens, _ = wanted.index.shape
    picked = np.zeros((num_layers, num_tokens, statistics.num_experts + 1), dtype=np.float32)
    np.put_along_axis(picked, wanted.index, 1.0, axis=2)
    picked = picked[:, :, :-1]
    for layer in range(num_layers - 1):
        statistics.coactivation[layer] += picked[layer].T @ picked[layer + 1]
