"""The runner of the device-driven path: prompts through transformers with streamed experts, tokens through captured
graphs.

KV memory has fixed rows of fixed length, so a sequence joins, leaves or changes its mask by writing device tensors,
never by another capture. Invariant: `lengths` on the device equal the host's, and a call that raises before its graph
is replayed leaves both as they were.
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
from server.model.device.compiling import in_parallel
from server.model.device.graph import StepGraph
from server.model.device.host_spans import SpanGrowth
from server.model.device.prefill import ExpertStream
from server.model.device.sampling import TokenDraw
from server.model.device.state import Report, RowState
from server.model.device.step import DecodeStep, StepOptions, Tuning, pow2
from server.model.device.weights import DecodeShape, TrunkWeights
from server.model.routing import RowShare
from server.model.runner import Choice, Chosen, Runner, StepOutput


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


class DeviceRunner(Runner):
    """Prefill and decode over fixed rows of the device.

    Args:
        model: trunk, tokenizer and routing; its experts modules are bound to `stream`.
        shape, weights: of the captured step.
        pages, stream: of the experts.
        growth: brings experts that come into use later; None leaves them masked.
        resident_bias: lambda of cache-aware routing of decode steps, 0: off.
    """

    kind: ClassVar[str] = "the device-driven path"
    decode_path: ClassVar[str] = "device"
    can_choose: ClassVar[bool] = True
    can_fetch_missing: ClassVar[bool] = False
    can_temper_router: ClassVar[bool] = True

    def __init__(
        self,
        model: SelectiveModel,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        stream: ExpertStream,
        *,
        growth: SpanGrowth | None = None,
        resident_bias: float = 0.0,
    ) -> None:
        self.model, self.shape, self.pages = model, shape, pages
        self.max_rows, self.max_tokens = shape.max_rows, shape.max_tokens
        self._weights, self._stream, self._growth, self._bias = weights, stream, growth, resident_bias
        self._state = RowState(shape, model.device)
        self._lengths = [0] * self.max_rows
        self._free = list(range(self.max_rows - 1, -1, -1))
        self._servable = ExpertMask.of(pages.servable.numpy())
        self._row_mask: list[ExpertMask | None] = [None] * self.max_rows  # as given, to see a change
        self._row_allowed = [self._servable] * self.max_rows  # as the device has it
        self._row_temperature = [1.0] * self.max_rows
        self._graphs: dict[tuple[int, bool], StepGraph] = {}
        self._draws: dict[tuple[StepGraph, bool], TokenDraw] = {}

    def capture(self, progress: Callable[[str, float], None] = lambda phase, share: None) -> None:
        """Compiles and captures the step of every batch size up to `max_rows`, with masks and without, so that no
        request waits for it."""
        sizes = sorted({pow2(rows) for rows in range(1, self.max_rows + 1)})
        full = self._bias == 0.0 and self._effective(None).is_full
        wanted = [(size, masked) for masked in ((False, True) if full else (True,)) for size in sizes]
        graphs = {key: self._new_graph(*key) for key in wanted if key not in self._graphs}
        if self.model.device.type == "cuda":
            progress("compiling kernels", 0.0)
            with in_parallel():
                self._stream.compile()
                for graph in graphs.values():
                    graph.step.compile()
        for done, (key, graph) in enumerate(graphs.items()):
            progress("capturing decode", done / len(wanted))
            graph.capture()
            self._graphs[key] = graph

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
        self,
        row: int,
        tokens: Sequence[int],
        *,
        mask: ExpertMask | None = None,
        temperature: float = 1.0,
        all_logits: bool = False,
    ) -> StepOutput:
        """Append `tokens` to a row: see `Runner.prefill`."""
        self._take_growth()
        start, routing = self._lengths[row], self.model.routing
        end = start + len(tokens)
        assert end <= self.max_tokens, f"row {row}: {end} tokens, room for {self.max_tokens}"
        positions = torch.arange(start, end, device=self.model.device)[None]
        effective = self._effective(mask)
        routing.begin(1, len(tokens), None if effective is routing.mask else [effective], [temperature])
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
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        *,
        masks: Sequence[ExpertMask | None] | None = None,
        temperatures: Sequence[float] | None = None,
        choices: Sequence[Choice | None] | None = None,
    ) -> StepOutput:
        """Append one token to each row; logits come in the order of `rows` and are valid until the next `decode`.

        The next token of each row comes as `chosen`, as `choices` say; None is the most likely one.
        """
        self._take_growth()
        for row in rows:
            assert self._lengths[row] < self.max_tokens, f"row {row} is full: {self.max_tokens} tokens"
        for row, mask in zip(rows, masks or [None] * len(rows), strict=True):
            self._set_mask(row, mask)
        for row, temperature in zip(rows, temperatures or [1.0] * len(rows), strict=True):
            self._set_temperature(row, temperature)
        masked = self._bias != 0.0 or any(
            not self._row_allowed[row].is_full or self._row_temperature[row] != 1.0 for row in rows
        )
        graph = self._graph(pow2(len(rows)), masked)
        draw = self._draw(graph, choices) if choices is not None and any(choices) else None
        graph.enqueue(rows, tokens)
        if draw is not None and choices is not None:
            draw.enqueue(choices)
        report = graph.wait()
        for row in rows:
            self._lengths[row] += 1
        num = len(rows)
        chosen = _chosen(report, draw, num)
        return StepOutput(graph.step.logits[:num], *_record(report, num, masked), chosen)

    def prefetch(self, mask: ExpertMask) -> None:
        """Nothing to do ahead of use: a prompt's chunk streams what its mask allows, and decoding fetches the rest."""

    def adopt(self) -> None:
        """Bring what routing's mask allows now and what is not in host memory yet; it is used from the first step after
        its arrival on, and stays masked until then. See `Runner.adopt`."""
        if self._growth is not None:
            self._growth.want(self.model.routing.mask.allowed)

    def close(self) -> None:
        """Drop the graphs and free what the model holds."""
        if self._growth is not None:
            self._growth.wait()
        self._graphs.clear()
        self._draws.clear()
        self.model.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _graph(self, batch: int, masked: bool) -> StepGraph:
        key = (batch, masked)
        if key not in self._graphs:
            self._graphs[key] = self._new_graph(batch, masked)
            self._graphs[key].capture()
        return self._graphs[key]

    def _new_graph(self, batch: int, masked: bool) -> StepGraph:
        options = StepOptions(
            pdl=batch == 1 and _launches_dependents(self.model.device),
            masked=masked,
            resident_bias=self._bias,
            tuning=Tuning(),
        )
        step = DecodeStep(self.shape, self._weights, self.pages, self._state, batch, options)
        return StepGraph(step, for_host=True)

    def _draw(self, graph: StepGraph, choices: Sequence[Choice | None]) -> TokenDraw:
        narrow = any(choice is not None and (choice.top_k is not None or choice.top_p < 1.0) for choice in choices)
        key = (graph, narrow)
        if key not in self._draws:
            self._draws[key] = TokenDraw(graph.step, narrow)
        return self._draws[key]

    def _take_growth(self) -> None:
        if self._growth is not None and self._growth.take():
            self._servable = ExpertMask.of(self.pages.servable.numpy())
            self._row_mask = [None] * self.max_rows

    def _set_length(self, row: int, length: int) -> None:
        self._lengths[row] = length
        self._state.lengths[row : row + 1].fill_(length)

    def _effective(self, mask: ExpertMask | None) -> ExpertMask:
        """A sequence's mask (None: the server's) without experts of the store that have not arrived in host memory."""
        wanted = self.model.routing.mask if mask is None else mask
        return wanted & self._servable if (wanted.allowed & ~self._servable.allowed).any() else wanted

    def _set_mask(self, row: int, mask: ExpertMask | None) -> None:
        given = self.model.routing.mask if mask is None else mask
        known = self._row_mask[row]
        if known is not None and (given is known or np.array_equal(given.allowed, known.allowed)):
            return
        allowed = self._effective(mask)
        self._state.masks[row] = torch.from_numpy(allowed.allowed.astype(np.int8)).to(self.model.device)
        self._row_mask[row], self._row_allowed[row] = given, allowed

    def _set_temperature(self, row: int, temperature: float) -> None:
        if temperature != self._row_temperature[row]:
            self._state.temperatures[row : row + 1].fill_(temperature)
            self._row_temperature[row] = temperature


