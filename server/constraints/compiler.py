"""Compiles constraints for one tokenizer, and tells the tokens that may come next.

llguidance does the work: it compiles in milliseconds, and computes the allowed tokens as the text grows. Invariants:
the time to compile has a bound, and so has the work of each later step, so no schema of a client stalls the engine;
compiled constraints are kept within a bound; a state belongs to one sequence.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.constraints.grammar import Constraint, ConstraintError, Json, Regex, lark_of, parts_of
from server.constraints.json_schema import Schema, refused_place, shown
from server.constraints.trial import LIMITS, SECONDS, TOO_MUCH, Trial

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_KEPT = 64
MAX_REASON = 300


class CompiledConstraint:
    """A constraint ready for any number of sequences; any thread may use it.

    Attributes:
        is_usable: false once a sequence ran into the limits: sequences share what was computed, and that it failed.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Collection[int]) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._ends = np.array(sorted(end_ids), dtype=np.int64)
        self.is_usable = True

    def begin(self, num_kept_on: float = 0) -> ConstraintState:
        """The state of a new sequence.

        Args:
            num_kept_on: of the first so many tokens none is an end, unless the text can only end there.
        """
        return ConstraintState(self, self._matcher.deep_copy(), self._vocab_size, self._ends, num_kept_on)


class ConstraintState:
    """The constraint on one sequence, as far as its text goes; `CompiledConstraint.begin` makes it.

    Attributes:
        error: the reason why the constraint could not be followed further; None as long as it can.
    """

    def __init__(
        self,
        compiled: CompiledConstraint,
        matcher: LLMatcher,
        vocab_size: int,
        ends: npt.NDArray[np.int64],
        num_kept_on: float,
    ) -> None:
        self._compiled, self._matcher, self._vocab_size = compiled, matcher, vocab_size
        self._end_words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        np.bitwise_or.at(self._end_words, ends // 32, np.uint32(1) << (ends % 32).astype(np.uint32))
        self._num_kept_on, self._num_taken = num_kept_on, 0
        self._allowed: npt.NDArray[np.uint32] | None = None
        self.error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the text matches and nothing can follow it."""
        return self.error is None and bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.uint32]:
        """One bit for each token, uint32 [ceil(V / 32)], low bits first: whether it may come next.

        Computed once for each place. After an `error` all end-of-sequence tokens are allowed, and no others.
        """
        if self._allowed is None:
            self._allowed = self._compute()
        return self._allowed

    def allowed_flags(self) -> npt.NDArray[np.bool_]:
        """`allowed` as bool [V]."""
        return np.unpackbits(self.allowed().view(np.uint8), bitorder="little")[: self._vocab_size].view(np.bool_)

    def take(self, token: int) -> None:
        """Add the token that was chosen among the allowed ones."""
        self._allowed = None
        self._num_taken += 1
        if self.error is None and not self._matcher.consume_token(token):
            self._fail(_plain(self._matcher.get_error()))

    def _compute(self) -> npt.NDArray[np.uint32]:
        if self.error is None:
            words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint32)[: len(self._end_words)].copy()
            if self._vocab_size % 32:
                words[-1] &= np.uint32((1 << self._vocab_size % 32) - 1)
            if self._matcher.is_error():
                self._fail(_plain(self._matcher.get_error()))
            elif not words.any():
                self._fail("no token of the vocabulary continues the text")
            else:
                going_on = words & ~self._end_words
                return going_on if self._num_taken < self._num_kept_on and going_on.any() else words
        return self._end_words.copy()

    def _fail(self, reason: str) -> None:
        self.error = reason
        self._compiled.is_usable = False


class ConstraintCompiler:
    """Compiles constraints for a tokenizer; any thread may call it.

    Args:
        tokenizer: of the checkpoint. It is read at the first use, which takes 0.1 s for 8,192 tokens, 2 s for 150,000.
        vocab_size: rows of the logits, V.
        end_ids: end-of-sequence tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = frozenset(token for token in end_ids if token < vocab_size)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): int(id_) for id_, token in added if token.special}
        self._kept: OrderedDict[str, CompiledConstraint] = OrderedDict()
        self._lock = threading.Lock()
        self._read: LLTokenizer | None = None
        self._trial = Trial()

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """The compiled constraint, from those kept if it is among them. May take a second: not for the event loop.

        Raises:
            ConstraintError: it cannot be enforced; the message has the place and the reason.
        """
        grammar = lark_of(constraint, self._special, self._end_ids)
        if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise ConstraintError(
                f"the constraint is longer than {MAX_GRAMMAR_BYTES} bytes; shorten the schema or the pattern"
            )
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is None or not kept.is_usable:
                kept = self._kept[grammar] = self._compile(grammar, constraint)
            self._kept.move_to_end(grammar)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return kept

    def _compile(self, grammar: str, constraint: Constraint) -> CompiledConstraint:
        until = time.monotonic() + SECONDS

        def reason_of(grammar: str) -> str:
            return _plain(self._trial.reason(grammar, until))

        def reason_of_schema(schema: Schema) -> str:
            return "" if schema is False else reason_of(lark_of(Json(schema), {}))

        if reason := reason_of(grammar):
            for part in parts_of(constraint):
                if isinstance(part, Json) and (of_schema := reason_of_schema(part.schema)):
                    place = () if of_schema == TOO_MUCH else refused_place(part.schema, of_schema, reason_of_schema)
                    where = f" at `{shown(place)}`" if place else ""
                    raise ConstraintError(f"the schema{where}: {of_schema}")
                if isinstance(part, Regex) and (of_pattern := reason_of(lark_of(part, {}))):
                    raise ConstraintError(f"the regular expression: {of_pattern}")
            raise ConstraintError(reason)
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=LIMITS)
        first = matcher.deep_copy()
        first.compute_bitmask()  # most of the work of a large grammar; the sequences to come share it
        if first.is_error():
            raise ConstraintError(_plain(first.get_error()))
        return CompiledConstraint(matcher, self._vocab_size, self._end_ids)

    def _tokens(self) -> LLTokenizer:
        if self._read is None:
            if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                raise ConstraintError(
                    "this checkpoint's tokenizer is not of the tokenizers library; ask for plain text"
                )
            size = max(self._vocab_size, len(self._tokenizer))
            self._read = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._end_ids))
        return self._read


def _plain(error: str) -> str:
    """llguidance's reason on one line, without the lines of the grammar around the place."""
    kept = [line.strip() for line in error.splitlines() if not _NOISE.match(line)]
    text = _PREFIX.sub("", " ".join(filter(None, kept)))
    for pattern, plain in _PLAINER:
        text = pattern.sub(plain, text)
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


_NOISE = re.compile(r"\s*(\d+ \||\^+\s*$|<non-verbose/>)")
_PREFIX = re.compile(r'^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex "(?s:.*)" \(in regex\): )?')
_PLAINER = (
    (re.compile(r"^Unimplemented keys: \[(.*)\]$"), r"keywords that cannot be enforced: \1; leave them out"),
    (re.compile(r"^oneOf constraints.*"), "oneOf whose alternatives may overlap cannot be enforced; use anyOf"),
    (re.compile(r"^Resource .*"), "a reference to outside the schema is not followed; put the definition into $defs"),
    (re.compile(r"^NoExtension.*"), "no text can match it"),
)
