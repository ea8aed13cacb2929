"""Runs the model on the host-driven path: transformers' forward, in which the host looks up and fetches experts.

`HostRunner` keeps keys and values of all sequences in the rows of one `RowCache` and decodes them in one batch.
Invariant: see `server.model.runner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from router.mask import ExpertMask
from server.model.host.assembly import HostModel
from server.model.host.kv_cache import RowCache
from server.model.runner import RowStep, StepFault, StepMemoryError, StepOutput
from server.model.seam.forward import run_forward
from server.model.seam.rows import StepRows, rows_of_step


class HostDriven:
    """The part of `Runner` that both host-driven runners share.

    Args:
        model: the model to run.
        max_rows: most sequences at once.
        max_tokens: most tokens of a row.
    """

    decode_path: Literal["host"] = "host"

    def __init__(self, model: HostModel, *, max_rows: int, max_tokens: int) -> None:
        self.model, self.max_rows, self.max_tokens = model, max_rows, max_tokens

    def fetch_refusal(self) -> str | None:
        """None: a miss reads the expert from the store or its source."""
        return None

    def prefetch(self, mask: ExpertMask) -> None:
        """See `Runner.prefetch`."""
        for layer, allowed in enumerate(mask.allowed & self.model.routing.mask.allowed):
            self.model.cache.prefetch(layer, np.flatnonzero(allowed).tolist())

    def adopt(self) -> None:
        """See `Runner.adopt`. Does nothing, because every miss reads from the store as it is then."""

    def close(self) -> None:
        """Free what the model holds."""
        self.model.close()


class HostRunner(HostDriven):
    """`Runner` over rows of one KV memory. `RowStep.fetches` has no effect on a row's mask."""

    def __init__(self, model: HostModel, *, max_rows: int, max_tokens: int) -> None:
        super().__init__(model, max_rows=max_rows, max_tokens=max_tokens)
        self.cache = RowCache(max_rows=max_rows, max_tokens=max_tokens, device=model.device)

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.cache.allocate()

    def free(self, row: int) -> None:
        """Free a row."""
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
        fetches: bool = False,
        all_logits: bool = False,
    ) -> StepOutput:
        """See `Runner.prefill`."""
        start = self.cache.begin_prefill(row, len(tokens))
        ids = torch.tensor([list(tokens)], device=self.model.device)
        positions = torch.arange(start, start + len(tokens), device=self.model.device)[None]
        self.model.routing.begin(1, len(tokens), [mask], [temperature])
        # on a GPU, chunks have fixed bounds, and many small calls are slower than on a CPU
        rows = StepRows(start=start) if self.model.device.type == "cpu" else None
        return self._forward(ids, positions, rows, all_logits=all_logits)

    @torch.inference_mode()
    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """See `Runner.decode`."""
        order = self.cache.order([step.row for step in steps])
        ordered = [steps[at] for at in order]
        try:
            positions = self.cache.begin_decode([step.row for step in ordered])[:, None]
            ids = torch.tensor([[step.token] for step in ordered], device=self.model.device)
            masks, temperatures = [step.mask for step in ordered], [step.temperature for step in ordered]
            self.model.routing.begin(len(ordered), 1, masks, temperatures)
            longest = max(range(len(ordered)), key=lambda at: self.cache.length(ordered[at].row))
            output = self._forward(ids, positions, StepRows(self.cache.step_lengths), longest=longest)
        except (StepFault, StepMemoryError) as error:
            error.positions = tuple(order[at] for at in error.positions)
            raise
        if order == list(range(len(order))):
            return output
        return output.select([order.index(at) for at in range(len(order))])

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: StepRows | None,
        *,
        all_logits: bool = False,
        longest: int = 0,
    ) -> StepOutput:
        with rows_of_step(rows):
            output, _ = run_forward(
                self.model,
                ids,
                positions,
                self.cache,
                kv_tokens=self.cache.step_end,
                all_logits=all_logits,
                longest=longest,
            )
        self.cache.commit()
        return output