def _launches_dependents(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _chosen(report: Report, draw: TokenDraw | None, num: int) -> Chosen:
    token, logit = report.best_token[:num], report.best_logit[:num]
    if draw is not None:
        token, logit = draw.drawn[0, :num], draw.drawn[1, :num]
    normaliser = report.normaliser[:num].numpy().copy()
    return Chosen(token.numpy().astype(np.int64), logit.numpy().astype(np.float32), normaliser)


def _record(report: Report, num: int, masked: bool) -> tuple[StepRecord, RowShare]:
    """The routing of a step's first `num` entries."""
    served = report.ids[:, :num].numpy().astype(np.int64)
    weight = report.weights[:, :num].numpy().copy()
    if not masked:
        demanded = weight.sum(axis=2, dtype=np.float64)
        return StepRecord(served, weight), RowShare(demanded.T, np.zeros_like(demanded.T))
    demand = report.demand[:, :num].numpy().astype(np.int64)
    mass = report.mass[:, :num].numpy().copy()
    given = (demand[..., None] == served[..., None, :]).any(axis=-1)
    missed = np.where(given, 0.0, mass).sum(axis=2, dtype=np.float64)
    demanded = mass.sum(axis=2, dtype=np.float64)
    record = StepRecord(served, weight, demand, mass, missed.sum(axis=1))
    return record, RowShare(demanded.T, missed.T)
