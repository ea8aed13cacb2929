"""Answers as models of every format write them, cut at every place: the parts are always the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.chat.formats import FORMATS, HARMONY, HERMES, AnswerFormat, format_of
from server.api.chat.messages import Tool
from server.api.chat.parser import Answer, AnswerParser, Arguments, CallBegin, Delta

WEATHER = Tool(
    "get_weather",
    "Weather of a city.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
            "at": {"anyOf": [{"type": "null"}, {"type": "number"}]},
            "where": {"$ref": "#/$defs/place"},
        },
        "$defs": {"place": {"type": "object"}},
    },
)
TIME = Tool("get-time")
TOOLS = (WEATHER, TIME)
NAMED = {each.name: each for each in FORMATS}


def told(text: str, kind: AnswerFormat, pieces: Sequence[str], *, is_cut: bool = False, **options: Any) -> Answer:
    parser = AnswerParser(kind, options.pop("tools", TOOLS), **options)
    deltas: list[Delta] = [delta for piece in pieces for delta in parser.feed(piece)]
    assert "".join(pieces) == text
    return Answer.of([*deltas, *parser.finish(is_cut=is_cut)])


def parsed(text: str, kind: AnswerFormat, **options: Any) -> tuple[str, str, list[tuple[str, Any]]]:
    """(thinking, content, [(name, arguments)]), the same wherever the text is cut in two, and piece by piece."""
    whole = told(text, kind, [text], **options)
    cuts = [[text[:at], text[at:]] for at in range(1, len(text))]
    for pieces in [list(text), [text[at : at + 3] for at in range(0, len(text), 3)], *cuts]:
        answer = told(text, kind, pieces, **options)
        assert (answer.thinking, answer.content) == (whole.thinking, whole.content), pieces
        assert [(call.name, call.arguments) for call in answer.calls] == [
            (call.name, call.arguments) for call in whole.calls
        ], pieces
    return whole.thinking, whole.content, [(call.name, json.loads(call.arguments)) for call in whole.calls]


def kind_of(name: str, thinking: tuple[str, str] | None = ("<think>", "</think>")) -> AnswerFormat:
    return AnswerFormat(NAMED[name], None if name == "harmony" else thinking, True)


PARIS = {"city": "Paris"}
ANSWERS: list[tuple[str, str, tuple[str, str, list[tuple[str, Any]]]]] = [
    (
        "hermes",
        "<think>\nThe user asks\nfor two.\n</think>\n\nLet me look.\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>',
        ("The user asks\nfor two.", "Let me look.", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "hermes",
        '<tool_call>{"name":"get_weather","arguments":{"city":"a </tool_call> \\"{b\\" é漢🙂\\u00e9"}}</tool_call>\n'
        "Done.",
        ("", "Done.", [("get_weather", {"city": 'a </tool_call> "{b" é漢🙂é'})]),
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "parameters": "{\\"city\\": \\"Paris\\"}"}\n</tool_call>',
        ("", "", [("get_weather", PARIS)]),
    ),
    ("hermes", '<tool_call>\n{"name": "get-time", "arguments": null}\n</tool_call>', ("", "", [("get-time", {})])),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>',
        ("", "", [("get_weather", PARIS)]),
    ),
    (
        "qwen3-coder",
        'I\'ll check.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork "x" <b>\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=units>\nC\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
        '<parameter=at>\nnull\n</parameter>\n<parameter=where>\n{"x": [1, 2]}\n</parameter>\n</function>\n</tool_call>'
        "\n<tool_call>\n<function=get-time>\n</function>\n</tool_call>",
        (
            "",
            "I'll check.",
            [
                (
                    "get_weather",
                    {
                        "city": 'New\nYork "x" <b>',
                        "days": 3,
                        "units": "C",
                        "exact": True,
                        "at": None,
                        "where": {"x": [1, 2]},
                    },
                ),
                ("get-time", {}),
            ],
        ),
    ),
    (
        "glm",
        "\n<think>Weather, then.</think>\nSure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Köln</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get-time\n</tool_call>",
        ("Weather, then.", "Sure.", [("get_weather", {"city": "Köln", "days": 2}), ("get-time", {})]),
    ),
    (
        "minimax",
        'Let me see.\n\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">San José</parameter>\n'
        '<parameter name="at">1.5</parameter>\n</invoke>\n<invoke name="get-time">\n</invoke>\n</minimax:tool_call>',
        ("", "Let me see.", [("get_weather", {"city": "San José", "at": 1.5}), ("get-time", {})]),
    ),
    (
        "deepseek-v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time\n```json\n'
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("", "", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "deepseek-v3.1",
        "On it.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get-time<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        ("", "On it.", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "kimi-k2",
        "<think>So.</think>Looking.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.get-time:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        ("So.", "Looking.", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abc123def"}, '
        '{"name": "get-time", "arguments": {}}]',
        ("", "", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get-time[ARGS]{}',
        ("", "", [("get_weather", PARIS), ("get-time", {})]),
    ),
    (
        "mistral",
        'Checking.[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{"city": "Paris"}',
        ("", "Checking.", [("get_weather", PARIS)]),
    ),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', ("", "", [("get_weather", PARIS)])),
    (
        "harmony",
        "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary<|message|>I look it "
        "up.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris"}<|call|>',
        ("Need weather.", "I look it up.", [("get_weather", PARIS)]),
    ),
    (
        "harmony",
        " to=functions.get-time<|channel|>commentary json<|message|>{}",
        ("", "", [("get-time", {})]),
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is **4**.\n<|return|>",
        ("Easy.", "It is **4**.\n", []),
    ),
]


@pytest.mark.parametrize(("name", "text", "wanted"), ANSWERS, ids=[f"{row[0]}-{at}" for at, row in enumerate(ANSWERS)])
def test_answer_is_told_apart_wherever_it_is_cut(name: str, text: str, wanted: Any) -> None:
    assert parsed(text, kind_of(name)) == wanted


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "Use <tool_call> in XML, a < b, <tool"),
        ("hermes", '<tool_call>\n{"call": "get_weather"}\n</tool_call>'),
        ("hermes", "<tool_call>\nget_weather(Paris)\n</tool_call> "),
        ("glm", "<tool_call>some words here</tool_call>"),
        ("qwen3-coder", "<tool_call>\n<func=x>\n</tool_call>"),
        ("mistral", "[TOOL_CALLS] is a mark"),
        ("kimi-k2", "<|tool_calls_section_begin|>oh"),
        ("harmony", "No channel at all <|x|>"),
    ],
)
def test_text_that_is_no_call_stays_text_with_its_mark(name: str, text: str) -> None:
    assert parsed(text, kind_of(name, None)) == ("", text, [])


@pytest.mark.parametrize("name", sorted(NAMED))
def test_without_tools_calls_stay_text(name: str) -> None:
    text = 'See: <tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n'
    assert parsed(text, kind_of(name, None), tools=()) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "is_thinking", "wanted"),
    [
        ("<think>\na\n\nb\n</think>\n\nc \n", False, ("a\n\nb", "c \n")),
        ("a\n</think>\n\nc", True, ("a", "c")),
        ("a, and then it broke off \n", True, ("a, and then it broke off", "")),
        ("c <think>d</think>", False, ("", "c <think>d</think>")),
        ("<think></think>c", False, ("", "c")),
        ("\n\nc", False, ("", "c")),
        ("</think>c", True, ("", "c")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
    ],
)
def test_thinking_begins_the_answer_and_ends_at_its_mark(text: str, is_thinking: bool, wanted: tuple[str, str]) -> None:
    for tools in ((), TOOLS):
        assert parsed(text, kind_of("hermes"), tools=tools, is_thinking=is_thinking)[:2] == wanted


def test_special_marks_of_calls_end_an_open_thinking() -> None:
    text = "hm<|tool_calls_section_begin|><|tool_call_begin|>get-time:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert parsed(text, kind_of("kimi-k2"), is_thinking=True) == ("hm", "", [("get-time", {})])
    text = '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>'
    assert parsed(text, kind_of("hermes"), is_thinking=True) == (text, "", [])


def test_ids_are_the_formats_own_where_it_has_some() -> None:
    text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.a:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    assert told(text, kind_of("kimi-k2"), [text]).calls[0].call_id == "functions.a:3"
    text = '[TOOL_CALLS] [{"name": "a", "arguments": {}}]'
    call_id = told(text, kind_of("mistral"), [text]).calls[0].call_id
    assert len(call_id) == 9
    assert call_id.isalnum()
    text = '<tool_call>{"name": "a", "arguments": {}}</tool_call>' * 2
    ids = [call.call_id for call in told(text, kind_of("hermes"), [text]).calls]
    assert len(set(ids)) == 2
    assert all(each.startswith("call_") for each in ids)


def test_arguments_are_told_while_they_are_written() -> None:
    parser = AnswerParser(kind_of("hermes"), TOOLS)
    parser.feed('<tool_call>\n{"name": "get_weather", "argum')
    begin, first = parser.feed('ents": {"city": "Par')
    assert isinstance(begin, CallBegin)
    assert first == Arguments(0, '{"city": "Par')
    assert parser.feed("is") == [Arguments(0, "is")]
    parser = AnswerParser(kind_of("qwen3-coder"), TOOLS)
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nPa")
    assert parser.feed('r"') == [Arguments(0, 'r\\"')]


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa', '{"city": "Pa'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": ', ""),
        ("qwen3-coder", "<tool_call><function=get_weather><parameter=city>\nPa", '{"city": "Pa'),
        ("qwen3-coder", "<tool_call><function=get_weather><parameter=days>\n1", '{"days": \n1'),
        ("qwen3-coder", "<tool_call><function=get_weather>", ""),
        ("harmony", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city"', '{"city"'),
    ],
)
def test_arguments_that_broke_off_are_told_as_far_as_they_go(name: str, text: str, arguments: str) -> None:
    for pieces in ([text], list(text)):
        answer = told(text, kind_of(name), pieces, is_cut=True)
        assert [call.name for call in answer.calls] == ["get_weather"]
        assert answer.calls[0].arguments == arguments
        assert answer.content == ""


def test_an_end_mark_that_was_cut_off_closes_the_call() -> None:
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    assert parsed(text, kind_of("qwen3-coder")) == ("", "", [("get_weather", PARIS)])


def test_only_the_first_call_is_told_where_one_is_wanted() -> None:
    text = '<tool_call>{"name": "get-time", "arguments": {}}</tool_call>' * 3
    assert parsed(text, kind_of("hermes"), is_parallel=False) == ("", "", [("get-time", {})])


def test_a_text_parameter_that_reads_like_a_number_stays_a_text() -> None:
    text = (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>123</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>many</arg_value>\n<arg_key>other</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>"
    )
    assert parsed(text, kind_of("glm"))[2] == [("get_weather", {"city": "123", "days": "many", "other": [1]})]


@given(st.data())
def test_any_text_in_any_pieces_gives_the_same_parts(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(NAMED)))
    marks = [
        *NAMED[name].signs,
        NAMED[name].begin,
        NAMED[name].end,
        "<think>",
        "</think>",
        '{"name": "a", "arguments": ',
    ]
    more = [
        "<function=f>",
        "</function>",
        "\n",
        " ",
        "x",
        '{"a": 1}',
        "}",
        '"',
        "<arg_key>k</arg_key>",
        "to=functions.g",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from([*marks, *more]), max_size=12)))
    kind = kind_of(name)
    whole = told(text, kind, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    answer = told(text, kind, pieces)
    assert (answer.thinking, answer.content) == (whole.thinking, whole.content)
    assert [(c.name, c.arguments) for c in answer.calls] == [(c.name, c.arguments) for c in whole.calls]


def test_the_template_tells_the_format() -> None:
    signs = {each.name: " ".join(each.signs) for each in FORMATS}
    for name, text in signs.items():
        found = format_of("{% if tools %}{{ tools }}{% endif %} " + text)
        assert found.calls is NAMED[name], name
        assert found.shows_tools
    assert format_of("{{ messages }}").calls is HERMES
    assert not format_of("{{ messages }}").shows_tools
    assert format_of("{% for tool in tools %}").calls is None
    assert format_of("{% for tool in tools %}").calls_name == "unknown"
    assert format_of("</think>").thinking == ("<think>", "</think>")
    assert format_of(" ".join(HARMONY.signs)).has_thinking
    assert not format_of("{{ messages }}").has_thinking
