"""From logits to tokens: transformers' logits processors and one uniform draw a token.

Each sequence has its own counter-based random stream (Philox keyed by its seed), so its draws do not depend on what
else is in the batch, nor on when it joined. The token is the first whose cumulative probability exceeds the draw.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.request import SamplingParams
from server.model.host.runner import Choice


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: how to choose.
        prompt_ids: seen by the repetition penalty.

    Attributes:
        seed: in force: the request's, or a fresh one; None when nothing is drawn.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params = params
        self._processors = _processors(params)
        self._keeps_ids = params.repetition_penalty is not None
        self._seen = set(prompt_ids) if self._keeps_ids else {0}
        self._seen_ids = torch.tensor([sorted(self._seen)])  # [1, N], each once, whatever the sequence's length
        self.seed: int | None = None
        if not params.is_greedy:
            self.seed = secrets.randbits(63) if params.seed is None else params.seed
            self._draws = np.random.Generator(np.random.Philox(key=self.seed))

    @property
    def leaves_choice(self) -> bool:
        """Whether a runner may choose instead of `choose`: nothing depends on the tokens so far."""
        return not self._keeps_ids

    def choice(self) -> Choice | None:
        """How a runner is to draw the next token, None for the most likely one; advances the random stream by one draw.
        Only where `leaves_choice`."""
        if self.seed is None:
            return None
        params = self._params
        return Choice(
            temperature=1.0 if params.temperature is None else float(params.temperature),
            top_k=params.top_k,
            top_p=1.0 if params.top_p is None else float(params.top_p),
            draw=self._draws.random(),
        )

    def choose(self, logits: Tensor) -> int:
        """The next token from logits [V] float32, which are not changed; advances the random stream by one draw. Waits
        for the device once.
        """
        scores = logits[None]
        if self._processors:
            self._seen_ids = self._seen_ids.to(logits.device)
            scores = self._processors(cast(LongTensor, self._seen_ids), cast(FloatTensor, scores.clone()))
        if self.seed is None:
            token = int(scores[0].argmax())
        else:
            cumulative = torch.softmax(scores[0].double(), dim=-1).cumsum(dim=-1)
            draw = cumulative[-1:] * self._draws.random()
            token = int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1))
        if self._keeps_ids and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = torch.cat([self._seen_ids, self._seen_ids.new_tensor([[token]])], dim=-1)
        return token


def _processors(params: SamplingParams) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.repetition_penalty is not None and params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty)))
    if params.is_greedy:
        return processors
    if params.temperature is not None and params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k is not None:
        processors.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p is not None and params.top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p=float(params.top_p)))
    return processors
