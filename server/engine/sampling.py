"""Choose a token from logits, by transformers' logits processors and one uniform draw a token.

The processors that also change a greedy choice run first (bias, repetition, presence, frequency, minimum length), then
temperature and the filters (top-k, top-p, …), in transformers' order. Presence and frequency count generated tokens
only, as in vLLM.

Invariant: each sequence has its own counter-based random stream (Philox keyed by its seed), so its draws do not depend
on the other sequences of the batch. The chosen token is the first whose cumulative probability exceeds the draw.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Collection, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.request import SamplingParams
from server.model.runner import Choice


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        params: the request's sampling parameters.
        prompt_ids: seen by the repetition penalty.
        eos_token_ids: not chosen as one of the first `params.min_tokens`; a constraint sees to that itself.

    Attributes:
        seed: the request's seed, or a fresh one; None if the choice is greedy.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], eos_token_ids: Collection[int] = ()) -> None:
        self._params = params
        self._bias = _bias(params)
        self._eos = sorted(eos_token_ids) if params.min_tokens else []
        self._warpers = _warpers(params)
        self._num_chosen = 0
        self._repetition: RepetitionPenaltyLogitsProcessor | None = None
        if params.repetition_penalty not in (None, 1.0):
            self._repetition = RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty))
            self._seen = set(prompt_ids)
            self._seen_ids = torch.tensor([sorted(self._seen)])  # [1, N], each once, whatever the sequence's length
        self._penalises = bool(params.presence_penalty or params.frequency_penalty)
        self._counts: Counter[int] = Counter()
        self.seed: int | None = None
        if not params.is_greedy:
            self.seed = secrets.randbits(63) if params.seed is None else params.seed
            self._draws = np.random.Generator(np.random.Philox(key=self.seed))

    @property
    def leaves_choice(self) -> bool:
        """Whether a runner may draw the next token by `choice`: the request uses only temperature, top-k and top-p."""
        params = self._params
        return not (
            self._repetition
            or self._penalises
            or self._bias
            or params.min_p
            or params.typical_p not in (None, 1.0)
            or (self._eos and self._num_chosen < params.min_tokens)
        )

    def choice(self) -> Choice | None:
        """The parameters for the next draw, None for the most likely token; advances the random stream by one draw."""
        if self.seed is None:
            return None
        params = self._params
        return Choice(
            temperature=1.0 if params.temperature is None else float(params.temperature),
            top_k=params.top_k,
            top_p=1.0 if params.top_p is None else float(params.top_p),
            draw=self._draws.random(),
        )

    def choose(self, logits: Tensor, choice: Choice | None, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Choose the next token from logits [V] float32, by a `choice` of this sampler, among the tokens that `allowed`
        [V] flags. The logits are not changed. Waits for the device once."""
        scores = self._adjusted(logits)
        if allowed is not None:
            hidden = torch.from_numpy(~allowed).to(logits.device)
            scores = scores.masked_fill(hidden, -torch.inf)
        scores = self._warpers(_NO_IDS, cast(FloatTensor, scores))[0]
        if choice is None:
            token = int(scores.argmax())
        else:
            cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
            draw = cumulative[-1:] * choice.draw
            token = int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1))
        self._num_chosen += 1
        if self._penalises:
            self._counts[token] += 1
        if self._repetition is not None and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = torch.cat([self._seen_ids, self._seen_ids.new_tensor([[token]])], dim=-1)
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """The scores [1, V] after the processors that also change a greedy choice."""
        scores = logits[None]
        if self._bias is not None:
            scores = self._bias(_NO_IDS, cast(FloatTensor, scores))
        if self._repetition is not None:
            self._seen_ids = self._seen_ids.to(logits.device)
            scores = self._repetition(cast(LongTensor, self._seen_ids), cast(FloatTensor, scores))
        if self._counts:
            presence, frequency = self._params.presence_penalty or 0.0, self._params.frequency_penalty or 0.0
            ids = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype, device=logits.device)
            scores = scores.index_add(1, ids, (presence + frequency * counts)[None], alpha=-1)
        if self._eos and self._num_chosen < self._params.min_tokens:
            scores = scores.index_fill(1, torch.tensor(self._eos, device=logits.device), -torch.inf)
        return scores


_NO_IDS = cast(LongTensor, torch.zeros((1, 0), dtype=torch.long))
"""Token ids for processors that read only the scores."""


def _bias(params: SamplingParams) -> SequenceBiasLogitsProcessor | None:
    biases: list[list[list[int] | float]] = [
        [[token], float(bias)] for token, bias in (params.logit_bias or {}).items() if bias
    ]
    return SequenceBiasLogitsProcessor(biases) if biases else None


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    """The processors that narrow the choice, in transformers' order."""
    warpers = LogitsProcessorList()
    if params.is_greedy:
        return warpers
    if params.temperature not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k is not None:
        warpers.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p not in (None, 1.0):
        warpers.append(TopPLogitsWarper(top_p=float(params.top_p)))
    if params.min_p:
        warpers.append(MinPLogitsWarper(min_p=float(params.min_p)))
    if params.typical_p not in (None, 1.0):
        warpers.append(TypicalLogitsWarper(mass=float(params.typical_p)))
    return warpers
