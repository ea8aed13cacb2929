"""Evaluation: what text costs a model and which questions it answers, unmasked or under a mask.

Loss is the mean over all tokens but the first of each packed sequence, in nats; perplexity is its exponential. A
question counts as answered if its answer is a prefix of the greedy continuation. Invariant: the same texts, mask and
model give the same figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from router.mask import ExpertMask
from server.calibrate import CalibrateOptions, domain_sequences
from server.calibrate_run import Tokens, batches, encoder, losses, run_batch
from server.calibrate_texts import Domain, TextsError
from server.model.assembly import SelectiveModel
from server.model.runner import Runner

MAX_QUESTIONS = 100_000
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class TextResult:
    """What one domain's text cost.

    Attributes:
        loss: nats a token; num_tokens: it is the mean of.
        deficit: missing share of the router mass; deficit_per_layer: of each layer.
        top1_missing: share of (token, layer) pairs whose first choice was not there.
    """

    loss: float
    num_tokens: int
    deficit: float = 0.0
    deficit_per_layer: tuple[float, ...] = ()
    top1_missing: float = 0.0

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Question:
    """A prompt and its exact answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """Named questions; `chance` is what guessing among the set's own answers gets right."""

    name: str
    questions: tuple[Question, ...]
    chance: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chance", 1.0 / max(1, len({question.answer for question in self.questions})))


def read_questions(path: Path) -> QuestionSet:
    """A jsonl file of objects with "prompt" and "answer".

    Raises:
        TextsError: a line that is none, or more questions than `MAX_QUESTIONS`.
    """
    questions: list[Question] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                questions.append(Question(str(item["prompt"]), str(item["answer"])))
            except (ValueError, TypeError, KeyError):
                raise TextsError(f'{path}, line {number}: wanted an object with "prompt" and "answer"') from None
            if len(questions) > MAX_QUESTIONS:
                raise TextsError(f"{path} has more than {MAX_QUESTIONS} questions: split it")
    if not questions:
        raise TextsError(f"{path} has no questions")
    return QuestionSet(path.stem, tuple(questions))


def tokenised(
    model: SelectiveModel, domains: Sequence[Domain], options: CalibrateOptions
) -> dict[str, list[list[int]]]:
    """Each domain's packed sequences. Raises `TextsError` if one has none."""
    made = {domain.name: domain_sequences(model, domain, options) for domain in domains}
    for name, found in made.items():
        if not found:
            raise TextsError(f"domain {name} has fewer than 32 tokens: give it more text")
    return made


def evaluate_text(model: SelectiveModel, sequences: Sequence[Tokens], mask: ExpertMask | None = None) -> TextResult:
    """Loss and deficit over packed token sequences, under a mask (intersected with the model's own)."""
    own = model.routing.mask
    mask = None if mask is None else mask & own
    demanded, missed = np.zeros(model.num_layers), np.zeros(model.num_layers)
    values: list[npt.NDArray[np.float64]] = []
    first_missing, num_choices = 0, 0
    for batch in batches(model, sequences):
        output = run_batch(model, batch, mask)
        values.append(losses(output.logits, batch).ravel())
        demanded += output.share.demanded.sum(axis=0)
        missed += output.share.missed.sum(axis=0)
        if output.record.demand_index is not None:
            first = output.record.demand_index[:, :, 0]  # [L, T]
            first_missing += int((~np.take_along_axis((mask or own).allowed, first, axis=1)).sum())
        num_choices += output.record.served_index.shape[1] * model.num_layers
    joined = np.concatenate(values)
    return TextResult(
        loss=float(joined.mean()),
        num_tokens=len(joined),
        deficit=float(missed.sum() / demanded.sum()),
        deficit_per_layer=tuple(float(value) for value in missed / demanded),
        top1_missing=first_missing / num_choices,
    )


def answered(
    runner: Runner, questions: Sequence[Question], mask: ExpertMask | Callable[[Question], ExpertMask] | None = None
) -> float:
    """Share of the questions whose answer the greedy continuation starts with."""
    return sum(_is_answered(runner, question, mask) for question in questions) / len(questions)


def _is_answered(
    runner: Runner, question: Question, mask: ExpertMask | Callable[[Question], ExpertMask] | None
) -> bool:
    chosen = mask(question) if callable(mask) else mask
    chosen = None if chosen is None else chosen & runner.model.routing.mask
    tokenizer = runner.model.tokenizer
    row = runner.allocate()
    try:
        output = runner.prefill(row, encoder(runner.model)(question.prompt), mask=chosen)
        made: list[int] = []
        while True:
            made.append(int(output.logits[0].argmax()))
            text = str(tokenizer.decode(made))
            if len(text) >= len(question.answer) and "\ufffd" not in text:
                return text.startswith(question.answer)
            if len(made) >= MAX_ANSWER_TOKENS or not question.answer.startswith(text.rstrip("\ufffd")):
                return False
            output = runner.decode([row], [made[-1]], masks=[chosen])
    finally:
        runner.free(row)


def geometric_mean(ratios: Sequence[float]) -> float:
    """The geometric mean, of perplexity ratios for instance."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
