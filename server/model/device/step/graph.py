"""A decode step captured as a CUDA graph and replayed; on the CPU (the kernels' interpreter) it is launched as it is.

Capture happens once per batch size, after one uncaptured step has compiled the kernels. A captured graph holds the
addresses of the step's tensors: they live as long as the `StepGraph`. What the host gives and gets passes through two
tensors in its own memory, copied by the graph itself, so a step costs the host one launch and one wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.model.device.step.state import Report
from server.model.device.step.step import DecodeStep


class StepGraph:
    """Replays `steps_per_replay` decode steps; more than one only makes sense when the step picks its own tokens.

    With `for_host` a replay reads rows and tokens from host memory and reports to it: see `enqueue` and `wait`.
    """

    def __init__(self, step: DecodeStep, *, steps_per_replay: int = 1, for_host: bool = False) -> None:
        self.step = step
        self._steps = steps_per_replay
        self._for_host = for_host
        self._graph: torch.cuda.CUDAGraph | None = None
        pinned = step.report.is_cuda
        self._inputs = torch.empty(step.inputs.shape, dtype=torch.int32, pin_memory=pinned)
        self._report = torch.empty(step.report.shape, dtype=torch.int32, pin_memory=pinned)
        self.report = Report.of(self._report, step.shape.num_moe_layers, step.batch, step.shape.top_k)

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
            self._launch()
        self.step.rows.copy_(rows)
        self._graph = graph

    def replay(self) -> None:
        """Enqueues the captured step(s) on the current stream."""
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def enqueue(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """One step of a graph made `for_host`: each row takes its token. Then `wait`, before the next `enqueue`."""
        inputs = self._inputs.numpy()
        inputs[0], inputs[1] = -1, 0
        inputs[:, : len(rows)] = np.array([rows, tokens])
        self.replay()

    def wait(self) -> Report:
        """Waits for the device; the report of the last step, in host memory and valid until the next `enqueue`. Entries
        past that step's rows are meaningless."""
        if self._report.is_pinned():
            torch.cuda.current_stream().synchronize()
        return self.report

    def _launch(self) -> None:
        if self._for_host:
            self.step.inputs.copy_(self._inputs, non_blocking=True)
        for _ in range(self._steps):
            self.step.launch()
        if self._for_host:
            self._report.copy_(self.step.report, non_blocking=True)
