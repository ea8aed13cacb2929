"""The runner of the device-driven path: prompts through transformers with streamed experts, tokens through captured
graphs.

The interface of `server.model.runner.Runner`. KV memory has fixed rows of fixed length, so a sequence joins, leaves or
changes its mask by writing device tensors, never by another capture. Invariant: `lengths` on the device equal the
host's, and a call that raises before its graph is replayed leaves both as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from expert_store.paging.pages import DevicePages
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.assembly import SelectiveModel
from server.model.attention_mask import attention_masks
from server.model.device.graph import StepGraph
from server.model.device.prefill import ExpertStream
from server.model.device.step import DecodeStep, RowState, StepOptions, Tuning, pow2
from server.model.device.weights import DecodeShape, TrunkWeights
from server.model.routing import RowShare
from server.model.runner import StepOutput


class PrefillRow(Cache):
    """One row of the device's KV memory as transformers' cache: appends a chunk's keys and values at `start`."""

    def __init__(self, state: RowState, row: int, start: int, end: int) -> None:
        super().__init__(layers=[])
        self._state, self._row, self._start, self._end = state, row, start, end

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [1, heads, tokens, dim]; returns the row up to the chunk's end."""
        keys, values = self._state.keys[layer_idx, self._row], self._state.values[layer_idx, self._row]
        keys[:, self._start : self._end] = key_states[0]
        values[:, self._start : self._end] = value_states[0]
        return keys[None, :, : self._end], values[None, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk."""
        return self._start


class DeviceRunner:
    """Prefill and decode over fixed rows of the device.

    Args:
        model: trunk, tokenizer and routing; its experts modules are bound to `stream`.
        shape, weights: of the captured step.
        pages, stream: of the experts.
        resident_bias: lambda of cache-aware routing, 0: off.

    Attributes:
        kind, can_fetch_missing, can_temper_router: see `Runner`.
    """

    kind: ClassVar[str] = "the device-driven path"
    can_fetch_missing: ClassVar[bool] = False
    can_temper_router: ClassVar[bool] = False

    def __init__(
        self,
        model: SelectiveModel,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        stream: ExpertStream,
        *,
        resident_bias: float = 0.0,
    ) -> None:
        self.model, self.shape, self.pages = model, shape, pages
        self.max_rows, self.max_tokens = shape.max_rows, shape.max_tokens
        self._weights, self._stream, self._bias = weights, stream, resident_bias
        self._state = RowState(shape, model.device)
        self._lengths = [0] * self.max_rows
        self._free = list(range(self.max_rows - 1, -1, -1))
        self._servable = ExpertMask.of(((pages.host_index >= 0) | (pages.page_table.cpu() >= 0)).numpy())
        self._row_mask: list[ExpertMask | None] = [None] * self.max_rows  # as given, to see a change
        self._row_allowed = [self._servable] * self.max_rows  # as the device has it
        self._graphs: dict[tuple[int, bool], StepGraph] = {}

    def capture(self, progress: Callable[[str, float], None] = lambda phase, share: None) -> None:
        """Compiles and captures the step of every batch size up to `max_rows`, so that no request waits for it."""
        sizes = sorted({pow2(rows) for rows in range(1, self.max_rows + 1)})
        for done, size in enumerate(sizes):
            progress("capturing decode", done / len(sizes))
            self._graph(size, not self._effective(None).is_full)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        assert self._free, f"all {self.max_rows} rows are in use"
        return self._free.pop()

    def free(self, row: int) -> None:
        """Give a row back."""
        assert row not in self._free, f"row {row} is free already"
        self._set_length(row, 0)
        self._free.append(row)

    @property
    def num_free_rows(self) -> int:
        """Rows that `allocate` can still give."""
        return len(self._free)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens held in rows."""
        return sum(self._lengths)

    # -- steps ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self, row: int, tokens: Sequence[int], *, mask: ExpertMask | None = None, all_logits: bool = False
    ) -> StepOutput:
        """Append `tokens` to a row: see `Runner.prefill`."""
        start, routing = self._lengths[row], self.model.routing
        end = start + len(tokens)
        assert end <= self.max_tokens, f"row {row}: {end} tokens, room for {self.max_tokens}"
        positions = torch.arange(start, end, device=self.model.device)[None]
        effective = self._effective(mask)
        routing.begin(1, len(tokens), None if effective is routing.mask else [effective])
        self._stream.begin(len(tokens), effective.allowed)
        try:
            result = self.model.model(
                input_ids=torch.tensor([list(tokens)], device=self.model.device),
                position_ids=positions,
                attention_mask=attention_masks(self.model.model.config, positions, end, self.model.dtype),
                past_key_values=PrefillRow(self._state, row, start, end),
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
            )
            record, share = routing.finish()
        except BaseException:
            routing.abandon()
            raise
        self._set_length(row, end)
        logits = result.logits[0] if all_logits else result.logits[:, -1]
        return StepOutput(logits.float(), record, share)

    @torch.inference_mode()
    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], *, masks: Sequence[ExpertMask | None] | None = None
    ) -> StepOutput:
        """Append one token to each row; logits come in the order of `rows`."""
        for row in rows:
            assert self._lengths[row] < self.max_tokens, f"row {row} is full: {self.max_tokens} tokens"
        for row, mask in zip(rows, masks or [None] * len(rows), strict=True):
            self._set_mask(row, mask)
        masked = self._bias != 0.0 or any(not self._row_allowed[row].is_full for row in rows)
        graph = self._graph(pow2(len(rows)), masked)
        step, idle = graph.step, graph.step.batch - len(rows)
        step.inputs.copy_(torch.tensor([[*rows, *[-1] * idle], [*tokens, *[0] * idle]], dtype=torch.int32))
        graph.replay()
        for row in rows:
            self._lengths[row] += 1
        logits = step.logits[: len(rows)].clone()
        return StepOutput(logits, *self._record(step, rows, masked))

    def prefetch(self, mask: ExpertMask) -> None:
        """Nothing to do ahead of use: a prompt's chunk streams what its mask allows, and decoding fetches the rest."""

    def close(self) -> None:
        """Drop the graphs and free what the model holds."""
        self._graphs.clear()
        self.model.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _graph(self, batch: int, masked: bool) -> StepGraph:
        key = (batch, masked)
        if key not in self._graphs:
            options = StepOptions(
                pdl=batch == 1 and self.model.device.type == "cuda",
                masked=masked or self._bias != 0.0,
                resident_bias=self._bias,
                tuning=Tuning(),
            )
            step = DecodeStep(self.shape, self._weights, self.pages, self._state, batch, options)
            graph = StepGraph(step)
            graph.capture()
            self._graphs[key] = graph
        return self._graphs[key]

    def _record(self, step: DecodeStep, rows: Sequence[int], masked: bool) -> tuple[StepRecord, RowShare]:
        """The step's routing; the one place of a decode step that waits for the device."""
        num = len(rows)
        served = step.log_ids[:, :num].cpu().numpy().astype(np.int64)
        weight = step.log_weights[:, :num].cpu().numpy()
        if not masked:
            demanded = weight.sum(axis=2, dtype=np.float64)
            return StepRecord(served, weight), RowShare(demanded.T, np.zeros_like(demanded.T))
        demand = step.log_demand[:, :num].cpu().numpy().astype(np.int64)
        mass = step.log_mass[:, :num].cpu().numpy()
        given = (demand[..., None] == served[..., None, :]).any(axis=-1)
        missed = np.where(given, 0.0, mass).sum(axis=2, dtype=np.float64)
        demanded = mass.sum(axis=2, dtype=np.float64)
        record = StepRecord(served, weight, demand, mass, missed.sum(axis=1))
        return record, RowShare(demanded.T, missed.T)

    def _set_length(self, row: int, length: int) -> None:
        self._lengths[row] = length
        self._state.lengths[row : row + 1].fill_(length)

    def _effective(self, mask: ExpertMask | None) -> ExpertMask:
        """A sequence's mask (None: the server's) without experts that came to the store after the spans were pinned."""
        wanted = self.model.routing.mask if mask is None else mask
        return wanted & self._servable if (wanted.allowed & ~self._servable.allowed).any() else wanted

    def _set_mask(self, row: int, mask: ExpertMask | None) -> None:
        given = self.model.routing.mask if mask is None else mask
        if given is self._row_mask[row]:
            return
        allowed = self._effective(mask)
        self._state.masks[row] = torch.from_numpy(allowed.allowed.astype(np.int8)).to(self.model.device)
        self._row_mask[row], self._row_allowed[row] = given, allowed
