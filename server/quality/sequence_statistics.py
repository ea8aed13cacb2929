"""Adds whole sequences to statistics, and reads the store's weights for the criterion that goes by them.

Invariant: a sequence adds the same whether it is added at once or in parts. Source of the weights' criterion: AIMER.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from expert_store.rows import span_values
from expert_store.store import Store
from extractor.statistics.sample import item_keys
from extractor.statistics.statistics import WINDOW_TOKENS, ExpertStatistics
from router.ledger import StepRecord
from server.engine.token_statistics import add_tokens, window_masses
from server.model.seam.observation import ExpertOutputs

MEMORY_ELEMENTS = 1 << 25
"""Most values of a (token, layer, expert) table in memory."""


def add_sequence(
    statistics: ExpertStatistics, domain: str, key: int, record: StepRecord, outputs: ExpertOutputs
) -> None:
    """Add one sequence that ran from its first token to `statistics`, in parts that fit into memory.

    Args:
        key: of the sequence, see `sequence_key`.
        record, outputs: its routing, and what its experts put out.
    """
    num_tokens = record.served_index.shape[1]
    step = max(WINDOW_TOKENS, MEMORY_ELEMENTS // (statistics.num_layers * statistics.num_experts) // 32 * 32)
    for start in range(0, num_tokens, step):
        tokens = range(start, min(start + step, num_tokens))
        part = record.select(tokens)
        add_tokens(statistics, domain, part, outputs.select(tokens), item_keys(key ^ 1, np.array(tokens)))
        masses = window_masses(*part.demand_of(slice(None)), statistics.num_experts)
        if len(masses):
            at = np.arange(len(masses)) + start // WINDOW_TOKENS
            domains = np.full(len(masses), statistics.domain_index(domain))
            statistics.windows.offer(item_keys(key, at), domains, {"mass": masses})


def weight_flatness(store: Store) -> npt.NDArray[np.float64]:
    """Mean |w| / rms(w) over all weights of each expert, float64 [L, E]; reads the whole store once.

    Experts that the store does not hold get their layer's mean. Raises StoreError.
    """
    manifest, available = store.manifest, store.available
    flatness = np.full(available.shape, np.nan)
    for layer, spec in enumerate(manifest.layers):
        memory = torch.empty(spec.span_bytes, dtype=torch.uint8)
        for expert in np.flatnonzero(available[layer]):
            store.read_expert(layer, int(expert), memory)
            weights = torch.cat([values.float().flatten() for values in span_values(spec, memory).values()])
            flatness[layer, expert] = float(weights.abs().mean() / weights.square().mean().sqrt())
        flatness[layer, ~available[layer]] = np.nanmean(flatness[layer])
    return flatness
