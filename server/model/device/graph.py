"""A decode step captured as a CUDA graph and replayed; on the CPU (the kernels' interpreter) it is launched as it is.

Capture happens once per batch size, after one uncaptured step has compiled the kernels. A captured graph holds the
addresses of the step's tensors: they live as long as the `StepGraph`.
"""

from __future__ import annotations

import torch

from server.model.device.step import DecodeStep


class StepGraph:
    """Replays `steps_per_replay` decode steps; more than one only makes sense when the step picks its own tokens."""

    def __init__(self, step: DecodeStep, *, steps_per_replay: int = 1) -> None:
        self.step = step
        self._steps = steps_per_replay
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Compiles and captures. Runs the step once with no rows, which changes nothing but the step counter."""
        if not self.step.tokens.is_cuda:
            return
        rows = self.step.rows.clone()
        self.step.rows.fill_(-1)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step.launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(self._steps):
                self.step.launch()
        self.step.rows.copy_(rows)
        self._graph = graph

    def replay(self) -> None:
        """Enqueues the captured step(s) on the current stream."""
        if self._graph is None:
            self.step.launch()
        else:
            self._graph.replay()
