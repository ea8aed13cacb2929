"""Choose a token from logits, by transformers' logits processors and one uniform draw a token.

What also changes a greedy choice comes first: the adjustment (bias, presence, frequency, minimum length), the tokens
that a constraint allows, the repetition penalty. Then come temperature and the filters (top-k, top-p, …), in
transformers' order. Presence and frequency count generated tokens only, as in vLLM.

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
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.request import SamplingParams
from server.model.runner import MOST_ADJUSTED, Adjustment, Choice

TOP_P_TOKENS = 512
"""Most likely tokens that are looked at first for top-p."""


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
        self._adjusted = _AdjustedTokens(params, eos_token_ids)
        self._warpers = _warpers(params)
        self._repetition: RepetitionPenaltyLogitsProcessor | None = None
        if params.repetition_penalty not in (None, 1.0):
            self._repetition = RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty))
            self._seen = set(prompt_ids)
            self._seen_ids = torch.tensor([sorted(self._seen)])  # [1, N], each once, whatever the sequence's length
        self.seed: int | None = None
        if not params.is_greedy:
            self.seed = secrets.randbits(63) if params.seed is None else params.seed
            self._draws = np.random.Generator(np.random.Philox(key=self.seed))

    @property
    def leaves_choice(self) -> bool:
        """Whether a runner may choose the next token by `choice` and `adjustment`: no repetition penalty, no typical_p,
        and not more adjusted tokens than a runner has room for."""
        adjustment = self.adjustment
        return (
            self._repetition is None
            and self._params.typical_p in (None, 1.0)
            and (adjustment is None or len(adjustment.ids) <= MOST_ADJUSTED)
        )

    @property
    def adjustment(self) -> Adjustment | None:
        """The values added to the logits for the next choice; valid until `take`."""
        return self._adjusted.adjustment

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
            min_p=params.min_p or 0.0,
        )

    def choose(self, logits: Tensor, choice: Choice | None, allowed: npt.NDArray[np.bool_] | None = None) -> int:
        """Choose the next token from logits [V] float32, by a `choice` of this sampler, among the tokens that `allowed`
        [V] flags. The logits are not changed. Waits for the device once, and for top-p once more. `take` comes next."""
        scores = logits[None]
        if (adjustment := self.adjustment) is not None:
            ids = torch.from_numpy(adjustment.ids).to(logits.device)
            scores = scores.index_add(1, ids, torch.from_numpy(adjustment.values).to(logits.device)[None])
        if allowed is not None:
            scores = scores.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)
        if self._repetition is not None:
            self._seen_ids = self._seen_ids.to(logits.device)
            scores = self._repetition(cast(LongTensor, self._seen_ids), cast(FloatTensor, scores))
        scores = self._warpers(_NO_IDS, cast(FloatTensor, scores))[0]
        if choice is None:
            return int(scores.argmax())
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        draw = cumulative[-1:] * choice.draw
        return int(torch.searchsorted(cumulative, draw, right=True).clamp(max=len(cumulative) - 1))

    def take(self, token: int) -> None:
        """Add the token that was chosen, here or by a runner."""
        self._adjusted.take(token)
        if self._repetition is not None and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = torch.cat([self._seen_ids, self._seen_ids.new_tensor([[token]])], dim=-1)


class _AdjustedTokens:
    """The adjustment of a sequence's logits as it grows: each token that has one keeps its place in the arrays."""

    def __init__(self, params: SamplingParams, eos_token_ids: Collection[int]) -> None:
        self._presence, self._frequency = params.presence_penalty or 0.0, params.frequency_penalty or 0.0
        self._bias = {token: float(bias) for token, bias in (params.logit_bias or {}).items() if bias}
        self._banned = frozenset(eos_token_ids) if params.min_tokens else frozenset()
        self._num_banned = params.min_tokens
        self._num_taken = 0
        self._counts: Counter[int] = Counter()
        self._places: dict[int, int] = {}
        self._ids, self._values = np.zeros(16, dtype=np.int32), np.zeros(16, dtype=np.float32)
        for token in sorted(self._bias.keys() | self._banned):
            self._put(token)

    @property
    def adjustment(self) -> Adjustment | None:
        num = len(self._places)
        return Adjustment(self._ids[:num], self._values[:num]) if num else None

    def take(self, token: int) -> None:
        self._num_taken += 1
        if self._presence or self._frequency:
            self._counts[token] += 1
            self._put(token)
        if self._num_taken == self._num_banned:
            for banned in self._banned:
                self._put(banned)

    def _put(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._values = np.concatenate([self._values, np.zeros_like(self._values)])
        count = self._counts[token]
        penalty = self._presence + self._frequency * count if count else 0.0
        is_banned = token in self._banned and self._num_taken < self._num_banned
        self._ids[place] = token
        self._values[place] = -np.inf if is_banned else self._bias.get(token, 0.0) - penalty


_NO_IDS = cast(LongTensor, torch.zeros((1, 0), dtype=torch.long))
"""Token ids for processors that read only the scores."""


class _TopP(LogitsProcessor):
    def __init__(self, top_p: float) -> None:
        self._top_p = top_p

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        return cast(FloatTensor, keep_top_p(scores, self._top_p))


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Scores [1, V] with minus infinity for all but the most likely tokens that reach the probability `top_p` together.

    Equally likely tokens are kept or left together. Sorts the vocabulary only where the first tokens do not suffice.
    """
    probabilities = torch.softmax(scores.double(), dim=-1)
    vocab = scores.shape[-1]
    for count in (min(TOP_P_TOKENS, vocab), vocab):
        best = probabilities.topk(count).values[0]
        reached = best.cumsum(dim=-1)
        if count == vocab or float(reached[-1]) >= top_p:
            break
    last = torch.searchsorted(reached, top_p).clamp(max=count - 1)
    return scores.masked_fill(probabilities < best[last], -torch.inf)


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
        warpers.append(_TopP(float(params.top_p)))
    if params.min_p:
        warpers.append(MinPLogitsWarper(min_p=float(params.min_p)))
    if params.typical_p not in (None, 1.0):
        warpers.append(TypicalLogitsWarper(mass=float(params.typical_p)))
    return warpers
