"""The runner of the device-driven path: prompts run in transformers with streamed experts, tokens in captured graphs.

A step's report names the chosen experts that are in no memory; the runner reads them, from the store or its source, and
runs the step again. Invariant: a call that raises leaves the rows unchanged, here and on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from expert_store.paging.pages import DevicePages
from router.mask import ExpertMask
from server.model.balance import SlotsAndBlocks
from server.model.device.memory.filling import in_turn
from server.model.device.memory.moving import MovingMemory
from server.model.device.memory.tier import NoRoomError, SpanTier
from server.model.device.running.output import chosen_tokens, routing_of
from server.model.device.running.rows import Rows
from server.model.device.running.snapshots import StateRows
from server.model.device.step.graphs import StepGraphs
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.state import PrefillRow, Report, RowState
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import AdaptedTrunk, DecodeShape, TrunkWeights
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.rows import KvRows
from server.model.kv_memory import MemoryShares
from server.model.load_progress import Progress
from server.model.runner import RowStep, SelectiveModel, StepFault, StepOutput
from server.model.seam.forward import memory_ended, ran_out, run_forward


class DeviceRunner:
    """`Runner` over fixed rows of the device.

    Args:
        model: trunk, tokenizer and routing; its experts modules are bound to `stream`.
        shape, weights: of the captured step.
        pages, stream: of the experts.
        num_blocks: of KV memory; None: as many as rows of `max_tokens` need.
        tier: reads experts that are in no memory; None if all are in memory for good.
        options: of every captured step; `pdl`, `masked` and `adapted` are set for each.
        adapted: the trunk with the adapters that rows may have, which `model.routing` has too; None: they have none.
        moving: the memory of `pages` and of KV memory; None: they have memories of their own.
        fixed_by: why nothing moves without `moving`.
    """

    decode_path: Literal["device"] = "device"
    cuts_anywhere: bool = False
    """Products of chunks of other lengths have other bits."""

    def __init__(
        self,
        model: SelectiveModel,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        stream: ExpertStream,
        *,
        num_blocks: int | None = None,
        tier: SpanTier | None = None,
        options: StepOptions | None = None,
        adapted: AdaptedTrunk | None = None,
        moving: MovingMemory | None = None,
        fixed_by: str = "this runner was made without",
    ) -> None:
        self.model, self.shape, self.pages = model, shape, pages
        self.max_rows, self.max_tokens = shape.max_rows, shape.max_tokens
        options = options or StepOptions()
        self._stream, self._bias = stream, options.resident_bias
        self.tier = tier
        assert shape.block_tokens == BLOCK_TOKENS, f"blocks of {shape.block_tokens} tokens, wanted {BLOCK_TOKENS}"
        num_blocks = num_blocks or shape.max_rows * shape.max_blocks
        num_blocks, most_blocks = (num_blocks,) * 2 if moving is None else (moving.num_blocks, moving.most_blocks)
        self._state = RowState(shape, model.device, most_blocks, None if moving is None else moving.blocks)
        kind = partial(StateRows, self._state, shape.state_copies) if shape.stateful else KvRows
        self.kv: KvRows = kind(
            max_rows=shape.max_rows, num_blocks=num_blocks, shares=shape.shares_prompts, most_blocks=most_blocks
        )
        self._fixed_by = fixed_by
        self.balance: SlotsAndBlocks | None = None
        if moving is not None:
            assert tier is not None, "slots that close need the tier behind them"
            self.balance = moving.balance(pages, tier, self.kv)
        self.rows = Rows(self._state, self.kv, pages.servable.numpy())
        self._adapted = adapted
        self.graphs = StepGraphs(shape, weights, pages, self._state, options, adapted)
        self._seen = -1

    def capture(self, progress: Progress = lambda phase, share: None) -> None:
        """Compiles and captures the step of every batch size up to `max_rows`, without masks, with them, and with
        adapters if there are any, so that no request waits for it."""
        full = self._bias == 0.0 and bool(self.model.routing.mask.allowed.all())
        self.graphs.capture(self._stream, full, progress)

    def shares(self) -> MemoryShares:
        """See `Runner.shares`."""
        if self.balance is not None:
            return self.balance.shares()
        slot_bytes, kv_bytes = self.pages.open_bytes, sum(layer.nbytes for layer in self._state.memory)
        return MemoryShares(False, self._fixed_by, slot_bytes, kv_bytes, slot_bytes, kv_bytes)

    def after_step(self) -> None:
        """See `Runner.after_step`."""
        if self.balance is not None:
            self.balance.after_step()

    # -- rows ----------------------------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle."""
        return self.kv.allocate()

    def free(self, row: int) -> None:
        """Free a row."""
        self.kv.free(row)

    # -- steps ---------------------------------------------------------------------------------------------------------

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
        try:
            return self._prefill(row, tokens, mask, adapter, temperature, all_logits)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            problem = memory_ended(error, len(tokens), 0)
        raise problem

    def _prefill(
        self,
        row: int,
        tokens: Sequence[int],
        mask: ExpertMask | None,
        adapter: str | None,
        temperature: float,
        all_logits: bool,
    ) -> StepOutput:
        self._look()
        start, routing = self.kv.length(row), self.model.routing
        end = start + len(tokens)
        assert end <= self.max_tokens, f"row {row}: {end} tokens, room for {self.max_tokens}"
        self.rows.begin([(row, end)])
        positions = torch.arange(start, end, device=self.model.device)[None]
        given = mask or routing.mask
        routing.begin(1, len(tokens), None if given is routing.mask else [given], [temperature], [adapter])
        ids = torch.tensor([list(tokens)], device=self.model.device)
        past = PrefillRow(self._state, row, start, end)
        try:
            self._stream.begin(len(tokens), given.allowed, self.tier)
            output, _ = run_forward(self.model, ids, positions, past, kv_tokens=end, all_logits=all_logits)
        finally:
            self._stream.end()
        if self.tier is not None and self.tier.evicts:
            self.tier.use(self._used(output.record.served_index))
        past.commit()
        self.rows.set_length(row, end)
        return output

    @torch.inference_mode()
    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """See `Runner.decode`. `chosen` has the next token of each row. If the experts that the rows need do not fit
        into memory together, the rows run in parts."""
        lengths = [(step.row, self.kv.length(step.row) + 1) for step in steps]
        for row, length in lengths:
            assert length <= self.max_tokens, f"row {row} is full: {self.max_tokens} tokens"
        try:
            self.rows.begin(lengths)
            return self._decode(steps)
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            problem = memory_ended(error, len(steps), max(range(len(steps)), key=lambda at: lengths[at][1]))
        if self.model.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the step may be under way, and reads what the next one writes
        self.rows.take_back([step.row for step in steps])
        raise problem

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
        adapters = [0 if self._adapted is None else self._adapted.index(step.adapter) for step in steps]
        while True:
            self._look()
            for step in steps:
                self.rows.settle(step.row, step.mask or self.model.routing.mask, step.temperature)
            masked = self._bias != 0.0 or not all(self.rows.is_plain(row) for row in rows)
            graph = self.graphs.step(num, masked, any(adapters))
            masked = graph.step.options.masked
            draw = self.graphs.draw(graph, steps)
            graph.enqueue(rows, [step.token for step in steps], adapters)
            if draw is not None:
                draw.enqueue(steps)
            report = graph.wait()
            if self._has_everything(report, rows):
                break
        self.rows.advanced(rows)
        by_mask = (self.shape.router.groups > 1 or any(adapters)) and self._bias == 0.0
        record, share = routing_of(report, num, masked, self.rows.hidden(rows) if by_mask else None)
        return StepOutput(graph.step.logits[:num], record, share, chosen=chosen_tokens(report, draw, num))

    def _has_everything(self, report: Report, rows: Sequence[int]) -> bool:
        """Whether the last step had every expert that it chose. If not, read the missing ones and reset its rows.

        After the first layer that lacked an expert a token's choice may be wrong: the experts of later layers are read
        if there is room, and an error in reading them fails no request.
        """
        picks = report.ids[:, : len(rows)].numpy()  # [L, B, K]
        absent = self.rows.absent(rows, picks)
        if absent is None or self.tier is None:
            return True
        used = self._used(picks)
        if not absent.any():
            self.tier.use(used)
            return True
        self.rows.take_back(rows)
        layers = np.arange(len(used))[:, None, None]
        first = absent & (layers == absent.any(axis=2).argmax(axis=0)[:, None])
        needed: dict[tuple[int, int], list[int]] = {}
        for layer, at, pick in np.argwhere(first):
            needed.setdefault((int(layer), int(picks[layer, at, pick])), []).append(int(at))
        places = {(int(layer), int(picks[layer, at, pick])) for layer, at, pick in np.argwhere(absent & ~first)}
        failures = self.tier.read(list(needed), sorted(places - needed.keys()), used)
        for expert, positions in needed.items():
            if expert in failures:
                raise StepFault(failures[expert], positions) from failures[expert]
        return False

    def _used(self, picks: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """The experts [L, E] among picks [L, T, K] (ids >= E: none)."""
        used = np.zeros((self.shape.num_moe_layers, self.shape.num_experts + 1), dtype=np.bool_)
        used[np.arange(len(used))[:, None, None], np.minimum(picks, self.shape.num_experts)] = True
        return used[:, :-1]

    def fetch_refusal(self) -> str | None:
        """See `Runner.fetch_refusal`."""
        if self.tier is None:
            return "this runner reads nothing from the disk"
        if self.tier.capacity >= self.tier.most_needed:
            return None
        return (
            f"host memory has room for {self.tier.capacity} experts beyond the store's, and a token may need "
            f"{self.tier.most_needed}: raise host_memory"
        )

    def prefetch(self, mask: ExpertMask) -> None:
        """Does nothing: a prompt's chunk streams the experts that its mask allows, and decoding fetches the rest."""

    def adopt(self) -> None:
        """Starts to read the experts that routing's mask now allows and that are in no memory; a step that chooses one
        reads it at once. See `Runner.adopt`."""
        if self.tier is not None:
            allowed = self.model.routing.mask.allowed
            self.tier.adopt(allowed)
            self.tier.fill(in_turn([np.flatnonzero(row).tolist() for row in allowed]))

    def close(self) -> None:
        """Drop the graphs and free what the model holds."""
        if self.tier is not None:
            self.tier.close()
        self.graphs.clear()
        self.model.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Between two steps: take the experts that were read, and tell the rows which ones a step can use."""
        if self.tier is None:
            return
        self.tier.look()
        if self.tier.num_changes != self._seen:
            self.rows.serve(self.tier.servable)
            self._seen = self.tier.num_changes
