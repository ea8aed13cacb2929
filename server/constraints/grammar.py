"""Constraints: trees of parts that say which texts may be generated, and their form as one grammar of llguidance.

A part is a frozen dataclass; parts nest freely. Invariant: a text that is generated to its end under a constraint
matches it whole, from its first character. Source of the grammar's language: llguidance's `docs/syntax.md`, a variant
of Lark. Special tokens match only where a `Text` or an `Until` names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from llguidance import regex_to_lark

from server.constraints.json_schema import Schema, enforceable
from server.errors import ServerError

WHITESPACE = "[ ]?"
"""Between the tokens of JSON, which comes on one line: a weak model that may write any blanks writes nothing else."""
MAX_DEPTH = 64


class ConstraintError(ServerError):
    """A constraint that cannot be enforced; the message says which part of it, and why."""


@dataclass(frozen=True, slots=True)
class Text:
    """Exactly this text. The text of a special token in it stands for that token."""

    text: str


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON value that is valid under a JSON Schema; `Json(True)` is any value, `Json({"type": "object"})` any object.

    Keys come in the order of `properties`. Keywords that cannot be enforced are refused, not ignored.
    """

    schema: Schema


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that a regular expression matches whole. Classes as `\\d` are ASCII; there is no look-around."""

    pattern: str


@dataclass(frozen=True, slots=True)
class AnyText:
    """Any text, also none; `without` is a text that it must not have in it, where it is not empty."""

    without: str = ""


@dataclass(frozen=True, slots=True)
class Until:
    """Any text up to the first `end`, and `end`. It may be the text of a special token."""

    end: str


@dataclass(frozen=True, slots=True)
class Chain:
    """Parts one after another."""

    parts: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of several parts."""

    parts: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part at least `least` and at most `most` times; None is no limit."""

    part: Constraint
    least: int = 0
    most: int | None = None


Constraint = Text | Json | Regex | AnyText | Until | Chain | OneOf | Repeat


def lark_of(constraint: Constraint, special: Mapping[str, int], ends: Collection[int] = ()) -> str:
    """The constraint as one Lark grammar.

    Args:
        special: text of each special token → its id.
        ends: ids of the end-of-sequence tokens, which no part may name.

    Raises:
        ConstraintError: a part that says nothing that can be generated.
    """
    rules = _Rules(special, frozenset(ends))
    start = rules.of(constraint, 0)
    return "\n".join(["%llguidance {}", f"start: {start}", *rules.lines, r"ANY: /(.|\n)*/", ""])


def parts_of(constraint: Constraint) -> Iterator[Constraint]:
    """The constraint and all parts within it."""
    yield constraint
    inner = constraint.parts if isinstance(constraint, Chain | OneOf) else ()
    for part in (constraint.part,) if isinstance(constraint, Repeat) else inner:
        yield from parts_of(part)


class _Rules:
    """Collects the rules that the parts need beside `start`."""

    def __init__(self, special: Mapping[str, int], ends: frozenset[int]) -> None:
        self.lines: list[str] = []
        self._special, self._ends = special, ends
        longest_first = sorted((text for text in special if text), key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def of(self, part: Constraint, depth: int) -> str:
        """The part as an expression of a rule's body."""
        if depth > MAX_DEPTH:
            raise ConstraintError(f"the constraint nests its parts more than {MAX_DEPTH} deep; nest less")
        match part:
            case Text(text):
                return " ".join(self._literal(text)) or '""'
            case Json(schema):
                return f"%json {schema_text(schema)}"
            case Regex(pattern):
                return f"/{_pattern_text(pattern)}/"
            case AnyText(without):
                return self._any(without)
            case Until(end):
                return self._until(end)
            case Chain(parts):
                return "(" + " ".join(self.of(each, depth + 1) for each in parts) + ")" if parts else '""'
            case OneOf(parts):
                if not parts:
                    raise ConstraintError("a choice has no alternatives; give at least one")
                return "(" + " | ".join(self.of(each, depth + 1) for each in parts) + ")"
            case Repeat(repeated, least, most):
                if least < 0 or (most is not None and most < max(least, 1)):
                    raise ConstraintError(f"a part repeats {least} to {most} times; give 0 ≤ least ≤ most, most ≥ 1")
                return f"({self.of(repeated, depth + 1)}){{{least},{'' if most is None else most}}}"

    def _literal(self, text: str) -> Iterator[str]:
        for piece in self._splitter.split(text) if self._splitter else [text]:
            if piece in self._special:
                yield self._token(piece)
            elif piece:
                yield json.dumps(piece, ensure_ascii=False)

    def _token(self, text: str) -> str:
        token = self._special[text]
        if token in self._ends:
            raise ConstraintError(
                f"a part names the end-of-sequence token {text!r}; leave it out: the text ends after its last part"
            )
        return f"<[{token}]>"

    def _any(self, without: str) -> str:
        if not without or without in self._special:  # the text of a special token is never a part of it
            return "ANY"
        name = f"ANY_{len(self.lines)}"
        self.lines.append(rf"{name}: /(.|\n)*/ & ~/(.|\n)*{_pattern_text(re.escape(without))}(.|\n)*/")
        return name

    def _until(self, end: str) -> str:
        first, *others = list(self._literal(end)) or [""]
        if not first:
            raise ConstraintError("a text ends at an empty text; name its end")
        if first.startswith("<["):
            return " ".join(["ANY", first, *others])
        if others:
            raise ConstraintError("the end of a text is a text with special tokens in it; begin it with the token")
        name = f"until_{len(self.lines)}"
        self.lines.append(f"{name}[lazy]: ANY {first}")
        return name


def schema_text(schema: Schema) -> str:
    """The schema as JSON for llguidance. Raises ConstraintError."""
    if schema is False:
        raise ConstraintError("the schema is false, which no value is valid under")
    options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    try:
        body = {} if schema is True else enforceable(schema)
        if not isinstance(body, dict):
            return json.dumps(body)  # llguidance says that it is no schema
        return json.dumps({**body, "x-guidance": options}, ensure_ascii=False, allow_nan=False)
    except (RecursionError, ValueError) as error:
        raise ConstraintError(f"the schema is not one that can be read: {error}") from error


def _pattern_text(pattern: str) -> str:
    if not pattern:
        raise ConstraintError("the regular expression is empty; leave it out, or say what it matches")
    return str(regex_to_lark(pattern, "dws"))
