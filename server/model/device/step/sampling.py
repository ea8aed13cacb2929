"""Draws the tokens of a batch on the device, in a captured graph that runs after the step's graph.

It does for all rows at once what `server.engine.sampling` does for one: a launch costs the host more time than these
kernels take. Invariant: a row's token depends on its own logits and `Choice` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.model.device.step.step import DecodeStep
from server.model.runner import Choice

TEMPERATURE, TOP_K, TOP_P, DRAW = range(4)


def draw_tokens(logits: Tensor, best: Tensor, choices: Tensor, narrow: bool) -> Tensor:
    """Token and logit of each row, float64 [2, B].

    Args:
        logits: float32 [B, V]; best: int32 [B], their argmax.
        choices: float64 [4, B]: temperature, top-k, top-p, and the uniform draw; a negative draw takes `best`.
        narrow: whether any row has a top-k below V or a top-p below 1.
    """
    vocab = logits.shape[1]
    scores = logits / choices[TEMPERATURE, :, None].float()
    if narrow:
        ordered, order = scores.sort(dim=-1)
        rank = (vocab - choices[TOP_K].long()).clamp(0, vocab - 1)
        least = ordered.gather(1, rank[:, None])
        ordered = ordered.masked_fill(ordered < least, -torch.inf)
        hidden = ordered.softmax(dim=-1).cumsum(dim=-1) <= (1.0 - choices[TOP_P, :, None]).float()
        hidden[:, -1] = False
        hidden |= ordered == -torch.inf
        scores = scores.masked_fill(torch.zeros_like(hidden).scatter(1, order, hidden), -torch.inf)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    target = cumulative[:, -1:] * choices[DRAW, :, None]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=vocab - 1)[:, 0]
    token = torch.where(choices[DRAW] < 0, best.long(), drawn)
    return torch.stack([token.double(), logits.gather(1, token[:, None])[:, 0].double()])


class TokenDraw:
    """`draw_tokens` over a step's logits, captured; one for each batch size and value of `narrow`.

    Args:
        memory: memory pool of the graph; graphs that never run at the same time may share it.
    """

    def __init__(self, step: DecodeStep, narrow: bool, memory: Any = None) -> None:
        self._step, self._narrow, self._memory = step, narrow, memory
        pinned = step.logits.is_cuda
        self._choices = torch.zeros(4, step.batch, dtype=torch.float64, pin_memory=pinned)
        self._given = self._choices.to(step.logits.device)
        self._drawn = torch.zeros(2, step.batch, dtype=torch.float64, pin_memory=pinned)
        self._graph: torch.cuda.CUDAGraph | None = None
        if pinned:
            self._capture()

    def enqueue(self, choices: Sequence[Choice | None]) -> None:
        """Draws for the rows of the step that was enqueued before; None, and entries past the end, take the best."""
        values = self._choices.numpy()
        values[:, :] = np.array([[1.0], [self._step.shape.vocab], [1.0], [-1.0]])
        for at, choice in enumerate(choices):
            if choice is not None:
                values[:, at] = choice.temperature, choice.top_k or self._step.shape.vocab, choice.top_p, choice.draw
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    @property
    def drawn(self) -> Tensor:
        """Token and logit, float64 [2, B] in host memory; valid after the device is done and until `enqueue`."""
        return self._drawn

    def _launch(self) -> None:
        self._given.copy_(self._choices, non_blocking=True)
        drawn = draw_tokens(self._step.logits, self._step.best_token, self._given, self._narrow)
        self._drawn.copy_(drawn, non_blocking=True)

    def _capture(self) -> None:
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
