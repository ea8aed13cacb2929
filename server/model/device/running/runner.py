"""The runner of the device-driven path: prompts run in transformers with streamed experts, tokens in captured graphs.

A step's report names the chosen experts that are not in reach (the request fetches them, or they could not be read at
the start); the runner reads them and runs the step again. Invariant: a call that raises leaves the rows unchanged, here
and on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from expert_store.paging.pages import DevicePages
from router.mask import ExpertMask
from server.model.device.memory.needed import NeededSpans, NoRoomError
from server.model.device.memory.reading import SpanGrowth
from server.model.device.running.output import chosen_tokens, routing_of
from server.model.device.running.rows import Rows
from server.model.device.step.graphs import StepGraphs
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.state import PrefillRow, Report, RowState
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape, TrunkWeights
from server.model.load_progress import Progress
from server.model.runner import RowStep, SelectiveModel, StepFault, StepOutput
from server.model.seam.forward import run_forward


class DeviceRunner:
    """`Runner` over fixed rows of the device.

    Args:
        model: trunk, tokenizer and routing; its experts modules are bound to `stream`.
        shape, weights: of the captured step.
        pages, stream: of the experts.
        growth: reads the experts of later growths; None reads none.
        needed: reads experts that a token needs and that are not in reach; None if all are in reach.
        options: of every captured step; `pdl` and `masked` are set for each.
    """

    decode_path: Literal["device"] = "device"

    def __init__(
        self,
        model: SelectiveModel,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        stream: ExpertStream,
        *,
        growth: SpanGrowth | None = None,
        needed: NeededSpans | None = None,
        options: StepOptions | None = None,
    ) -> None:
        self.model, self.shape, self.pages = model, shape, pages
        self.max_rows, self.max_tokens = shape.max_rows, shape.max_tokens
        options = options or StepOptions()
        self._stream, self._bias = stream, options.resident_bias
        self._growth, self._needed = growth, needed
        self._state = RowState(shape, model.device)
        self.rows = Rows(self._state, shape, pages.servable.numpy())
        self.graphs = StepGraphs(shape, weights, pages, self._state, options)
        self._seen = (0, 0)

    def capture(self, progress: Progress = lambda phase, share: None) -> None:
        """Compiles and captures the step of every batch size up to `max_rows`, with masks and without, so that no
        request waits for it."""
        full = self._bias == 0.0 and bool(self.rows.table(self.model.routing.mask, False).all())
        self.graphs.capture(self._stream, full, progress)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.rows.allocate()

    def free(self, row: int) -> None:
        """Free a row."""
        self.rows.free(row)

    @property
    def num_free_rows(self) -> int:
        """Rows that `allocate` can still give."""
        return self.rows.num_free

    @property
    def num_cached_tokens(self) -> int:
        """Tokens held in rows."""
        return sum(self.rows.lengths)

    # -- steps ---------------------------------------------------------------------------------------------------------

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
        self._look()
        start, routing = self.rows.lengths[row], self.model.routing
        end = start + len(tokens)
        assert end <= self.max_tokens, f"row {row}: {end} tokens, room for {self.max_tokens}"
        positions = torch.arange(start, end, device=self.model.device)[None]
        given = mask or routing.mask
        allowed = self.rows.table(given, fetches) != 0
        effective = given if (allowed == given.allowed).all() else ExpertMask.of(allowed)
        routing.begin(1, len(tokens), None if effective is routing.mask else [effective], [temperature])
        self._stream.begin(len(tokens), allowed, None if self._needed is None else self._needed.in_turns)
        ids = torch.tensor([list(tokens)], device=self.model.device)
        past = PrefillRow(self._state, row, start, end)
        output, _ = run_forward(self.model, ids, positions, past, kv_tokens=end, all_logits=all_logits)
        self.rows.set_length(row, end)
        return output

    @torch.inference_mode()
    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """See `Runner.decode`. `chosen` has the next token of each row. If the experts that the rows need do not fit
        into memory together, the rows run in parts."""
        for step in steps:
            length = self.rows.lengths[step.row]
            assert length < self.max_tokens, f"row {step.row} is full: {self.max_tokens} tokens"
        return self._decode(steps)

    def _decode(self, steps: Sequence[RowStep]) -> StepOutput:
        try:
            return self._decode_at_once(steps)
        except NoRoomError as error:
            if len(steps) == 1:
                raise StepFault(error, (0,)) from error
        half = len(steps) // 2
        first = self._decode(steps[:half])
        first = replace(first, logits=first.logits.clone())
        try:
            return StepOutput.concat([first, self._decode(steps[half:])])
        except BaseException as error:
            self.rows.take_back([step.row for step in steps[:half]], 1)
            if isinstance(error, StepFault):
                error.positions = tuple(half + at for at in error.positions)
            raise

    def _decode_at_once(self, steps: Sequence[RowStep]) -> StepOutput:
        num, rows = len(steps), [step.row for step in steps]
        while True:
            self._look()
            for step in steps:
                self.rows.settle(step.row, step.mask or self.model.routing.mask, step.fetches, step.temperature)
            masked = self._bias != 0.0 or not all(self.rows.is_plain(row) for row in rows)
            graph = self.graphs.step(num, masked)
            masked = graph.step.options.masked
            draw = self.graphs.draw(graph, steps)
            graph.enqueue(rows, [step.token for step in steps])
            if draw is not None:
                draw.enqueue(steps)
            report = graph.wait()
            if self._has_everything(report, rows):
                break
        self.rows.advanced(rows)
        in_groups = self.shape.router.groups > 1 and self._bias == 0.0
        record, share = routing_of(report, num, masked, self.rows.hidden(rows) if in_groups else None)
        return StepOutput(graph.step.logits[:num], record, share, chosen=chosen_tokens(report, draw, num))

    def _has_everything(self, report: Report, rows: Sequence[int]) -> bool:
        """Whether the last step had every expert that it chose. If not, read the missing ones and reset its rows.

        After the first layer that lacked an expert a token's choice may be wrong: the experts of later layers are read
        if there is room, and an error in reading them fails no request.
        """
        picks = report.ids[:, : len(rows)].numpy()  # [L, B, K]
        absent = self.rows.absent(rows, picks)
        if absent is None or self._needed is None:
            return True
        used = np.zeros((self.shape.num_moe_layers, self.shape.num_experts + 1), dtype=np.bool_)
        layers = np.arange(len(used))[:, None, None]
        used[layers, picks] = True
        self._needed.use(used[:, :-1])
        if not absent.any():
            return True
        self.rows.take_back(rows)
        first = absent & (layers == absent.any(axis=2).argmax(axis=0)[:, None])
        needed: dict[tuple[int, int], list[int]] = {}
        for layer, at, pick in np.argwhere(first):
            needed.setdefault((int(layer), int(picks[layer, at, pick])), []).append(int(at))
        places = {(int(layer), int(picks[layer, at, pick])) for layer, at, pick in np.argwhere(absent & ~first)}
        failures = self._needed.read(list(needed), sorted(places - needed.keys()), used[:, :-1])
        for expert, positions in needed.items():
            if expert in failures:
                raise StepFault(failures[expert], positions) from failures[expert]
        return False

    def fetch_refusal(self) -> str | None:
        """See `Runner.fetch_refusal`."""
        wanted = self.shape.num_moe_layers * min(self.shape.top_k, self.shape.num_experts)
        capacity = 0 if self._needed is None else self._needed.capacity
        if capacity >= wanted:
            return None
        return (
            f"host memory has room for {capacity} experts beyond the store's, and a token may need {wanted}: raise "
            "host_memory"
        )

    def prefetch(self, mask: ExpertMask) -> None:
        """Does nothing: a prompt's chunk streams the experts that its mask allows, and decoding fetches the rest."""

    def adopt(self) -> None:
        """Starts to read the experts that routing's mask now allows and that are not in host memory; each stays masked
        until the first step after it was read. See `Runner.adopt`."""
        if self._growth is not None:
            self._growth.start(self.model.routing.mask.allowed)
            self._look()

    def close(self) -> None:
        """Drop the graphs and free what the model holds."""
        if self._growth is not None:
            self._growth.wait()
        self.graphs.clear()
        self.model.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Between two steps: add the spans that were read, and set the rows' experts in reach."""
        if self._growth is None or self._needed is None:
            return
        for arena, experts in self._growth.take():
            self._needed.give_back([expert for expert in experts if expert is not None])
            self.pages.add_spans(arena, experts)
            self._needed.add_rows()
        seen = (self._needed.num_changes, self._growth.num_changes)
        if seen != self._seen:
            self.rows.reach(self.pages.servable.numpy(), self._growth.pending)
            self._seen = seen
