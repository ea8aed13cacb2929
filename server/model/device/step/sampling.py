"""Chooses the tokens of a batch on the device, in a captured graph that runs after the step's graph.

It does for all rows at once what `server.engine.sampling` does for one. Invariant: a row's token depends on its own
logits, `Choice`, `Adjustment` and allowed tokens alone; what no row has is neither copied nor computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from server.model.device.kernels import draw as kernels
from server.model.device.step.launch import launch
from server.model.device.step.tuning import pow2
from server.model.runner import MOST_ADJUSTED, RowStep

MOST_PARTS, PART = 128, 2048
"""Programs a row, and tokens of a program while there are fewer."""
PIVOTS, PASSES = 16, 8
"""A search over 2^32 keys: 16^8."""
CHUNK, ADJUST_BLOCK = 128, 256


@dataclass(frozen=True)
class DrawKind:
    """The needs of the rows of a batch: each value adds kernels, and adjusted and constrained add a copy to the device.

    Attributes:
        narrowed: a top-k below V or a top-p below 1.
        adjusted: an adjustment.
        constrained: allowed tokens.
    """

    narrowed: bool = False
    adjusted: bool = False
    constrained: bool = False

    @classmethod
    def of(cls, steps: Sequence[RowStep]) -> DrawKind | None:
        """The kind for these rows; None if each takes its most likely token."""
        if all(step.takes_best for step in steps):
            return None
        choices = [step.choice for step in steps if step.choice is not None]
        return cls(
            narrowed=any(choice.top_k is not None or choice.top_p < 1.0 for choice in choices),
            adjusted=any(step.adjustment is not None for step in steps),
            constrained=any(step.allowed is not None for step in steps),
        )

    @classmethod
    def all(cls) -> list[DrawKind]:
        """Every kind."""
        return [cls(*flags) for flags in product((False, True), repeat=3)]


class DrawRoom:
    """The buffers of all draws, which never run at the same time; those of the host are page-locked for a GPU.

    Args:
        rows: of the largest batch.
        vocab: V.
    """

    def __init__(self, rows: int, vocab: int, device: torch.device | str) -> None:
        self.num_parts = min(MOST_PARTS, pow2(triton.cdiv(vocab, PART)))
        self.block = pow2(triton.cdiv(vocab, self.num_parts))

        def fresh(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        def pair(*size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            given = fresh(*size, dtype=dtype)
            return torch.zeros(size, dtype=dtype, pin_memory=given.is_cuda), given

        self.choices = pair(5 * rows, dtype=torch.float64)
        self.allowed = pair(rows, triton.cdiv(vocab, 32), dtype=torch.int32)
        self.ids = pair(rows, MOST_ADJUSTED, dtype=torch.int32)
        self.values = pair(rows, MOST_ADJUSTED, dtype=torch.float32)
        self.drawn = pair(2 * rows, dtype=torch.float64)
        self.scores = fresh(rows, vocab, dtype=torch.float32)
        self.part_best = fresh(rows, self.num_parts, dtype=torch.float32)
        self.part_token = fresh(rows, self.num_parts, dtype=torch.int32)
        self.part_weight = fresh(rows, self.num_parts, PIVOTS)
        self.best, self.token = fresh(rows, dtype=torch.float32), fresh(rows, dtype=torch.int32)
        self.arrived, self.search = fresh(rows, dtype=torch.int32), fresh(rows, 3)


class TokenDraw:
    """Chooses tokens from logits [B, V] float32 on the device; `capture` makes a graph of it on a GPU.

    Args:
        memory: memory pool of the graph; graphs that never run at the same time may share it.
    """

    def __init__(self, logits: Tensor, kind: DrawKind, room: DrawRoom, memory: Any = None) -> None:
        self._logits, self._kind, self._room, self._memory = logits, kind, room, memory
        batch = len(logits)
        self._choices, self._given_choices = (flat[: 5 * batch].view(5, batch) for flat in room.choices)
        self._drawn, self._given_drawn = (flat[: 2 * batch].view(2, batch) for flat in room.drawn)
        self._allowed, self._given_allowed = (each[:batch] for each in room.allowed)
        self._ids, self._given_ids = (each[:batch] for each in room.ids)
        self._values, self._given_values = (each[:batch] for each in room.values)
        self._compiles = False  # True: kernels are compiled instead of launched
        self._graph: torch.cuda.CUDAGraph | None = None

    def compile(self) -> None:
        """Compiles the kernels without a launch; they are those of every batch size."""
        self._compiles = True
        self._choose()
        self._compiles = False

    def capture(self) -> None:
        """Compiles and captures."""
        if not self._logits.is_cuda:
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            self._launch()
        self._graph = graph

    def enqueue(self, steps: Sequence[RowStep]) -> None:
        """Chooses for the rows of the step that was enqueued before; entries past the end take the most likely token.

        The allowed tokens are computed here, while the device works on the step.
        """
        vocab, choices = self._logits.shape[1], self._choices.numpy()
        choices[:, :] = np.array([[1.0], [vocab], [1.0], [0.0], [-1.0]])
        if self._kind.constrained:
            self._allowed.fill_(-1)
        if self._kind.adjusted:
            self._ids.fill_(-1)
        for at, step in enumerate(steps):
            if (choice := step.choice) is not None:
                top_k = min(choice.top_k or vocab, vocab)
                choices[:, at] = choice.temperature, top_k, choice.top_p, choice.min_p, choice.draw
            if (adjustment := step.adjustment) is not None:
                num = len(adjustment.ids)
                self._ids.numpy()[at, :num], self._values.numpy()[at, :num] = adjustment.ids, adjustment.values
            if step.allowed is not None:
                self._allowed.numpy()[at] = step.allowed().view(np.int32)
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    @property
    def drawn(self) -> Tensor:
        """Token and logit, float64 [2, B] in host memory; valid after the device is done and until `enqueue`."""
        return self._drawn

    def _launch(self) -> None:
        self._given_choices.copy_(self._choices, non_blocking=True)
        if self._kind.constrained:
            self._given_allowed.copy_(self._allowed, non_blocking=True)
        if self._kind.adjusted:
            self._given_ids.copy_(self._ids, non_blocking=True)
            self._given_values.copy_(self._values, non_blocking=True)
        self._choose()
        self._drawn.copy_(self._given_drawn, non_blocking=True)

    def _choose(self) -> None:
        batch, vocab = self._logits.shape
        room, logits, choices = self._room, self._logits, self._given_choices
        grid, sizes = (room.num_parts, batch), {"BLOCK": room.block}
        self._run(
            kernels.scale, grid, logits, room.scores, choices, self._given_allowed, room.search, vocab, batch,
            **sizes, CONSTRAINED=self._kind.constrained,
        )  # fmt: skip
        if self._kind.adjusted:
            self._run(
                kernels.adjust, (MOST_ADJUSTED // ADJUST_BLOCK, batch),
                logits, room.scores, choices, self._given_ids, self._given_values, vocab, batch, MOST_ADJUSTED,
                BLOCK=ADJUST_BLOCK,
            )  # fmt: skip
        sizes["PARTS"] = room.num_parts
        self._run(
            kernels.peak, grid,
            room.scores, room.part_best, room.part_token, room.best, room.token, room.arrived, vocab, **sizes,
        )  # fmt: skip
        for by_mass in (False, True) if self._kind.narrowed else ():
            for number in range(PASSES):
                self._run(
                    kernels.narrow, grid,
                    room.scores, room.best, choices, room.search, room.part_weight, room.arrived, vocab, batch, **sizes,
                    CHUNK=min(room.block, PART if logits.is_cpu else CHUNK), PIVOTS=PIVOTS, BY_MASS=by_mass,
                    FIRST=number == 0,
                )  # fmt: skip
        self._run(
            kernels.pick, grid, logits, room.scores, room.best, room.token, choices, room.search, room.part_weight,
            room.arrived, self._given_drawn, vocab, batch, **sizes,
        )  # fmt: skip

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launch(kernel, grid, *args, compiles=self._compiles, **constants)
