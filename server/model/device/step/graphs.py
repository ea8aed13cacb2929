"""The captured graphs: of decode steps, by batch size and whether rows have masks and adapters, and of drawing tokens.

All of them read the same rows, weights and pages. Triton keeps compiled kernels on disk, so only the first start with a
model's shape compiles. Invariant: after `capture` and `prepare_draws` no request waits for a compilation or a capture.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from expert_store.paging.pages import DevicePages
from server.model.device.step.mixers.states import StateLayer
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.sampling import DrawKind, DrawRoom, TokenDraw
from server.model.device.step.state import Report, RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions, Tuning, pow2
from server.model.device.step.weights import AdaptedTrunk, DecodeShape, TrunkWeights
from server.model.load_progress import Phase, Progress
from server.model.runner import RowStep

log = logging.getLogger(__name__)

MOST_THREADS = 16
"""Threads that compile. A step has a dozen kernels for each batch size; one thread would take a minute."""


@contextmanager
def in_parallel() -> Iterator[None]:
    """Within this context `kernel.warmup` only requests a kernel; all are compiled at its end. Launch no kernel in it.
    A Triton without this feature compiles at once instead."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        log.info("this Triton compiles one kernel at a time")
        yield
        return
    with (
        _without_garbage_collection(),
        ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads,
        AsyncCompileMode(threads),
    ):
        yield


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Python 3.11 counts the depth of syntax trees for all threads together: where a collection lets another thread
    parse in the middle of a tree, parsing fails (python/cpython#106905)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class StepGraph:
    """One decode step as a CUDA graph; on the CPU (the kernels' interpreter) it is launched without a graph.

    The graph itself copies the host's input and the step's report from and to page-locked tensors, so a step costs the
    host one launch and one wait. The graph holds the addresses of the step's tensors, which this object keeps.
    """

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        pinned = step.report.is_cuda
        self._inputs = torch.empty(step.inputs.shape, dtype=torch.int32, pin_memory=pinned)
        self._report = torch.empty(step.report.shape, dtype=torch.int32, pin_memory=pinned)
        self.report = Report.of(self._report, step.shape.num_moe_layers, step.batch, step.shape.top_k)

    def capture(self) -> None:
        """Compiles and captures. Runs the step once without rows, which changes only the step counter."""
        if not self.step.tokens.is_cuda:
            return
        self.step.rows.fill_(-1)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step.launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._launch()
        self._graph = graph

    def enqueue(self, rows: Sequence[int], tokens: Sequence[int], adapters: Sequence[int] = ()) -> None:
        """Enqueues one step that appends a token to each row. Call `wait` before the next step.

        Args:
            adapters: of each row, by `AdaptedTrunk.index`; empty: none.
        """
        inputs = self._inputs.numpy()
        inputs[0], inputs[1:] = -1, 0
        inputs[:, : len(rows)] = np.array([rows, tokens, adapters or [0] * len(rows)])
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def wait(self) -> Report:
        """Waits for the device; returns the report of the last step, in host memory and valid until the next `enqueue`.
        Entries past that step's rows are undefined."""
        if self._report.is_pinned():
            torch.cuda.current_stream().synchronize()
        return self.report

    def _launch(self) -> None:
        self.step.inputs.copy_(self._inputs, non_blocking=True)
        self.step.launch()
        self._report.copy_(self.step.report, non_blocking=True)


class Captured(NamedTuple):
    """A graph is for steps of `batch` rows, or fewer. A step without masks or adapters may run where they are read."""

    batch: int
    masked: bool
    adapted: bool = False


class StepGraphs:
    """Graphs over `state`, `weights` and `pages`.

    Args:
        options: options of every step; `pdl`, `masked`, `adapted` and tile sizes are set for each.
        adapted: the trunk with adapters; None: rows have none.
    """

    def __init__(
        self,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        state: RowState,
        options: StepOptions,
        adapted: AdaptedTrunk | None = None,
    ) -> None:
        self._shape, self._weights, self._pages, self._state = shape, weights, pages, state
        self._options, self._adapted = options, adapted
        self._device = pages.device
        self._graphs: dict[Captured, StepGraph] = {}
        self._draws: dict[tuple[StepGraph, DrawKind], TokenDraw] = {}
        self._room = DrawRoom(pow2(shape.max_rows), shape.vocab, self._device)
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None  # of all draws

    @property
    def steps(self) -> dict[Captured, StepGraph]:
        """The captured graphs by what they are for; a copy."""
        return dict(self._graphs)

    def capture(self, stream: ExpertStream, full: bool, progress: Progress) -> None:
        """Compiles and captures the steps of every batch size, and compiles what prompts need.

        Args:
            full: whether requests may run without a mask; steps with masks are always captured.
        """
        sizes = sorted({pow2(rows) for rows in range(1, self._shape.max_rows + 1)})
        kinds = [(False, False)] * full + [(True, False)] + [(True, True)] * (self._adapted is not None)
        wanted = [Captured(size, *kind) for kind in kinds for size in sizes]
        graphs = {key: self._new(*key) for key in wanted if key not in self._graphs}
        if self._device.type == "cuda":
            progress(Phase.COMPILING, 0.0)
            with in_parallel():
                stream.compile()
                for layer, kind in list(self._shape.stateful.items())[:1]:
                    StateLayer(kind, self._shape.eps, self._weights.layers[layer], 0).compile_kernels()
                for graph in graphs.values():
                    graph.step.compile()
        for done, (key, graph) in enumerate(graphs.items()):
            progress(Phase.CAPTURING, done / len(wanted))
            graph.capture()
            self._graphs[key] = graph

    def step(self, num_rows: int, masked: bool, adapted: bool = False) -> StepGraph:
        """The graph for a step of this many rows; a graph that reads masks also serves rows without one."""
        key = Captured(pow2(num_rows), masked or adapted or self._options.resident_bias != 0.0, adapted)
        if key not in self._graphs and key._replace(masked=True) in self._graphs:
            key = key._replace(masked=True)
        if key not in self._graphs:
            self._graphs[key] = self._new(*key)
            self._graphs[key].capture()
        return self._graphs[key]

    def draw(self, graph: StepGraph, steps: Sequence[RowStep]) -> TokenDraw | None:
        """The graph that chooses the tokens after a step; None if every row takes the most likely token."""
        kind = DrawKind.of(steps)
        return None if kind is None else self._draw(graph, kind)

    def prepare_draws(self) -> None:
        """Compile and capture the draws after each captured step."""
        if self._device.type == "cuda" and self._graphs:
            logits = next(iter(self._graphs.values())).step.logits
            with in_parallel():
                for kind in DrawKind.all():
                    TokenDraw(logits, kind, self._room).compile()
        for graph in self._graphs.values():
            for kind in DrawKind.all():
                self._draw(graph, kind)

    def clear(self) -> None:
        """Drop all graphs."""
        self._draws.clear()
        self._graphs.clear()

    def _draw(self, graph: StepGraph, kind: DrawKind) -> TokenDraw:
        if (graph, kind) not in self._draws:
            self._draws[graph, kind] = TokenDraw(graph.step.logits, kind, self._room, self._memory)
            self._draws[graph, kind].capture()
        return self._draws[graph, kind]

    def _new(self, batch: int, masked: bool, adapted: bool) -> StepGraph:
        pdl = batch == 1 and _launches_dependents(self._device)
        options = replace(self._options, pdl=pdl, masked=masked, adapted=adapted, tuning=Tuning())
        weights = self._adapted.weights if adapted and self._adapted is not None else self._weights
        return StepGraph(DecodeStep(self._shape, weights, self._pages, self._state, batch, options))


def _launches_dependents(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
