"""Runs models whose memory of a sequence is more than keys and values: one transformers cache a sequence, row by row.

Linear attention, short convolutions and sparse-attention indexers keep states that `RowCache` has no rows for. Here
each sequence owns the cache that its model makes for itself and a decode step runs its rows one after the other, so
every family that transformers can run is served: slower in a batch, equally exact. Invariant: rows share nothing but
weights. A row whose step raised is only good to be freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from expert_store.errors import StoreError
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.host.assembly import SelectiveModel
from server.model.host.runner import Runner, StepFault, StepOutput
from server.model.seam.observation import joined
from server.model.seam.out_of_memory import REMEDY, StepMemoryError, ran_out, told
from server.model.seam.routing import RowShare

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_CONTINUED_BY_ONE = frozenset({"jamba"})
"""Model types whose scan starts anew when several tokens follow the first ones (transformers 5.17 to 5.23)."""


def make_runner(model: SelectiveModel, *, max_rows: int, max_tokens: int) -> Runner:
    """The runner that fits the model: rows of KV memory where that is all it keeps, else a cache a sequence."""
    kind = Runner if has_plain_memory(model.model) else SequenceRunner
    return kind(model, max_rows=max_rows, max_tokens=max_tokens)


def has_plain_memory(model: Any) -> bool:
    """Whether every layer keeps keys and values alone, in the cache that transformers makes by default."""
    if not model._supports_default_dynamic_cache():
        return False
    return all(type(layer) in _PLAIN_LAYERS for layer in DynamicCache(config=model.config).layers)


@dataclass
class _Row:
    cache: Any = None
    length: int = 0


class SequenceRunner(Runner):
    """`Runner` over caches that belong to one sequence each.

    Args:
        model: what to run.
        max_rows: most sequences at once.
        max_tokens: most tokens of a row.
    """

    def __init__(self, model: SelectiveModel, *, max_rows: int, max_tokens: int) -> None:
        self.model = model
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self._rows: dict[int, _Row] = {}
        self._next_row = 0
        self._ahead: dict[int, StepOutput] = {}  # rows that ran a decode step which another row could not finish

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        assert len(self._rows) < self.max_rows, f"all {self.max_rows} rows are in use"
        handle = self._next_row
        self._next_row += 1
        self._rows[handle] = _Row()
        return handle

    def free(self, row: int) -> None:
        """Give a row back, and its cache's memory."""
        del self._rows[row]
        self._ahead.pop(row, None)

    @property
    def num_free_rows(self) -> int:
        """Rows that `allocate` can still give."""
        return self.max_rows - len(self._rows)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens held in rows."""
        return sum(row.length for row in list(self._rows.values()))  # any thread asks, while rows come and go

    @torch.inference_mode()
    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        mask: ExpertMask | None = None,
        temperature: float = 1.0,
        all_logits: bool = False,
    ) -> StepOutput:
        """See `Runner.prefill`."""
        state, logits_to_keep = self._rows[row], 0 if all_logits else 1
        if state.length == 0 or self.model.model.config.model_type not in _CONTINUED_BY_ONE:
            return self._append(state, tokens, mask, temperature, logits_to_keep)
        step = _joined([self._append(state, [token], mask, temperature, logits_to_keep) for token in tokens])
        share = RowShare(step.share.demanded.sum(axis=0, keepdims=True), step.share.missed.sum(axis=0, keepdims=True))
        return StepOutput(step.logits if all_logits else step.logits[-1:], step.record, share, outputs=step.outputs)

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        *,
        masks: Sequence[ExpertMask | None] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> StepOutput:
        """See `Runner.decode`; rows run one after the other.

        Where one cannot, the step of those before it is kept and given out when they are decoded again.
        """
        wanted = masks if masks is not None else [None] * len(rows)
        warmth = temperatures if temperatures is not None else [1.0] * len(rows)
        for at, (row, token, mask, warm) in enumerate(zip(rows, tokens, wanted, warmth, strict=True)):
            if row in self._ahead:
                continue
            try:
                self._ahead[row] = self._append(self._rows[row], [token], mask, warm, 1)
            except StepFault as fault:
                raise StepFault(fault.cause, [at], is_repeatable=False) from fault.cause
            except StepMemoryError as error:
                raise StepMemoryError(str(error), [at]) from None
        return _joined([self._ahead.pop(row) for row in rows])

    def _append(
        self, row: _Row, tokens: Sequence[int], mask: ExpertMask | None, temperature: float, logits_to_keep: int
    ) -> StepOutput:
        device, routing = self.model.device, self.model.routing
        ids = torch.tensor([list(tokens)], device=device)
        positions = torch.arange(row.length, row.length + len(tokens), device=device)[None]
        routing.begin(1, len(tokens), None if mask is None else [mask], [temperature])
        arguments: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "past_key_values": row.cache}
        try:
            result = self.model.model(**arguments, use_cache=True, logits_to_keep=logits_to_keep)
            record, share = routing.finish()
            outputs = None if self.model.observer is None else self.model.observer.take()
        except StoreError as error:
            routing.abandon()
            raise StepFault(error, [0], is_repeatable=False) from error
        except BaseException as error:
            routing.abandon()
            if not ran_out(error):
                raise
            problem = StepMemoryError(f"the memory for {len(tokens)} tokens ended ({told(error)}): {REMEDY}", [0])
        else:
            row.cache = result.past_key_values
            row.length += len(tokens)
            logits = result.logits[0] if logits_to_keep == 0 else result.logits[:, -1]
            return StepOutput(logits.float(), record, share, outputs=outputs)
        raise problem


def _joined(steps: list[StepOutput]) -> StepOutput:
    """Steps of one row each as one step over all of them."""
    if len(steps) == 1:
        return steps[0]
    records = [step.record for step in steps]
    index = np.concatenate([record.served_index for record in records], axis=1)
    weight = np.concatenate([record.served_weight for record in records], axis=1)
    record = StepRecord(index, weight)
    missed = [record.missed_mass for record in records if record.missed_mass is not None]
    if missed:
        demand = [_demand(record) for record in records]
        record = StepRecord(
            index,
            weight,
            np.concatenate([at for at, _ in demand], axis=1),
            np.concatenate([mass for _, mass in demand], axis=1),
            np.sum(missed, axis=0),
        )
    share = RowShare(
        np.concatenate([step.share.demanded for step in steps]), np.concatenate([step.share.missed for step in steps])
    )
    outputs = joined([step.outputs for step in steps])
    return StepOutput(torch.cat([step.logits for step in steps]), record, share, outputs=outputs)


def _demand(record: StepRecord) -> tuple[Any, Any]:
    if record.demand_index is None or record.demand_weight is None:
        return record.served_index, record.served_weight
    return record.demand_index, record.demand_weight
