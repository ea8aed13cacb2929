"""Runs the model one step at a time over rows of KV memory: a chunk of one prompt, or one token of many sequences.

The host-driven runner: transformers' forward, experts looked up and fetched by the host. Invariant: a call that raises
leaves rows, leases and records as they were, so the engine may go on with other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import StoreError
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.host.assembly import SelectiveModel
from server.model.host.kv_cache import RowCache
from server.model.seam.attention_mask import attention_masks
from server.model.seam.observation import ExpertOutputs
from server.model.seam.out_of_memory import REMEDY, StepMemoryError, ran_out, told
from server.model.seam.routing import RowShare


@dataclass(frozen=True)
class Choice:
    """How a row's next token is drawn: `temperature` divides the logits, the `top_k` most likely (None: all) and of
    them the most likely that reach `top_p` (1: all) are left, and `draw`, uniform in [0, 1), decides among them."""

    temperature: float
    top_k: int | None
    top_p: float
    draw: float


@dataclass(frozen=True)
class Chosen:
    """The token of each row, [B] each, in host memory: drawn by its `Choice`, else the most likely one.

    Attributes:
        token: int64; the lowest id of equals where it is the most likely one.
        logit: float32, its logit.
        normaliser: float32, logsumexp of the row's logits: a logit less this is a log-probability.
    """

    token: npt.NDArray[np.int64]
    logit: npt.NDArray[np.float32]
    normaliser: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepOutput:
    """What a step computed.

    Attributes:
        logits: [B, V] of the last token of each row (prefill: B = 1), or [T, V] of all tokens where asked.
        record: its routing, for the usage ledger.
        share: demanded and missed router mass of each row.
        outputs: what the experts put out over the record's tokens, where it was observed.
        chosen: the next token of each row, where the runner chose it on the way; saves every look at the logits.
    """

    logits: Tensor
    record: StepRecord
    share: RowShare
    chosen: Chosen | None = None
    outputs: ExpertOutputs | None = None


class StepFault(StoreError):
    """A step that could not be run because an expert cannot be read. No row was advanced.

    Attributes:
        cause: what reading it raised.
        positions: of the rows, among those given, whose tokens need it; they cannot be told where there are none.
        is_repeatable: whether the rows that need it may run the step again, once they no longer do.
    """

    def __init__(self, cause: StoreError, positions: Sequence[int], is_repeatable: bool = True) -> None:
        super().__init__(str(cause))
        self.expert = cause.expert
        self.cause = cause
        self.positions = tuple(positions)
        self.is_repeatable = is_repeatable


class Runner:
    """Prefill and decode over rows.

    Args:
        model: what to run.
        max_rows: most sequences at once.
        max_tokens: most tokens of a row.

    Attributes:
        kind: what this way of running is called towards users.
        can_choose: whether `decode` takes choices and gives `StepOutput.chosen`.
        decode_path: who drives the experts of a decode step, "host" or "device".
        tells_fetching: whether `prefill` and `decode` want to know whose requests fetch what the store lacks; else a
            row's mask says it.
        can_temper_router: whether rows may have a router temperature.
    """

    kind: ClassVar[str] = "the host-driven path"
    decode_path: ClassVar[str] = "host"
    can_choose: ClassVar[bool] = False
    tells_fetching: ClassVar[bool] = False
    can_temper_router: ClassVar[bool] = True

    def __init__(self, model: SelectiveModel, *, max_rows: int, max_tokens: int) -> None:
        self.model = model
        self.max_rows, self.max_tokens = max_rows, max_tokens
        self.cache = RowCache(max_rows=max_rows, max_tokens=max_tokens, device=model.device)

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.cache.allocate()

    def free(self, row: int) -> None:
        """Give a row back."""
        self.cache.free(row)

    @property
    def num_free_rows(self) -> int:
        """Rows that `allocate` can still give."""
        return self.max_rows - self.cache.num_used_rows

    @property
    def num_cached_tokens(self) -> int:
        """Tokens held in rows."""
        return sum(self.cache.lengths)

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
        """Append `tokens` to a row. Raises StepFault, StepMemoryError.

        Args:
            row: handle from `allocate`.
            tokens: at least one, and no more than the row has room for.
            mask: of this sequence; None is the server's.
            temperature: of its routers.
            all_logits: give the logits of every token, not only of the last.
        """
        start = self.cache.begin_prefill(row, len(tokens))
        ids = torch.tensor([list(tokens)], device=self.model.device)
        positions = torch.arange(start, start + len(tokens), device=self.model.device)[None]
        self.model.routing.begin(1, len(tokens), None if mask is None else [mask], [temperature])
        return self._forward(ids, positions, 0 if all_logits else 1)

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        *,
        masks: Sequence[ExpertMask | None] | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> StepOutput:
        """Append one token to each row; logits come in the order of `rows`. See `prefill` for the rest.

        Raises:
            StepFault: an expert cannot be read; the step may be run again for the rows that do not need it.
            StepMemoryError: memory does not suffice; it may be run again without the rows that are named.
        """
        order = self.cache.order(rows)
        try:
            positions = self.cache.begin_decode([rows[at] for at in order])[:, None]
        except StepMemoryError as error:
            raise StepMemoryError(str(error), [order[at] for at in error.positions]) from None
        ids = torch.tensor([[tokens[at]] for at in order], device=self.model.device)
        self.model.routing.begin(
            len(rows),
            1,
            None if masks is None else [masks[at] for at in order],
            None if temperatures is None else [temperatures[at] for at in order],
        )
        try:
            output = self._forward(ids, positions, 1)
        except StepFault as fault:
            raise StepFault(fault.cause, [order[at] for at in fault.positions]) from fault.cause
        except StepMemoryError as error:
            longest = max(range(len(rows)), key=lambda at: self.cache.length(rows[at]))
            raise StepMemoryError(str(error), [longest]) from None
        if order == list(range(len(order))):
            return output
        back = [order.index(at) for at in range(len(order))]
        share = RowShare(output.share.demanded[back], output.share.missed[back])
        outputs = None if output.outputs is None else output.outputs.take_tokens(back)
        return StepOutput(output.logits[back], output.record.take_tokens(back), share, outputs=outputs)

    def fetch_refusal(self) -> str | None:
        """Why experts that the store lacks cannot come from its source in the middle of a step; None where they can, if
        there is a source."""
        return None

    def prefetch(self, mask: ExpertMask) -> None:
        """Bring the experts that a mask allows into slots ahead of their use, as far as slots reach."""
        for layer, allowed in enumerate(mask.allowed & self.model.routing.mask.allowed):
            self.model.cache.prefetch(layer, np.flatnonzero(allowed).tolist())

    def adopt(self) -> None:
        """Take into use what the store and routing's mask have changed by; call it between two steps, after both.

        The host-driven path has nothing to do: it asks the store at every miss.
        """

    def close(self) -> None:
        """Free what the model holds."""
        self.model.close()

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: int) -> StepOutput:
        kv_tokens = self.cache.step_end
        masks = attention_masks(self.model.model.config, positions, kv_tokens, self.model.dtype)
        arguments: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "attention_mask": masks}
        try:
            result = self.model.model(
                **arguments, past_key_values=self.cache, use_cache=True, logits_to_keep=logits_to_keep
            )
            record, share = self.model.routing.finish()
            outputs = None if self.model.observer is None else self.model.observer.take()
        except StoreError as error:
            needing = [] if error.expert is None else self.model.routing.rows_served_by(*error.expert)
            self.model.routing.abandon()
            raise StepFault(error, needing) from error
        except BaseException as error:
            self.model.routing.abandon()
            if not ran_out(error):
                raise
            problem = StepMemoryError(
                f"the memory for a step of {ids.numel()} tokens ended ({told(error)}): {REMEDY}", [0]
            )
        else:
            self.cache.commit()
            logits = result.logits[0] if logits_to_keep == 0 else result.logits[:, -1]
            return StepOutput(logits.float(), record, share, outputs=outputs)
        raise problem
