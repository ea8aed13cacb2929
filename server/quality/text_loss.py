"""Loss and deficit of text, unmasked or under a mask.

The loss is the mean over all tokens but the first of each packed sequence, in nats; perplexity is its exponential.
Invariant: the same texts, mask and model give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens, batches, losses, run_batch


@dataclass(frozen=True)
class TextResult:
    """Loss and deficit of one domain's text.

    Attributes:
        loss: nats a token, the mean of `num_tokens` tokens.
        deficit: missing share of the router mass; `deficit_per_layer`: of each layer.
        top1_missing: share of (token, layer) pairs whose first choice was not available.
        demand: unmasked router mass of each expert, float64 [L, E].
    """

    loss: float
    num_tokens: int
    deficit: float = 0.0
    deficit_per_layer: tuple[float, ...] = ()
    top1_missing: float = 0.0
    demand: npt.NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


def evaluate_text(
    model: SelectiveModel, sequences: Sequence[Tokens], mask: ExpertMask | None = None, adapter: str | None = None
) -> TextResult:
    """Loss and deficit over packed token sequences, under a mask (intersected with the model's own), with an adapter
    that the model knows."""
    own = model.routing.mask
    mask = None if mask is None else mask & own
    demanded, missed = np.zeros(model.num_layers), np.zeros(model.num_layers)
    demand = np.zeros(own.allowed.shape)
    values: list[npt.NDArray[np.float64]] = []
    first_missing, num_choices = 0, 0
    for batch in batches(model, sequences):
        output = run_batch(model, batch, mask, adapter)
        values.append(losses(output.logits, batch).ravel())
        demanded += output.share.demanded.sum(axis=0)
        missed += output.share.missed.sum(axis=0)
        if output.record.demand_index is not None:
            first = output.record.demand_index[:, :, 0]  # [L, T]
            first_missing += int((~np.take_along_axis((mask or own).allowed, first, axis=1)).sum())
        demand += output.record.demand_mass_of(slice(None), model.store.manifest.model.num_experts)
        num_choices += output.record.served_index.shape[1] * model.num_layers
    joined = np.concatenate(values)
    return TextResult(
        loss=float(joined.mean()),
        num_tokens=len(joined),
        deficit=float(missed.sum() / demanded.sum()),
        deficit_per_layer=tuple(float(value) for value in missed / demanded),
        top1_missing=first_missing / num_choices,
        demand=demand,
    )


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean, for instance of perplexity ratios."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
