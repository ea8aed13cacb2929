"""Runs the model on the host-driven path: transformers' forward, in which the host looks up and fetches experts.

`HostRunner` keeps keys and values of all sequences in the blocks of one `BlockCache` and decodes them in one batch.
Invariant: see `server.model.runner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from router.mask import ExpertMask
from server.model.balance import SlotsAndBlocks
from server.model.host.assembly import HostModel
from server.model.host.cuts import cuts_anywhere
from server.model.host.kv_cache import BlockCache
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv.rows import KvRows
from server.model.kv_memory import MemoryShares, kv_token_bytes
from server.model.runner import RowStep, StepOutput
from server.model.seam.forward import run_forward
from server.model.seam.rows import NotApartError, StepRows, attends_by_rows, rows_of_step


def block_bytes_of(model: HostModel) -> int:
    """Bytes of one block of KV memory in all layers of a model."""
    return BLOCK_TOKENS * kv_token_bytes(model.model.config.get_text_config(), model.dtype.itemsize)


class HostDriven:
    """The part of `Runner` that both host-driven runners share.

    Args:
        model: the model to run.
        max_rows: most sequences at once.
        max_tokens: most tokens of a row.
        kv: the blocks of the rows; None takes as many as rows of `max_tokens` need, and shares them.
        balance: moves memory between them and the model's slots; None: nothing does.
    """

    decode_path: Literal["host"] = "host"

    def __init__(
        self,
        model: HostModel,
        *,
        max_rows: int,
        max_tokens: int,
        kv: KvRows | None = None,
        balance: SlotsAndBlocks | None = None,
    ) -> None:
        self.model, self.max_rows, self.max_tokens = model, max_rows, max_tokens
        self.kv = kv or KvRows(max_rows=max_rows, num_blocks=max_rows * num_blocks_of(max_tokens))
        block_bytes = block_bytes_of(model)
        self.balance = balance or SlotsAndBlocks(
            model.cache,
            self.kv,
            blocks_bytes=lambda num_blocks: num_blocks * block_bytes,
            reason="this runner was made without",
        )

    def shares(self) -> MemoryShares:
        """See `Runner.shares`."""
        return self.balance.shares()

    def after_step(self) -> None:
        """See `Runner.after_step`."""
        self.balance.after_step()

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.kv.allocate()

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
    """`Runner` over blocks of one KV memory. `RowStep.fetches` has no effect on a row's mask."""

    @cached_property
    def cache(self) -> BlockCache:
        """Keys and values of all rows, in the blocks of `kv`."""
        return BlockCache(self.kv, self.model.device, by_rows=attends_by_rows(self.model.model))

    @cached_property
    def cuts_anywhere(self) -> bool:
        """See `Runner.cuts_anywhere`."""
        return cuts_anywhere(self.model)

    def free(self, row: int) -> None:
        """Free a row."""
        self.kv.free(row)
        self.cache.release()

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
        start = self.cache.begin_prefill(row, len(tokens))
        ids = torch.tensor([list(tokens)], device=self.model.device)
        positions = torch.arange(start, start + len(tokens), device=self.model.device)[None]
        self.model.routing.begin(1, len(tokens), [mask], [temperature], [adapter])
        # on a GPU, chunks have fixed bounds, and many small calls are slower than on a CPU
        rows = StepRows(start=start) if self.model.device.type == "cpu" else None
        return self._forward(ids, positions, rows, all_logits=all_logits)

    @torch.inference_mode()
    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """See `Runner.decode`."""
        try:
            return self._decode(steps)
        except NotApartError:
            self.cache.by_rows = False  # for good: latent attention makes keys of what it finds in the cache
            return self._decode(steps)

    def _decode(self, steps: Sequence[RowStep]) -> StepOutput:
        rows = [step.row for step in steps]
        positions = self.cache.begin_decode(rows)[:, None]
        ids = torch.tensor([[step.token] for step in steps], device=self.model.device)
        masks, temperatures = [step.mask for step in steps], [step.temperature for step in steps]
        self.model.routing.begin(len(rows), 1, masks, temperatures, [step.adapter for step in steps])
        lengths = self.cache.step_lengths
        step_rows = StepRows(lengths, apart=self.cache.apart)
        return self._forward(ids, positions, step_rows, longest=lengths.index(max(lengths)))

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
