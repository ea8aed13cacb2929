"""Token by token to text: incremental detokenising and stop strings.

Bytes of a character may be spread over tokens, and how a token reads may depend on the one before: text is given out
only when it can no longer change. Invariant: the pieces of `Detokenizer.add` and the rest of `finish` join to the text
of all tokens, cut at the end of the stop string if one was met.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8
"""A character takes at most four bytes, so text that is still incomplete after this many tokens is not going to be."""


class Detokenizer:
    """Text of one sequence's generated tokens.

    Args:
        tokenizer: of the checkpoint.
        prompt_ids: the last few give context to the first tokens' text.
        stop: strings that end the generation.

    Attributes:
        text: given out so far, special tokens left out.
        stop_string: the one that was met, else None; `text` then ends with it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-MAX_HELD_TOKENS:])
        self._prefix = 0
        self._read = len(self._ids)
        self._stop = stop
        self._longest_stop = max((len(string) for string in stop), default=0)
        self._pieces: list[str] = []
        self._tail = ""
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """The text given out so far."""
        return "".join(self._pieces)

    def add(self, token_id: int) -> str:
        """Take one token; returns the text that is now certain (often empty within a character)."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith(REPLACEMENT) and len(self._ids) - self._read < MAX_HELD_TOKENS:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._give(after[len(before) :])

    def finish(self) -> str:
        """The text still held back when no more tokens come."""
        if self._read == len(self._ids) or self.stop_string is not None:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        self._read = len(self._ids)
        return self._give(after[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _give(self, piece: str) -> str:
        if self._longest_stop:
            window = self._tail + piece
            ends = [window.find(string) + len(string) for string in self._stop if string in window]
            if ends:
                end = min(ends)
                self.stop_string = next(s for s in self._stop if s in window and window.find(s) + len(s) == end)
                piece = window[len(self._tail) : end]
            self._tail = window[-(self._longest_stop - 1) :] if self._longest_stop > 1 else ""
        self._pieces.append(piece)
        return piece
