"""The formats in which models write calls and thinking: one record each, found by the text of the chat template.

Sources: the public chat templates of the models that a record names. A template that shows tools in a way that no
record has gets none: its answers stay text. A pattern of a record is matched against a text that may go on, so it must
not depend on what follows its match.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import regex

_NAME = r"[\w.:/-]{1,128}"
_QUOTED = rf'"(?P<name>{_NAME})"'
_OBJECT = rf'\{{\s*"name"\s*:\s*{_QUOTED}\s*,\s*"(?:arguments|parameters)"\s*:\s*'
"""A call as a JSON object, up to its arguments."""


@dataclass(frozen=True)
class CallText:
    """The texts of calls around their arguments: `first`, for each call `before` and `after`, `last`.

    `between` stands between two calls. In `before`, `NAME` stands for the tool's name and `COUNT` for a number. Where
    `last` is the end-of-sequence token of the format, it is left out.
    """

    first: str
    before: str
    after: str
    between: str
    last: str


@dataclass(frozen=True)
class CallFormat:
    """The texts around calls in an answer: `begin`, then for each call `head`, arguments and `tail`, at last `end`.

    Attributes:
        name: of the format, for `/info`.
        signs: texts that a template of this format has, all of them.
        begin: the mark before the calls.
        head: from there, or from the call before, up to the arguments; group `name`, and `id` where the format has ids.
        tail: after the arguments of a call.
        end: the mark after the last call; empty where there is none.
        parameter: where arguments are not JSON but one text for each parameter: up to a value; group `key`.
        value_end: then the mark after a value.
        parameter_text: then the texts before and after a value that is forced, with `KEY` for the parameter's name.
        has_lines: whether a value stands on lines of its own.
        ends_thinking: whether `begin` ends a thinking that is still open.
        ids: "nine" where the template wants ids of nine letters and digits.
        literal: the texts around the arguments of calls that are forced.
    """

    name: str
    signs: tuple[str, ...]
    begin: str
    head: regex.Pattern[str]
    tail: regex.Pattern[str]
    end: str
    parameter: regex.Pattern[str] | None = None
    value_end: str = ""
    parameter_text: tuple[str, str] | None = None
    has_lines: bool = False
    ends_thinking: bool = False
    ids: Literal["any", "nine"] = "any"
    literal: CallText | None = None


HERMES = CallFormat(
    name="hermes",  # Qwen 2.5, Qwen 3, Hermes
    signs=("<tool_call>",),
    begin="<tool_call>",
    head=regex.compile(rf"\s*{_OBJECT}"),
    tail=regex.compile(r"\s*\}"),
    end="</tool_call>",
    literal=CallText(
        "<tool_call>\n", '{"name": "NAME", "arguments": ', "}", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
    ),
)
QWEN_XML = CallFormat(
    name="qwen3-coder",  # Qwen3-Coder, Qwen 3.5
    signs=("<function=", "<parameter="),
    begin="<tool_call>",
    head=regex.compile(rf"\s*<function=(?P<name>{_NAME})>"),
    tail=regex.compile(r"\s*</function>"),
    end="</tool_call>",
    parameter=regex.compile(r"\s*<parameter=(?P<key>[^>\n]{1,256})>"),
    value_end="</parameter>",
    parameter_text=("<parameter=KEY>\n", "\n</parameter>\n"),
    has_lines=True,
    literal=CallText(
        "<tool_call>\n", "<function=NAME>\n", "</function>", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"
    ),
)
GLM = CallFormat(
    name="glm",  # GLM 4.5, 4.6, 4.7
    signs=("<tool_call>", "<arg_key>", "<arg_value>"),
    begin="<tool_call>",
    head=regex.compile(rf"\s*(?P<name>{_NAME})\s*(?=<arg_key>|</tool_call>)"),
    tail=regex.compile(r""),
    end="</tool_call>",
    parameter=regex.compile(r"\s*<arg_key>(?P<key>[^<]{1,256})</arg_key>\s*<arg_value>"),
    value_end="</arg_value>",
    parameter_text=("<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
    literal=CallText("<tool_call>", "NAME\n", "", "</tool_call>\n<tool_call>", "</tool_call>"),
)
MINIMAX = CallFormat(
    name="minimax",  # MiniMax M2
    signs=("<minimax:tool_call>", "<invoke name="),
    begin="<minimax:tool_call>",
    head=regex.compile(rf'\s*<invoke name="?(?P<name>{_NAME})"?>'),
    tail=regex.compile(r"\s*</invoke>"),
    end="</minimax:tool_call>",
    parameter=regex.compile(r'\s*<parameter name="?(?P<key>[^">\n]{1,256})"?>'),
    value_end="</parameter>",
    parameter_text=('<parameter name="KEY">', "</parameter>\n"),
    ends_thinking=True,
    literal=CallText("<minimax:tool_call>\n", '<invoke name="NAME">\n', "</invoke>\n", "", "</minimax:tool_call>"),
)
DEEPSEEK_V31 = CallFormat(
    name="deepseek-v3.1",
    signs=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"),
    begin="<｜tool▁calls▁begin｜>",
    head=regex.compile(rf"\s*<｜tool▁call▁begin｜>\s*(?P<name>{_NAME})<｜tool▁sep｜>\s*"),
    tail=regex.compile(r"\s*<｜tool▁call▁end｜>"),
    end="<｜tool▁calls▁end｜>",
    ends_thinking=True,
    literal=CallText(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "",
        "<｜tool▁calls▁end｜>",
    ),
)
DEEPSEEK_V3 = CallFormat(
    name="deepseek-v3",  # DeepSeek V3, R1
    signs=("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "```json"),
    begin="<｜tool▁calls▁begin｜>",
    head=regex.compile(rf"\s*<｜tool▁call▁begin｜>\s*function<｜tool▁sep｜>(?P<name>{_NAME})\s*```json\s*"),
    tail=regex.compile(r"\s*```\s*<｜tool▁call▁end｜>"),
    end="<｜tool▁calls▁end｜>",
    ends_thinking=True,
    literal=CallText(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        "\n",
        "<｜tool▁calls▁end｜>",
    ),
)
KIMI = CallFormat(
    name="kimi-k2",
    signs=("<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"),
    begin="<|tool_calls_section_begin|>",
    head=regex.compile(
        r"\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[\w./-]{1,128}?)(?::\d{1,6})?)"
        r"\s*<\|tool_call_argument_begin\|>\s*"
    ),
    tail=regex.compile(r"\s*<\|tool_call_end\|>"),
    end="<|tool_calls_section_end|>",
    ends_thinking=True,
    literal=CallText(
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.NAME:COUNT<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "",
        "<|tool_calls_section_end|>",
    ),
)
MISTRAL = CallFormat(
    name="mistral",  # Nemo, Small 3.1: a list of objects; both ways to write calls are read
    signs=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS]",
    head=regex.compile(
        rf"[\s,\[]*(?:{_OBJECT}|(?:\[TOOL_CALLS\])?(?P<name>{_NAME})\s*"
        r"(?:\[CALL_ID\](?P<id>[\w-]{1,64})\s*)?(?:\[ARGS\]\s*|(?=\{)))"
    ),
    tail=regex.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]{0,64}"\s*)?\}'),
    end="]",
    ids="nine",
    literal=CallText("[TOOL_CALLS][", '{"name": "NAME", "arguments": ', "}", ", ", "]"),
)
MISTRAL_ARGS = replace(
    MISTRAL,
    name="mistral-args",  # Small 3.2, Devstral, Ministral 3
    signs=("[TOOL_CALLS]", "[ARGS]"),
    literal=CallText("", "[TOOL_CALLS]NAME[ARGS]", "", "", ""),
)
HARMONY = CallFormat(
    name="harmony",  # gpt-oss; channels of the answer, read by the parser itself
    signs=("<|channel|>", "<|message|>", "<|call|>"),
    begin="<|message|>",
    head=regex.compile(r"(?!)"),
    tail=regex.compile(r"(?!)"),
    end="<|call|>",
    literal=CallText("", "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "", "", ""),
)
FORMATS = (QWEN_XML, GLM, MINIMAX, DEEPSEEK_V3, DEEPSEEK_V31, KIMI, HARMONY, MISTRAL_ARGS, MISTRAL, HERMES)
"""The first whose signs a template has is its format: one whose signs are among another's comes later."""

