"""The interval of a mean ratio over other held-out documents: a bootstrap over the documents of every kind.

Documents, not tokens, are drawn, since the tokens of one document depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens, batches, losses, run_batch

NUM_DRAWS = 4000
PERCENTILES = (2.5, 97.5)


def changes_by_document(
    model: SelectiveModel, sequences: Sequence[Tokens], mask: ExpertMask
) -> npt.NDArray[np.float64]:
    """Tokens and summed change of loss under a mask of every document of packed sequences, float64 [N, 2]."""
    separator = model.tokenizer.eos_token_id
    sums: dict[int, npt.NDArray[np.float64]] = {}
    document = 0
    for batch in batches(model, sequences):
        change = losses(run_batch(model, batch, mask).logits, batch) - losses(run_batch(model, batch).logits, batch)
        for tokens, own in zip(batch, change, strict=True):
            at = document + np.cumsum(np.asarray(tokens) == separator)
            document = int(at[-1])
            for number in np.unique(at[1:]):
                part = own[at[1:] == number]
                sums[int(number)] = sums.get(int(number), np.zeros(2)) + np.array([len(part), part.sum()])
    return np.stack(list(sums.values()))


def interval(changes: Mapping[str, npt.NDArray[np.float64]], seed: int = 0) -> dict[str, Any]:
    """The mean ratio over kinds, and what 95 % of draws of their documents (with replacement) give."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros(NUM_DRAWS)
    for own in changes.values():
        chosen = own[rng.integers(0, len(own), (NUM_DRAWS, len(own)))].sum(axis=1)  # [draws, 2]
        drawn += chosen[:, 1] / chosen[:, 0] / len(changes)
    low, high = np.exp(np.percentile(drawn, PERCENTILES))
    mean = math.exp(float(np.mean([own[:, 1].sum() / own[:, 0].sum() for own in changes.values()])))
    return {
        "mean_ratio": round(mean, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "num_tokens": int(sum(own[:, 0].sum() for own in changes.values())),
        "num_documents": sum(len(own) for own in changes.values()),
    }
