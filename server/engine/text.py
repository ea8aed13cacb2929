"""Incremental decoding of tokens to text: the bytes of tokens, special tokens, and stop strings.

A token adds bytes, and a character may span several tokens, so text is returned only when it can no longer change. A
special token ends the character before it. Invariant: the texts that `Detokenizer` returns for the tokens join to the
generated text, cut at the stop string if there is one, and no returned text is cut later.
"""

from __future__ import annotations

import codecs
import copy
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engine.request import SamplingParams

REPLACEMENT = "\ufffd"
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""The alphabet of byte-level BPE."""
FORMAT_MARKERS = frozenset(
    ["<|channel|>", "[TOOL_CALLS]", "[THINK]", "<|tool_calls_section_begin|>", "<|python_start|>"]
)
"""Special tokens that separate the parts of an answer: of gpt-oss (harmony), Mistral, Kimi K2 and Llama 4. If a
checkpoint has one of them, the text keeps special tokens unless the request says otherwise."""
LONGEST_CHARACTER_BYTES = 4


class Vocabulary:
    """The bytes of each token, and the set of special tokens.

    Attributes:
        keeps_special_tokens: whether text keeps special tokens if the request does not say.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(added) | frozenset(tokenizer.all_special_ids)
        self.keeps_special_tokens = any(token.content in FORMAT_MARKERS for token in added.values())
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._bytes: dict[int, bytes] = {}

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a marker, not text."""
        return token_id in self._special

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 of one token within a text, maybe a part of a character, with its leading space if it has one; the
        name of a special token; nothing for an id that the tokenizer lacks."""
        spelled = self._bytes.get(token_id)
        if spelled is None:
            spelled = self._bytes[token_id] = self._spell(token_id)
        return spelled

    def bytes_at_start(self, token_id: int) -> bytes:
        """The bytes of a token at the start of a text: some tokenizers drop its leading space."""
        spelled = self.bytes_of(token_id)
        starts_with_space = self._decode([token_id]).startswith(" ")
        return spelled[1:] if spelled.startswith(b" ") and not starts_with_space else spelled

    def _spell(self, token_id: int) -> bytes:
        if self.is_special(token_id):
            return self._decode([token_id]).encode()
        piece = self._decode([*self._anchor, token_id]).removeprefix(self._decode(self._anchor))
        if REPLACEMENT in piece:  # a part of a character: its name in the vocabulary says which bytes
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            assert isinstance(name, str)
            if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
                return bytes([int(byte[1], 16)])
            if all(character in BYTE_OF_CHARACTER for character in name):
                return bytes(BYTE_OF_CHARACTER[character] for character in name)
        return piece.encode()

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class Detokenizer:
    """Text of one sequence's generated tokens.

    Args:
        vocabulary: of the checkpoint.
        prompt_ids: the first generated tokens complete a character that the prompt left incomplete.
        sampling: says which strings end the text, and whether it keeps them and special tokens.

    Attributes:
        text: the text returned so far.
        stop_string: the stop string that ended the text, else None.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._vocabulary = vocabulary
        self._min_tokens = sampling.min_tokens
        self._keeps_stop = sampling.include_stop_str_in_output
        skips = sampling.skip_special_tokens
        self._skips_special = not vocabulary.keeps_special_tokens if skips is None else skips
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt_ids[-LONGEST_CHARACTER_BYTES:]:
            self._decoder.decode(vocabulary.bytes_of(token_id), final=vocabulary.is_special(token_id))
        self._is_at_start = all(map(vocabulary.is_special, prompt_ids))
        # of the text with special tokens, and of the text without them as soon as the two differ
        self._windows = [_StopWindow(sampling.stop)] if sampling.stop else []
        self._num_tokens = 0
        self._length = 0
        self._held: deque[_HeldToken] = deque()
        self._cut: int | None = None
        self._has_ended = False
        self._given: list[str] = []
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """The text returned so far."""
        return "".join(self._given)

    def add(self, token_id: int, *, is_end: bool = False) -> None:
        """Add one token; with `is_end` it is an end-of-sequence token, which is no part of the text."""
        self._num_tokens += 1
        spelled = self._vocabulary.bytes_of(token_id)
        is_special = self._vocabulary.is_special(token_id)
        if self._is_at_start and not is_special:
            self._is_at_start = False
            spelled = self._vocabulary.bytes_at_start(token_id)
        token = _HeldToken(spelled, self._length)
        self._held.append(token)
        if is_end or is_special:
            self._extend(token, self._decoder.decode(b"", final=True), is_shown=True)
            if not is_end:
                self._extend(token, spelled.decode(), is_shown=not self._skips_special)
        else:
            self._extend(token, self._decoder.decode(spelled), is_shown=True)
            token.num_open_bytes = len(self._decoder.getstate()[0])

    def finish(self) -> None:
        """Mark the end of the text, so that the next `give` returns all of it, up to the stop string."""
        if self._cut is None and self._held:
            self._held[-1].shown.append((self._length, self._decoder.decode(b"", final=True)))
        self._has_ended = True

    def give(self) -> Iterator[tuple[str, bytes]]:
        """Return, for each token whose text is now final, in order, the text that it adds and its bytes.

        A stop string may cut both; a token that lies wholly behind the cut is never returned.
        """
        certain = self._certain()
        while self._held and self._held[0].end <= certain:
            token = self._held.popleft()
            if self._cut is None or token.start < self._cut:
                text, spelled = token.up_to(self._cut)
                self._given.append(text)
                yield text, spelled

    def _certain(self) -> int:
        """The position up to which later tokens cannot change the text."""
        if self._has_ended or self._keeps_stop or not self._windows:
            return self._length + 1  # also a character that is incomplete
        return min(window.possible_beginning(self._length) for window in self._windows)

    def _extend(self, token: _HeldToken, piece: str, *, is_shown: bool) -> None:
        """Add decided text to the last token, and look for a stop string that ends in it."""
        start = self._length
        self._length += len(piece)
        token.piece += piece
        if is_shown:
            token.shown.append((start, piece))
        if not is_shown and len(self._windows) == 1:
            self._windows.append(copy.deepcopy(self._windows[0]))
        windows = self._windows if is_shown else self._windows[:1]
        found = [match for window in windows for match in window.add(piece, start)]
        if found and self._cut is None and self._num_tokens > self._min_tokens:
            end, begin, self.stop_string = min(found)
            self._cut = end if self._keeps_stop else begin


@dataclass
class _HeldToken:
    """A token that was not returned yet.

    Attributes:
        spelled: its bytes.
        start: its place in the whole text, special tokens included, in characters.
        piece: text that became final with it, from `start` on.
        shown: (place, text) of the parts that are returned.
        num_open_bytes: bytes at its end of a character that was still incomplete.
    """

    spelled: bytes
    start: int
    piece: str = ""
    shown: list[tuple[int, str]] = field(default_factory=list)
    num_open_bytes: int = 0

    @property
    def end(self) -> int:
        """The position after its text, including a character that it only begins."""
        return self.start + len(self.piece) + (self.num_open_bytes > 0)

    def up_to(self, cut: int | None) -> tuple[str, bytes]:
        """The returned text and the bytes before the position `cut` (None: all)."""
        if cut is None or cut > self.start + len(self.piece):
            return "".join(text for _, text in self.shown), self.spelled
        num_cut = len(self.piece[cut - self.start :].encode()) + self.num_open_bytes
        text = "".join(text[: max(0, cut - place)] for place, text in self.shown)
        return text, self.spelled[: max(0, len(self.spelled) - num_cut)]


class _StopWindow:
    """The end of a growing text, for the search of stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._keep = max(map(len, stops)) - 1
        self._text = ""
        self._places: list[int] = []

    def add(self, piece: str, start: int) -> list[tuple[int, int, str]]:
        """(end, begin, stop string) of the stop strings that end in the piece, whose position is `start`."""
        searched = len(self._text)
        self._text += piece
        self._places.extend(range(start, start + len(piece)))
        found = []
        for stop in self._stops:
            at = self._text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((self._places[at + len(stop) - 1] + 1, self._places[at], stop))
        surplus = max(0, len(self._text) - self._keep)
        self._text = self._text[surplus:]
        del self._places[:surplus]
        return found

    def possible_beginning(self, otherwise: int) -> int:
        """The first position at which a stop string may have begun; `otherwise` if there is none."""
        text, first = self._text, len(self._text)
        for stop in self._stops:
            at = text.find(stop[0])
            while 0 <= at < first:
                if stop.startswith(text[at:]):
                    first = at
                else:
                    at = text.find(stop[0], at + 1)
        return self._places[first] if first < len(text) else otherwise