THINKING_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True)
class AnswerFormat:
    """The way in which a model writes its answers.

    Attributes:
        calls: None where the format of calls is not known.
        thinking: marks around the thinking; None where the template knows none.
        shows_tools: whether the chat template tells the model of tools by itself.
    """

    calls: CallFormat | None
    thinking: tuple[str, str] | None
    shows_tools: bool

    @property
    def calls_name(self) -> str:
        """Name of the format of calls, for `/info`."""
        return "unknown" if self.calls is None else self.calls.name

    @property
    def has_thinking(self) -> bool:
        """Whether the thinking is told apart from the content."""
        return self.thinking is not None or self.calls is HARMONY

    @property
    def marks(self) -> frozenset[str]:
        """Texts that an answer is told apart by, which may be special tokens of the checkpoint."""
        calls = () if self.calls is None else (*self.calls.signs, self.calls.begin, self.calls.end)
        return frozenset(calls) | frozenset(self.thinking or ())


def format_of(template: str) -> AnswerFormat:
    """The format of a chat template. One that knows no tools gets the format that its system prompt is told of."""
    calls = next((each for each in FORMATS if all(sign in template for sign in each.signs)), None)
    thinking = next((pair for pair in THINKING_MARKS if pair[1] in template), None)
    shows_tools = regex.search(r"\btools\b", template) is not None
    return AnswerFormat(
        calls=calls if calls is HARMONY or shows_tools else HERMES,
        thinking=None if calls is HARMONY else thinking,
        shows_tools=shows_tools,
    )


def types_of(schema: Any, root: Mapping[str, Any], depth: int = 8) -> frozenset[str]:
    """JSON types that a schema allows; empty where it does not say. References are followed within `root`."""
    if not isinstance(schema, Mapping) or depth == 0:
        return frozenset()
    declared = schema.get("type")
    if isinstance(declared, str):
        return frozenset([declared])
    if isinstance(declared, list):
        return frozenset(map(str, declared))
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/"):
        found: Any = root
        for part in reference[2:].split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return types_of(found, root, depth - 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            parts = [types_of(choice, root, depth - 1) for choice in choices]
            return frozenset().union(*parts) if all(parts) else frozenset()
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return frozenset(map(_type_of, values)) if isinstance(values, list) else frozenset()


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", type(None): "null"}
    return names.get(type(value), "object")
