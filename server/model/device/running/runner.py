"""The runner of the device-driven path: prompts through transformers with streamed experts, tokens through captured
graphs.

An expert that a row may have and that is in no memory in reach yet (its request fetches, or it could not be read ahead)
is told by the step's report; it is brought, and the step runs again. Invariant: a call that raises leaves the rows as
they were, here and on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from expert_store.errors import StoreError
from expert_store.paging.pages import DevicePages
from router.mask import ExpertMask
from server.model.device.memory.fetched import FetchedSpans, NoRoomError
from server.model.device.memory.host_spans import SpanGrowth
from server.model.device.running.outcome import Asked, chosen_tokens, routing_of, together
from server.model.device.running.rows import Rows
from server.model.device.step.graphs import StepGraphs
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.state import PrefillRow, Report, RowState
from server.model.device.step.weights import DecodeShape, TrunkWeights
from server.model.host.assembly import SelectiveModel
from server.model.host.runner import Choice, Runner, StepFault, StepOutput
from server.model.seam.attention_mask import attention_masks
from server.model.seam.out_of_memory import REMEDY, StepMemoryError, ran_out, told


class DeviceRunner(Runner):
    """Prefill and decode over fixed rows of the device.

    Args:
        model: trunk, tokenizer and routing; its experts modules are bound to `stream`.
        shape, weights: of the captured step.
        pages, stream: of the experts.
        growth: brings experts that come into use later; None brings none.
        fetched: brings experts that a token needs and that are not in reach; None where all are.
        resident_bias: lambda of cache-aware routing of decode steps, 0: off.
    """

    kind: ClassVar[str] = "the device-driven path"
    decode_path: ClassVar[str] = "device"
    can_choose: ClassVar[bool] = True
    tells_fetching: ClassVar[bool] = True
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
        fetched: FetchedSpans | None = None,
        resident_bias: float = 0.0,
    ) -> None:
        self.model, self.shape, self.pages = model, shape, pages
        self.max_rows, self.max_tokens = shape.max_rows, shape.max_tokens
        self._stream, self._bias = stream, resident_bias
        self._growth, self._fetched = growth, fetched
        self._state = RowState(shape, model.device)
        self.rows = Rows(self._state, shape, pages.servable.numpy())
        self.graphs = StepGraphs(shape, weights, pages, self._state, resident_bias)
        self._seen = (0, 0)

    def capture(self, progress: Callable[[str, float], None] = lambda phase, share: None) -> None:
        """Compiles and captures the step of every batch size up to `max_rows`, with masks and without, so that no
        request waits for it."""
        full = self._bias == 0.0 and bool(self.rows.table(self.model.routing.mask, False).all())
        self.graphs.capture(self._stream, full, progress)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.rows.allocate()

    def free(self, row: int) -> None:
        """Give a row back."""
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
        all_logits: bool = False,
        fetches: bool = False,
    ) -> StepOutput:
        """Append `tokens` to a row: see `Runner.prefill`. `fetches` says that its request does."""
        self._look()
        start, routing = self.rows.lengths[row], self.model.routing
        end = start + len(tokens)
        assert end <= self.max_tokens, f"row {row}: {end} tokens, room for {self.max_tokens}"
        positions = torch.arange(start, end, device=self.model.device)[None]
        given = mask or routing.mask
        allowed = self.rows.table(given, fetches) != 0
        effective = given if (allowed == given.allowed).all() else ExpertMask.of(allowed)
        routing.begin(1, len(tokens), None if effective is routing.mask else [effective], [temperature])
        self._stream.begin(len(tokens), allowed, None if self._fetched is None else self._fetched.in_turns)
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
        except StoreError as error:
            routing.abandon()
            raise StepFault(error, (0,)) from error
        except BaseException as error:
            routing.abandon()
            if not ran_out(error):
                raise
            problem = StepMemoryError(
                f"the memory for {len(tokens)} tokens of a prompt ended ({told(error)}): {REMEDY}", [0]
            )
        else:
            self.rows.set_length(row, end)
            outputs = None if self.model.observer is None else self.model.observer.take()
            logits = result.logits[0] if all_logits else result.logits[:, -1]
            return StepOutput(logits.float(), record, share, outputs=outputs)
        raise problem

    @torch.inference_mode()
    def decode(
        self,
        rows: Sequence[int],
        tokens: Sequence[int],
        *,
        masks: Sequence[ExpertMask | None] | None = None,
        temperatures: Sequence[float] | None = None,
        choices: Sequence[Choice | None] | None = None,
        fetching: Sequence[bool] | None = None,
    ) -> StepOutput:
        """Append one token to each row; logits come in the order of `rows` and are valid until the next `decode`.

        The next token of each row comes as `chosen`, as `choices` say; None is the most likely one. Where what the rows
        of a batch fetch does not fit beside each other, they run in parts.

        Args:
            fetching: whether each row's request fetches what the store lacks.

        Raises:
            StepFault: an expert that rows need cannot be read; no row was advanced.
        """
        for row in rows:
            assert self.rows.lengths[row] < self.max_tokens, f"row {row} is full: {self.max_tokens} tokens"
        num = len(rows)
        return self._decode(
            Asked(
                rows,
                tokens,
                masks or [None] * num,
                temperatures or [1.0] * num,
                choices or [None] * num,
                fetching or [False] * num,
            )
        )

    def _decode(self, asked: Asked) -> StepOutput:
        try:
            return self._decode_at_once(asked)
        except NoRoomError as error:
            if len(asked.rows) == 1:
                raise StepFault(error, (0,)) from error
        half = len(asked.rows) // 2
        first = self._decode(asked.part(slice(half)))
        first = replace(first, logits=first.logits.clone())
        try:
            return together([first, self._decode(asked.part(slice(half, None)))])
        except BaseException as error:
            self.rows.take_back(asked.rows[:half], 1)
            if isinstance(error, StepFault):
                raise StepFault(error.cause, [half + at for at in error.positions]) from error.cause
            raise

    def _decode_at_once(self, asked: Asked) -> StepOutput:
        num = len(asked.rows)
        while True:
            self._look()
            for row, mask, fetches, temperature in zip(
                asked.rows, asked.masks, asked.fetching, asked.temperatures, strict=True
            ):
                self.rows.settle(row, mask or self.model.routing.mask, fetches, temperature)
            masked = self._bias != 0.0 or not all(self.rows.is_plain(row) for row in asked.rows)
            graph = self.graphs.step(num, masked)
            masked = graph.step.options.masked
            draw = self.graphs.draw(graph, asked.choices)
            graph.enqueue(asked.rows, asked.tokens)
            if draw is not None:
                draw.enqueue(asked.choices)
            report = graph.wait()
            if self._has_everything(report, asked.rows):
                break
        self.rows.advanced(asked.rows)
        in_groups = self.shape.router.groups > 1 and self._bias == 0.0
        routing = routing_of(report, num, masked, self.rows.hidden(asked.rows) if in_groups else None)
        return StepOutput(graph.step.logits[:num], *routing, chosen_tokens(report, draw, num))

    def _has_everything(self, report: Report, rows: Sequence[int]) -> bool:
        """Whether a step that just ran had every expert that it chose; where not, they are brought and its rows are as
        before.

        What a token chose after the first layer that went without something may be wrong, so it is brought as far as
        there is room, and no failure.
        """
        picks = report.ids[:, : len(rows)].numpy()  # [L, B, K]
        absent = self.rows.absent(rows, picks)
        if absent is None or self._fetched is None:
            return True
        used = np.zeros((self.shape.num_moe_layers, self.shape.num_experts + 1), dtype=np.bool_)
        layers = np.arange(len(used))[:, None, None]
        used[layers, picks] = True
        self._fetched.use(used[:, :-1])
        if not absent.any():
            return True
        self.rows.take_back(rows)
        first = absent & (layers == absent.any(axis=2).argmax(axis=0)[:, None])
        needed: dict[tuple[int, int], list[int]] = {}
        for layer, at, pick in np.argwhere(first):
            needed.setdefault((int(layer), int(picks[layer, at, pick])), []).append(int(at))
        places = {(int(layer), int(picks[layer, at, pick])) for layer, at, pick in np.argwhere(absent & ~first)}
        failures = self._fetched.bring(list(needed), sorted(places - needed.keys()), used[:, :-1])
        for expert, positions in needed.items():
            if expert in failures:
                raise StepFault(failures[expert], positions) from failures[expert]
        return False

    def fetch_refusal(self) -> str | None:
        """Why requests cannot fetch what the store lacks; None where they can."""
        wanted = self.shape.num_moe_layers * min(self.shape.top_k, self.shape.num_experts)
        capacity = 0 if self._fetched is None else self._fetched.capacity
        if capacity >= wanted:
            return None
        return (
            f"host memory has room for {capacity} experts beyond the store's, and a token may need {wanted}: raise "
            "host_memory"
        )

    def prefetch(self, mask: ExpertMask) -> None:
        """Nothing to do ahead of use: a prompt's chunk streams what its mask allows, and decoding fetches the rest."""

    def adopt(self) -> None:
        """Bring what routing's mask allows now and what is not in host memory yet; it is used from the first step after
        its arrival on, and stays masked until then. See `Runner.adopt`."""
        if self._growth is not None:
            self._growth.want(self.model.routing.mask.allowed)
            self._look()

    def close(self) -> None:
        """Drop the graphs and free what the model holds."""
        if self._growth is not None:
            self._growth.wait()
        self.graphs.clear()
        self.model.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Between two steps: take into use what has arrived in host memory, and tell the rows what is in reach."""
        if self._growth is None or self._fetched is None:
            return
        for arena, experts in self._growth.take():
            self._fetched.give_back([expert for expert in experts if expert is not None])
            self.pages.add_spans(arena, experts)
            self._fetched.add_rows()
        seen = (self._fetched.num_changes, self._growth.num_changes)
        if seen != self._seen:
            self.rows.reach(self.pages.servable.numpy(), self._growth.pending)
            self._seen = seen
