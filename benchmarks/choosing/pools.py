"""Measures pools that are chosen from the prompt: the first tokens run whole, the rest is masked to the pool.

Invariant: a sequence's pool depends on its own earlier tokens alone, as when it is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from router.mask import ExpertMask
from server.masks.pools import PromptPool
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens, batches, losses
from server.quality.text_loss import geometric_mean

PROMPT_TOKENS = 128


@dataclass(frozen=True)
class PoolResult:
    """Quality after the prompt.

    Attributes:
        ratios: perplexity ÷ unmasked perplexity of the same tokens, of each domain.
        deficit: missing share of the router mass after the prompt.
        fetched_per_refresh: experts of a layer that were new in the pool each time it was chosen anew.
    """

    ratios: Mapping[str, float]
    deficit: float
    fetched_per_refresh: float

    @property
    def mean_ratio(self) -> float:
        """Geometric mean over the domains."""
        return geometric_mean(list(self.ratios.values()))


def evaluate_pools(
    model: SelectiveModel,
    texts: Mapping[str, Sequence[Tokens]],
    make_pool: Callable[[], PromptPool],
    *,
    refresh: bool = True,
) -> PoolResult:
    """Measure pools made by `make_pool`, one a sequence; without `refresh` the prompt's choice stays."""
    ratios, missed, demanded, fetched, refreshes = {}, 0.0, 0.0, 0, 0
    for domain, sequences in texts.items():
        long = [tokens for tokens in sequences if len(tokens) > 2 * PROMPT_TOKENS]
        plain: list[npt.NDArray[np.float64]] = []
        pooled: list[npt.NDArray[np.float64]] = []
        for batch in batches(model, long):
            whole = _Run(model, batch, None)
            plain.append(whole.losses())
            run = _Run(model, batch, [make_pool() for _ in batch], refresh=refresh)
            pooled.append(run.losses())
            missed, demanded = missed + run.missed, demanded + run.demanded
            fetched, refreshes = fetched + run.fetched, refreshes + run.refreshes
        if long:
            ratios[domain] = float(np.exp(np.concatenate(pooled).mean() - np.concatenate(plain).mean()))
    per_layer = fetched / max(1, refreshes) / model.num_layers
    return PoolResult(ratios, missed / demanded if demanded else 0.0, per_layer)


class _Run:
    """One batch, the prompt whole, then in parts of `refresh_tokens` under each sequence's pool."""

    def __init__(
        self, model: SelectiveModel, batch: Sequence[Tokens], pools: list[PromptPool] | None, *, refresh: bool = True
    ) -> None:
        self.missed = self.demanded = 0.0
        self.fetched = self.refreshes = 0
        self._model, self._batch = model, batch
        self._cache = DynamicCache(config=model.model.config)
        self._logits: list[torch.Tensor] = []
        length = len(batch[0])
        self._step(0, PROMPT_TOKENS, None, pools)
        step = length - PROMPT_TOKENS if pools is None else pools[0].options.refresh_tokens
        masks: list[ExpertMask] | None = None
        for start in range(PROMPT_TOKENS, length, step):
            if pools is not None and (masks is None or refresh):
                masks = self._choose(pools, masks)
            self._step(start, min(start + step, length), masks, pools)

    def losses(self) -> npt.NDArray[np.float64]:
        """Losses of the tokens after the prompt's and the one after it, float64 [B × …]."""
        return losses(torch.cat(self._logits, dim=1), self._batch)[:, PROMPT_TOKENS:].ravel()

    def _choose(self, pools: list[PromptPool], before: list[ExpertMask] | None) -> list[ExpertMask]:
        chosen = [pool.choose() & self._model.routing.mask for pool in pools]
        if before is not None:
            self.fetched += sum(
                int((new.allowed & ~old.allowed).sum()) for new, old in zip(chosen, before, strict=True)
            )
            self.refreshes += len(chosen)
        return chosen

    @torch.inference_mode()
    def _step(self, start: int, end: int, masks: list[ExpertMask] | None, pools: list[PromptPool] | None) -> None:
        model = self._model
        ids = torch.tensor([list(tokens[start:end]) for tokens in self._batch], device=model.device)
        model.routing.begin(len(ids), end - start, None if masks is None else list(masks))
        try:
            self._logits.append(model.model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits)
            record, share = model.routing.finish()
        except BaseException:
            model.routing.abandon()
            raise
        if pools is None:
            return
        for at, pool in enumerate(pools):
            pool.see(*record.demand_of(slice(at * (end - start), (at + 1) * (end - start))))
        if masks is not None:
            self.missed += float(share.missed.sum())
            self.demanded += float(share.demanded.sum())
