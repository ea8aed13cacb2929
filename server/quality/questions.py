"""Questions with exact answers: the share that a model answers, whole, under a mask, or under a pool for each prompt.

A question counts as answered if its answer is a prefix of the greedy continuation. Invariant: a question is answered as
it would be alone, whatever others run beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router.mask import ExpertMask
from server.engine.request import Masking
from server.model.runner import RowStep, Runner, StepOutput
from server.quality.batches import encoder
from server.quality.texts import TextsError

MAX_QUESTIONS = 100_000
MAX_ANSWER_TOKENS = 64

MakeMasking = Callable[[int], Masking]
"""Makes the masking of one question, from the number of its prompt's tokens."""


@dataclass(frozen=True)
class Question:
    """A prompt and its exact answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """Named questions; `chance` is the accuracy of guessing among the set's own answers."""

    name: str
    questions: tuple[Question, ...]
    chance: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chance", 1.0 / max(1, len({question.answer for question in self.questions})))


def read_questions(path: Path) -> QuestionSet:
    """A jsonl file of objects with "prompt" and "answer".

    Raises:
        TextsError: a line that is not such an object, no line at all, or more questions than `MAX_QUESTIONS`.
        OSError: it cannot be read.
    """
    questions: list[Question] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                questions.append(Question(str(item["prompt"]), str(item["answer"])))
            except (ValueError, TypeError, KeyError, RecursionError):
                raise TextsError(f'{path}, line {number}: wanted an object with "prompt" and "answer"') from None
            if len(questions) > MAX_QUESTIONS:
                raise TextsError(f"{path} has more than {MAX_QUESTIONS} questions: split it")
    if not questions:
        raise TextsError(f'{path} has no questions: wanted a line for each, an object with "prompt" and "answer"')
    return QuestionSet(path.stem, tuple(questions))


def share_answered(
    runner: Runner,
    questions: Sequence[Question],
    make_masking: MakeMasking | None = None,
    prefix: str = "",
    adapter: str | None = None,
) -> float:
    """Share of the questions whose answer is a prefix of the greedy continuation.

    Args:
        runner: as many questions run side by side as it has free rows; all rows are free again afterwards.
        make_masking: makes a masking for each question; None leaves the model's own mask.
        prefix: text before every prompt, such as the separator that a document begins with. Special tokens are written
            by name.
        adapter: that masked tokens have.
    """
    waiting = list(reversed(questions))
    running: list[_Asked] = []
    right = 0
    try:
        while waiting or running:
            while waiting and runner.kv.num_free_rows:
                running.append(_Asked(runner, waiting.pop(), make_masking, prefix, adapter))
            for asked in [one for one in running if one.is_answered is not None]:
                running.remove(asked)
                runner.free(asked.row)
                right += bool(asked.is_answered)
            if running:
                _step(runner, running)
    finally:
        for asked in running:
            runner.free(asked.row)
    return right / len(questions)


def _step(runner: Runner, running: Sequence[_Asked]) -> None:
    asked = [one for one in running if one.is_answered is None]
    if not asked:
        return
    output = runner.decode([RowStep(one.row, one.tokens[-1], mask=one.mask, adapter=one.adapter) for one in asked])
    for at, one in enumerate(asked):
        one.take(output, at, slice(at, at + 1))


class _Asked:
    """A question in a row of its own. `is_answered` is None until the continuation decides it."""

    def __init__(
        self,
        runner: Runner,
        question: Question,
        make_masking: MakeMasking | None,
        prefix: str,
        adapter: str | None,
    ) -> None:
        self.is_answered: bool | None = None
        self.tokens: list[int] = []
        self._model, self._question, self._adapter = runner.model, question, adapter
        encode = encoder(runner.model)
        prompt = [*encode(prefix), *encode(question.prompt)]
        self._masking = None if make_masking is None else make_masking(len(prompt))
        self.row = runner.allocate()
        try:
            self.take(runner.prefill(self.row, prompt, mask=self.mask, adapter=self.adapter), 0, slice(None))
        except BaseException:
            runner.free(self.row)
            raise

    @property
    def mask(self) -> ExpertMask | None:
        """For the next step; None is the model's own."""
        chosen = None if self._masking is None else self._masking.mask
        return None if chosen is None else self._model.routing.mask & chosen

    @property
    def adapter(self) -> str | None:
        """For the next step: none without a mask."""
        return None if (self.mask or self._model.routing.mask).is_full else self._adapter

    def take(self, output: StepOutput, at: int, tokens: slice) -> None:
        """Add the most likely token of row `at` of a step, whose routing is that of `tokens`."""
        if self._masking is not None:
            self._masking.observe(*output.record.demand_of(tokens))
        self.tokens.append(int(output.logits[at].argmax()))
        answer, text = self._question.answer, str(self._model.tokenizer.decode(self.tokens))
        if len(text) >= len(answer) and "\ufffd" not in text:
            self.is_answered = text.startswith(answer)
        elif len(self.tokens) >= MAX_ANSWER_TOKENS or not answer.startswith(text.rstrip("\ufffd")):
            self.is_answered = False
