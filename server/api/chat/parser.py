"""The text of an answer, as it grows, told apart into thinking, content and calls.

The parser is a coroutine over the text: it takes what it is certain of and waits for the rest. Invariants: the parts do
not depend on how the text was cut into pieces; a mark of the format is in no part, unless what follows it is no call,
which then is content with its mark. A call is told when its name is certain. Its arguments are passed on as the model
wrote them, also where they break off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from server.api.chat.formats import HARMONY, AnswerFormat, CallFormat, types_of
from server.api.chat.messages import Call, Tool, new_call_id
from server.engine.request import FinishedEvent, TokenEvent

MAX_HEAD = 2048
"""Characters in which the name of a call must be certain."""
_JSON_OUTSIDE = frozenset("{}[]:,-+.0123456789eEtrufalsn \t\r\n")
_CHANNEL = regex.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = regex.compile(r"to=([^\s<]+)")
_HEADER = regex.compile(
    r"\s*(?:[\w.]{1,64}\s*)?(?:to=[^\s<]{1,128}\s*)?"
    r"(?:<\|channel\|>[^<]{0,256})?(?:<\|constrain\|>[^<]{0,64})?<\|message\|>"
)


@dataclass(frozen=True)
class Thinking:
    """More of the thinking."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of the content."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a tool, the `index`-th of the answer."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of the call that began last, JSON."""

    index: int
    text: str


Delta = Thinking | Content | CallBegin | Arguments
_Steps = Generator[None, None, Any]
"""Stops where it needs more text."""


@dataclass(frozen=True)
class Answer:
    """All of an answer; `content` is empty where there is none."""

    thinking: str
    content: str
    calls: tuple[Call, ...]

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Answer:
        """The answer that the deltas make."""
        begins = [delta for delta in deltas if isinstance(delta, CallBegin)]
        arguments = ["".join(d.text for d in deltas if isinstance(d, Arguments) and d.index == b.index) for b in begins]
        return cls(
            "".join(delta.text for delta in deltas if isinstance(delta, Thinking)),
            "".join(delta.text for delta in deltas if isinstance(delta, Content)),
            tuple(Call(b.call_id, b.name, text) for b, text in zip(begins, arguments, strict=True)),
        )


