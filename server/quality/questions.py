"""Questions with exact answers: which of them a model answers, whole, under a mask, or under a pool of each prompt.

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
from server.quality.run import encoder
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
        raise TextsError(f"{path} has no questions")
    return QuestionSet(path.stem, tuple(questions))


def answered(
    runner: Runner,
    questions: Sequence[Question],
    mask: ExpertMask | None = None,
    masking: MakeMasking | None = None,
    prefix: str = "",
) -> float:
    """Share of the questions whose answer the greedy continuation starts with.

    Args:
        runner: its free rows are the questions that run side by side.
        mask: for every question.
        masking: of each question, beside `mask`; a pool, for instance.
        prefix: text before every prompt, such as the separator that a document begins with; special tokens by name.
    """
    waiting = list(reversed(questions))
    running: list[_Asked] = []
    right = 0
    try:
        while waiting or running:
            while waiting and runner.num_free_rows:
                running.append(_Asked(runner, waiting.pop(), mask, masking, prefix))
            for asked in [one for one in running if one.verdict is not None]:
                running.remove(asked)
                runner.free(asked.row)
                right += bool(asked.verdict)
            if running:
                _step(runner, running)
    finally:
        for asked in running:
            runner.free(asked.row)
    return right / len(questions)


def _step(runner: Runner, running: Sequence[_Asked]) -> None:
    open_ = [asked for asked in running if asked.verdict is None]
    if not open_:
        return
    output = runner.decode([RowStep(one.row, one.made[-1], mask=one.mask) for one in open_])
    for at, asked in enumerate(open_):
        asked.take(output, at, slice(at, at + 1))


class _Asked:
    """A question in a row of its own. `verdict` is None until it is known whether it was answered."""

    def __init__(
        self,
        runner: Runner,
        question: Question,
        mask: ExpertMask | None,
        masking: MakeMasking | None,
        prefix: str,
    ) -> None:
        self.verdict: bool | None = None
        self.made: list[int] = []
        self._model, self._question, self._mask = runner.model, question, mask
        encode = encoder(runner.model)
        prompt = [*encode(prefix), *encode(question.prompt)]
        self._masking = None if masking is None else masking(len(prompt))
        self.row = runner.allocate()
        try:
            self.take(runner.prefill(self.row, prompt, mask=self.mask), 0, slice(None))
        except BaseException:
            runner.free(self.row)
            raise

    @property
    def mask(self) -> ExpertMask | None:
        """For the next step; None is the model's own."""
        masks = [self._mask, None if self._masking is None else self._masking.mask]
        chosen = [mask for mask in masks if mask is not None]
        if not chosen:
            return None
        joined = self._model.routing.mask
        for mask in chosen:
            joined = joined & mask
        return joined

    def take(self, output: StepOutput, at: int, tokens: slice) -> None:
        """The most likely token of row `at` of a step, whose routing is that of `tokens`."""
        if self._masking is not None:
            record = output.record
            index = record.served_index if record.demand_index is None else record.demand_index
            weight = record.served_weight if record.demand_weight is None else record.demand_weight
            self._masking.observe(index[:, tokens], weight[:, tokens])
        self.made.append(int(output.logits[at].argmax()))
        answer, text = self._question.answer, str(self._model.tokenizer.decode(self.made))
        if len(text) >= len(answer) and "\ufffd" not in text:
            self.verdict = text.startswith(answer)
        elif len(self.made) >= MAX_ANSWER_TOKENS or not answer.startswith(text.rstrip("\ufffd")):
            self.verdict = False
