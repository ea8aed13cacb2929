"""The captured graphs of a model's decode steps, one for each batch size with masks and without, and those that draw
tokens.

All of them read the same rows, weights and pages. Invariant: after `capture` and `prepare_draws` no request waits for a
kernel to be compiled or a graph to be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from expert_store.paging.pages import DevicePages
from server.model.device.step.compiling import in_parallel
from server.model.device.step.graph import StepGraph
from server.model.device.step.options import StepOptions, Tuning, pow2
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.sampling import TokenDraw
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.weights import DecodeShape, TrunkWeights
from server.model.host.runner import Choice


class StepGraphs:
    """Graphs over `state`, `weights` and `pages`.

    Args:
        resident_bias: lambda of cache-aware routing, 0: off.
    """

    def __init__(
        self, shape: DecodeShape, weights: TrunkWeights, pages: DevicePages, state: RowState, resident_bias: float
    ) -> None:
        self._shape, self._weights, self._pages, self._state = shape, weights, pages, state
        self._bias = resident_bias
        self._device = pages.device
        self._graphs: dict[tuple[int, bool], StepGraph] = {}
        self._draws: dict[tuple[StepGraph, bool], TokenDraw] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None  # of all draws: one runs

    @property
    def steps(self) -> dict[tuple[int, bool], StepGraph]:
        """Those that are captured, by batch size and whether they read masks; a copy."""
        return dict(self._graphs)

    def capture(self, stream: ExpertStream, full: bool, progress: Callable[[str, float], None]) -> None:
        """Compiles and captures the steps of every batch size, and compiles what prompts need.

        Args:
            full: whether requests may run without any mask; those with one are captured in either case.
        """
        sizes = sorted({pow2(rows) for rows in range(1, self._shape.max_rows + 1)})
        wanted = [(size, masked) for masked in ((False, True) if full else (True,)) for size in sizes]
        graphs = {key: self._new(*key) for key in wanted if key not in self._graphs}
        if self._device.type == "cuda":
            progress("compiling kernels", 0.0)
            with in_parallel():
                stream.compile()
                for graph in graphs.values():
                    graph.step.compile()
        for done, (key, graph) in enumerate(graphs.items()):
            progress("capturing decode", done / len(wanted))
            graph.capture()
            self._graphs[key] = graph

    def step(self, num_rows: int, masked: bool) -> StepGraph:
        """The graph that takes a step of so many rows; one that reads masks does for those without any."""
        key = (pow2(num_rows), masked or self._bias != 0.0)
        if key not in self._graphs and (key[0], True) in self._graphs:
            key = (key[0], True)
        if key not in self._graphs:
            self._graphs[key] = self._new(*key)
            self._graphs[key].capture()
        return self._graphs[key]

    def draw(self, graph: StepGraph, choices: Sequence[Choice | None]) -> TokenDraw | None:
        """What draws the tokens after a step of that graph; None where each takes the most likely one."""
        if not any(choices):
            return None
        narrow = any(choice is not None and (choice.top_k is not None or choice.top_p < 1.0) for choice in choices)
        return self._draw(graph, narrow)

    def prepare_draws(self) -> None:
        """Capture what draws after the steps that are captured."""
        for graph in self._graphs.values():
            for narrow in (False, True):
                self._draw(graph, narrow)

    def clear(self) -> None:
        """Drop all of them."""
        self._draws.clear()
        self._graphs.clear()

    def _draw(self, graph: StepGraph, narrow: bool) -> TokenDraw:
        key = (graph, narrow)
        if key not in self._draws:
            self._draws[key] = TokenDraw(graph.step, narrow, self._memory)
        return self._draws[key]

    def _new(self, batch: int, masked: bool) -> StepGraph:
        options = StepOptions(
            pdl=batch == 1 and _launches_dependents(self._device),
            masked=masked,
            resident_bias=self._bias,
            tuning=Tuning(),
        )
        step = DecodeStep(self._shape, self._weights, self._pages, self._state, batch, options)
        return StepGraph(step, for_host=True)


def _launches_dependents(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
