"""Runs models that keep more state of a sequence than keys and values: one transformers cache for each sequence.

Linear attention, short convolutions and sparse-attention indexers have states that `BlockCache` cannot hold. Here each
sequence owns a cache made by its model, and a decode step runs its rows one after the other. So every family that
transformers can run is served: slower in a batch, equally exact. Invariant: rows share only weights. A row whose step
raised can only be freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from router.mask import ExpertMask
from server.model.balance import SlotsAndBlocks
from server.model.host.assembly import HostModel
from server.model.host.runner import HostDriven, HostRunner
from server.model.host.snapshots import CacheRows
from server.model.kv.blocks import NoBlocksError, num_blocks_of
from server.model.kv.rows import KvRows
from server.model.runner import RowStep, Runner, StepFault, StepMemoryError, StepOutput
from server.model.seam.forward import run_forward
from server.model.seam.routing import RowShare

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_CONTINUED_BY_ONE = frozenset({"jamba"})
"""Model types whose scan restarts when several tokens follow the first chunk (transformers 5.17 to 5.23)."""


def make_runner(
    model: HostModel,
    *,
    max_rows: int,
    max_tokens: int,
    kv: KvRows | None = None,
    balance: SlotsAndBlocks | None = None,
) -> Runner:
    """The runner for the model: with rows of KV memory if it keeps only keys and values, else one cache a sequence."""
    if has_plain_memory(model.model):
        return HostRunner(model, max_rows=max_rows, max_tokens=max_tokens, kv=kv, balance=balance)
    assert kv is None or isinstance(kv, CacheRows), "the rows of this model keep states"
    return SequenceRunner(model, max_rows=max_rows, max_tokens=max_tokens, kv=kv, balance=balance)


def has_plain_memory(model: Any) -> bool:
    """Whether every layer keeps only keys and values, in the cache that transformers makes by default."""
    if not model._supports_default_dynamic_cache():
        return False
    return all(type(layer) in _PLAIN_LAYERS for layer in DynamicCache(config=model.config).layers)


class SequenceRunner(HostDriven):
    """`Runner` with one cache for each sequence. `RowStep.fetches` has no effect on a row's mask."""

    cuts_anywhere = False

    kv: CacheRows

    def __init__(
        self,
        model: HostModel,
        *,
        max_rows: int,
        max_tokens: int,
        kv: CacheRows | None = None,
        balance: SlotsAndBlocks | None = None,
    ) -> None:
        kv = kv or CacheRows(max_rows=max_rows, num_blocks=max_rows * num_blocks_of(max_tokens))
        super().__init__(model, max_rows=max_rows, max_tokens=max_tokens, kv=kv, balance=balance)
        self._ahead: dict[int, StepOutput] = {}  # outputs of rows whose decode step failed in another row

    def free(self, row: int) -> None:
        """Free a row and its cache."""
        self.kv.free(row)
        self._ahead.pop(row, None)

    @torch.inference_mode()
    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        mask: ExpertMask | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
        fetches: bool = False,
        all_logits: bool = False,
    ) -> StepOutput:
        """See `Runner.prefill`."""
        if self.kv.length(row) == 0 or self.model.model.config.model_type not in _CONTINUED_BY_ONE:
            return self._append(row, tokens, mask, adapter, temperature, all_logits)
        parts = [self._append(row, [token], mask, adapter, temperature, all_logits) for token in tokens]
        step = StepOutput.concat(parts)
        share = RowShare(step.share.demanded.sum(axis=0, keepdims=True), step.share.missed.sum(axis=0, keepdims=True))
        return replace(step, logits=step.logits if all_logits else step.logits[-1:], share=share)

    @torch.inference_mode()
    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """See `Runner.decode`; rows run one after the other.

        If a row fails, the outputs of the rows before it are kept, and returned when those are decoded again.
        """
        for at, step in enumerate(steps):
            if step.row in self._ahead:
                continue
            try:
                output = self._append(step.row, [step.token], step.mask, step.adapter, step.temperature)
                self._ahead[step.row] = output
            except (StepFault, StepMemoryError, NoBlocksError) as error:
                error.positions = (at,)
                raise
        return StepOutput.concat([self._ahead.pop(step.row) for step in steps])

    def _append(
        self,
        row: int,
        tokens: Sequence[int],
        mask: ExpertMask | None,
        adapter: str | None,
        temperature: float,
        all_logits: bool = False,
    ) -> StepOutput:
        device = self.model.device
        ids = torch.tensor([list(tokens)], device=device)
        start = self.kv.length(row)
        self.kv.reserve([(row, start + len(tokens))])
        positions = torch.arange(start, start + len(tokens), device=device)[None]
        self.model.routing.begin(1, len(tokens), [mask], [temperature], [adapter])
        output, self.kv.states[row] = run_forward(
            self.model, ids, positions, self.kv.states[row], kv_tokens=None, all_logits=all_logits, is_repeatable=False
        )
        self.kv.set_length(row, start + len(tokens))
        return output