class AnswerParser:
    """Tells one answer apart.

    Args:
        answer_format: of the checkpoint, or of a forced call.
        tools: that the answer may call; without any, calls stay text.
        is_thinking: whether the prompt ends inside the thinking.
        is_parallel: whether calls after the first are told.

    Attributes:
        is_thinking: whether the next text belongs to the thinking, as far as is certain.
    """

    def __init__(
        self,
        answer_format: AnswerFormat,
        tools: Sequence[Tool] = (),
        *,
        is_thinking: bool = False,
        is_parallel: bool = True,
    ) -> None:
        self._format = answer_format
        self._calls = answer_format.calls if tools else None
        self._parameters = {tool.name: tool.parameters for tool in tools}
        self._is_parallel = is_parallel
        self.is_thinking = is_thinking
        self._buffer = ""
        self._is_over = self._is_cut = False
        self._deltas: list[Delta] = []
        self._num_calls = 0
        self._space = ""  # white space that is told only if more follows it
        self._drops_space = False  # white space that comes next is the format's
        self._has_content = self._has_thinking = False
        self._steps = self._harmony() if answer_format.calls is HARMONY else self._plain()

    def feed(self, text: str) -> list[Delta]:
        """The parts that are certain with more text."""
        self._buffer += text
        return self._run()

    def finish(self, *, is_cut: bool = False) -> list[Delta]:
        """The rest, after the last text; `is_cut` says that the answer broke off, so nothing that is open is closed."""
        self._is_over, self._is_cut = True, is_cut
        return self._run()

    def _run(self) -> list[Delta]:
        next(self._steps, None)
        told, self._deltas = self._deltas, []
        return told

    # -- answers between marks -----------------------------------------------------------------------------------------

    def _plain(self) -> _Steps:
        if self._format.thinking is not None:
            yield from self._thinking(*self._format.thinking)
        begins = [] if self._calls is None else [self._calls.begin]
        while (mark := (yield from self._until(begins, self._content))) is not None:
            yield from self._called(mark)
        self._tell_content(self._space)

    def _thinking(self, opening: str, closing: str) -> _Steps:
        """The thinking, which may only begin the answer."""
        self._drops_space = True
        if not self.is_thinking:
            self.is_thinking = (yield from self._match(regex.compile(rf"\s*{regex.escape(opening)}"))) is not None
        if self.is_thinking:
            calls = self._calls
            begins = [calls.begin] if calls is not None and calls.ends_thinking else []
            mark = yield from self._until([closing, *begins], self._think)
            self.is_thinking, self._space, self._drops_space = False, "", True
            if mark in begins:
                yield from self._called(mark)

    def _called(self, mark: str) -> _Steps:
        """The calls after `mark`; where none follows, it is content."""
        calls = self._calls
        assert calls is not None
        if not (yield from self._call(calls)):
            self._content(mark)
            return
        while (yield from self._call(calls)):
            pass
        if calls.end:
            yield from self._match(regex.compile(rf"\s*{regex.escape(calls.end)}"))
        self._drops_space = True

    def _call(self, calls: CallFormat) -> _Steps:
        """One call, if one follows; returns whether one did."""
        head = yield from self._match(calls.head)
        if head is None:
            return False
        self._space = ""
        name, call_id = head["name"], head.groupdict().get("id")
        self._begin_call(name, call_id or (new_call_id() if calls.ids == "any" else new_call_id()[-9:]))
        if calls.parameter is None:
            yield from self._json_arguments()
        else:
            yield from self._parameter_arguments(calls, calls.parameter, self._parameters.get(name, {}))
        yield from self._match(calls.tail)
        return True

    def _begin_call(self, name: str, call_id: str) -> None:
        self._num_calls += 1
        self._tell(CallBegin(self._num_calls - 1, call_id, name))

    # -- arguments -----------------------------------------------------------------------------------------------------

    def _argue(self, text: str) -> None:
        if text:
            self._tell(Arguments(self._num_calls - 1, text))

    def _json_arguments(self) -> _Steps:
        """A JSON value, passed on as it is. JSON inside a text is taken out; null and nothing mean no arguments."""
        yield from self._skip_space()
        if self._buffer[:1] in ("{", "["):
            yield from self._json_value(self._argue)
            return
        held: list[str] = []
        yield from self._json_value(held.append)
        text = "".join(held).strip()
        if text.startswith('"'):
            with contextlib.suppress(ValueError):  # it broke off, and is told as it is
                text = str(json.loads(text)).strip()
        if text not in ("", "null"):
            self._argue(text)
        elif not self._is_cut:
            self._argue("{}")

    def _json_value(self, tell: Callable[[str], None]) -> _Steps:
        """Tell one JSON value; it ends where its last bracket or quote closes, or where the text is no JSON."""
        depth, is_quoted, is_escaped = 0, False, False
        while True:
            end, is_whole = len(self._buffer), False
            for at, char in enumerate(self._buffer):
                if is_escaped:
                    is_escaped = False
                elif is_quoted:
                    is_escaped, is_quoted = char == "\\", char != '"'
                    is_whole = not is_quoted and depth == 0
                elif char == '"':
                    is_quoted = True
                elif char not in _JSON_OUTSIDE or (depth == 0 and char in "]},:"):
                    end, is_whole = at, True
                    break
                else:
                    depth += (char in "{[") - (char in "]}")
                    is_whole = char in "]}" and depth == 0
                if is_whole:
                    end = at + 1
                    break
            value, self._buffer = self._buffer[:end], self._buffer[end:]
            tell(value)
            if is_whole or self._is_over:
                return
            yield

    def _parameter_arguments(
        self, calls: CallFormat, parameter: regex.Pattern[str], schema: Mapping[str, Any]
    ) -> _Steps:
        """Texts of parameters as one JSON object; a text for a parameter that is no string is read as JSON."""
        properties = schema.get("properties")
        separator = "{"
        while (found := (yield from self._match(parameter))) is not None:
            key = found["key"].strip()
            allowed = types_of(properties.get(key) if isinstance(properties, Mapping) else None, schema)
            self._argue(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            if allowed == {"string"}:
                yield from self._string_value(calls)
            else:
                held: list[str] = []
                mark = yield from self._until([calls.value_end], held.append)
                text = "".join(held)
                self._argue(text if mark is None and self._is_cut else _typed(text, allowed, calls.has_lines))
        if not (self._is_cut and not self._buffer):
            self._argue("{}" if separator == "{" else "}")

    def _string_value(self, calls: CallFormat) -> _Steps:
        """A text as a JSON string, piece by piece, without the line breaks that the format puts around it."""
        held, is_first = "", calls.has_lines

        def tell(text: str) -> None:
            nonlocal held, is_first
            if is_first and text:
                text, is_first = text.removeprefix("\n"), False
            text = held + text
            held = "\n" if calls.has_lines and text.endswith("\n") else ""
            self._argue(json.dumps(text.removesuffix(held) if held else text, ensure_ascii=False)[1:-1])

        self._argue('"')
        mark = yield from self._until([calls.value_end], tell)
        if mark is not None or not self._is_cut:
            self._argue('"')

    # -- harmony -------------------------------------------------------------------------------------------------------

    def _harmony(self) -> _Steps:
        """Messages of channels: a header up to `<|message|>`, then the message. The prompt ends inside a header."""
        while (header := (yield from self._match(_HEADER))) is not None:
            yield from self._harmony_message(header[0])
            if (mark := (yield from self._until(["<|start|>", "<|channel|>"], self._content))) is None:
                return
            if mark == "<|channel|>":
                self._buffer = mark + self._buffer
        yield from self._until([], self._content)  # an answer that does not keep to the format

    def _harmony_message(self, header: str) -> _Steps:
        channel = found[1] if (found := _CHANNEL.search(header)) else "final"
        recipient = found[1] if (found := _RECIPIENT.search(header)) else "assistant"
        ends = ["<|end|>", "<|call|>", "<|return|>"]
        if self._calls is not None and recipient != "assistant":
            self._begin_call(recipient.removeprefix("functions."), new_call_id())
            held: list[str] = []
            tell: Callable[[str], None] = self._argue
            yield from self._skip_space()
            if self._buffer[:1] in ("{", "["):
                yield from self._json_value(tell)
                tell = held.append
            yield from self._until(ends, tell)
        elif channel == "analysis":
            self._think("\n" if self._has_thinking else "")
            self.is_thinking = True
            yield from self._until(ends, self._think)
            self.is_thinking, self._space = False, ""
        else:
            self._content("\n" if self._has_content else "")
            yield from self._until(ends, self._content)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _until(self, marks: Sequence[str], tell: Callable[[str], None]) -> _Steps:
        """Tell the text before the first of `marks`, take the mark and return it; None where the text ends first."""
        while True:
            found = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
            if found:
                at, mark = min(found)
                text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
                tell(text)
                return mark
            keep = 0 if self._is_over else max((_overlap(self._buffer, mark) for mark in marks), default=0)
            end = len(self._buffer) - keep
            text, self._buffer = self._buffer[:end], self._buffer[end:]
            tell(text)
            if self._is_over:
                return None
            yield

    def _match(self, pattern: regex.Pattern[str]) -> _Steps:
        """Take what the pattern matches at this place; None, and nothing taken, where it does not."""
        while True:
            found = pattern.match(self._buffer, partial=not self._is_over)
            if found is not None and not found.partial:
                self._buffer = self._buffer[found.end() :]
                return found
            if found is None or self._is_over or len(self._buffer) > MAX_HEAD:
                return None
            yield

    def _skip_space(self) -> _Steps:
        while not (text := self._buffer.lstrip()) and not self._is_over:
            yield
        self._buffer = text

    # -- telling -------------------------------------------------------------------------------------------------------

    def _think(self, text: str) -> None:
        """Thinking, without the white space around it."""
        if text := self._kept(text, is_held=True):
            self._has_thinking = True
            self._tell(Thinking(text))

    def _content(self, text: str) -> None:
        self._tell_content(self._kept(text, is_held=self._calls not in (None, HARMONY)))

    def _tell_content(self, text: str) -> None:
        if text:
            self._has_content = True
            self._tell(Content(text))

    def _kept(self, text: str, *, is_held: bool) -> str:
        """The text that is told now; where a mark may come that drops the white space before it, that is held back."""
        if self._drops_space:
            text = text.lstrip()
            self._drops_space = not text
        text = self._space + text
        kept = text.rstrip() if is_held else text
        self._space = text[len(kept) :]
        return kept

    def _tell(self, delta: Delta) -> None:
        """Add a delta, joined with the last one where both are of one kind."""
        if self._num_calls > 1 and not self._is_parallel and isinstance(delta, CallBegin | Arguments):
            return
        last = self._deltas[-1] if self._deltas else None
        if isinstance(delta, Arguments) and isinstance(last, Arguments) and last.index == delta.index:
            self._deltas[-1] = Arguments(delta.index, last.text + delta.text)
        elif isinstance(delta, Thinking | Content) and type(last) is type(delta):
            self._deltas[-1] = type(delta)(last.text + delta.text)
        else:
            self._deltas.append(delta)


class AnswerReader:
    """Reads the events of one generation with a parser.

    Attributes:
        num_thinking_tokens: tokens that belonged to the thinking.
        num_calls: calls that began.
    """

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self.num_thinking_tokens = 0
        self.num_calls = 0

    def read(self, tokens: Sequence[TokenEvent], end: FinishedEvent | None) -> list[Delta]:
        """The parts that are certain with more tokens, and with the end the rest."""
        deltas: list[Delta] = []
        for token in tokens:
            was_thinking = self._parser.is_thinking
            deltas += self._parser.feed(token.text)
            self.num_thinking_tokens += was_thinking
        if end is not None:
            deltas += self._parser.finish(is_cut=end.reason == "length")
        self.num_calls += sum(isinstance(delta, CallBegin) for delta in deltas)
        return deltas


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of `text` with which `mark` may begin."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _typed(text: str, allowed: frozenset[str], has_lines: bool) -> str:
    """JSON of a parameter's text, by the types that its schema allows; a text that is none of them is a string."""
    stripped = text.strip()
    word = {"True": "true", "False": "false", "None": "null"}.get(stripped, stripped) if allowed else stripped
    try:
        value = json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = text
    kinds = {
        bool: {"boolean"},
        int: {"integer", "number"},
        float: {"number"},
        list: {"array"},
        dict: {"object"},
        type(None): {"null"},
    }.get(type(value), set())
    if isinstance(value, float) and value.is_integer():
        kinds = {"integer", "number"}
    if kinds & allowed or (kinds and not allowed):
        return word
    return json.dumps(text.removeprefix("\n").removesuffix("\n") if has_lines else text, ensure_ascii=False)
