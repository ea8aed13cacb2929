"""Forced calls and strict tools as constraints: the texts that they take are read back as calls, others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from server.api.chat.forcing import answer_constraint
from server.api.chat.formats import FORMATS, HERMES, AnswerFormat
from server.api.chat.messages import Chat, Message, Tool, ToolChoice
from server.api.chat.parser import Answer
from server.api.chat.template import Prompt, prompt_of
from server.constraints.compiler import ConstraintCompiler
from server.constraints.grammar import Json, Text
from tests.server.api.scripted import CharTokenizer
from tests.server.api.test_tools import CALLS

NAMED = {each.name: each for each in FORMATS}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Köln"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (Tool("get_weather", parameters=CITY, is_strict=True), Tool("get-time"))
Takes = Callable[[Prompt, str], bool]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def takes(tokenizer: Any) -> Takes:
    """Whether a text is a whole answer to a prompt under its constraint."""
    compiler = ConstraintCompiler(tokenizer, 8192, {0})

    def is_taken(prompt: Prompt, text: str, content: Any = None) -> bool:
        constraint, _ = answer_constraint(prompt, content)
        assert constraint is not None
        state = compiler.compile(constraint).begin()
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not state.allowed_flags()[token]:
                return False
            state.take(token)
        return bool(state.is_complete or state.allowed_flags()[0])

    return is_taken


def prompt(name: str, choice: ToolChoice, *, thinks: bool = False, is_thinking: bool = False) -> Prompt:
    thinking = ("<think>", "</think>") if thinks else None
    chat = Chat((Message("user", "Hi", "messages[0]"),), TOOLS, choice)
    return Prompt([1], AnswerFormat(NAMED[name], thinking, True), is_thinking, False, chat)


TEXTS = {
    "hermes": CALLS.partition("\n")[2],
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get-time<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>",
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.get-time:1'
    "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get-time", "arguments": {}}]',
    "mistral-args": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get-time[ARGS]{}',
    "qwen3-coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
    "</tool_call>\n<tool_call>\n<function=get-time>\n</function>\n</tool_call>",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
    "<tool_call>get-time\n</tool_call>",
    "minimax": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
    '<invoke name="get-time">\n</invoke>\n</minimax:tool_call>',
    "harmony": '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_forced_call_has_the_form_of_the_format_and_is_read_back(name: str, takes: Takes) -> None:
    text = TEXTS[name].replace("get_time", "get-time")
    asked = prompt(name, ToolChoice("required"))
    assert takes(asked, text)
    parser = asked.parser()
    answer = Answer.of([*parser.feed(text), *parser.finish()])
    assert [(call.name, call.arguments) for call in answer.calls] == [
        ("get_weather", '{"city": "Paris"}'),
        ("get-time", "{}"),
    ][: 1 if name == "harmony" else 2]
    assert not takes(asked, text.replace("Paris", "Rome"))
    assert not takes(asked, "Let me look. " + text)
    assert not takes(asked, text.replace("get_weather", "get_rain"))
    assert not takes(asked, "No.")


def test_each_format_can_be_forced() -> None:
    assert {name for name, each in NAMED.items() if each.literal is not None} == set(TEXTS)


@pytest.mark.parametrize("name", ["hermes", "kimi-k2", "qwen3-coder"])
def test_a_tool_may_be_named_as_the_words_of_the_formats_texts(name: str, takes: Takes) -> None:
    tools = (Tool("COUNT_NAME_KEY"),)
    chat = Chat((Message("user", "Hi", "messages[0]"),), tools, ToolChoice("required"))
    asked = Prompt([1], AnswerFormat(NAMED[name], None, True), False, False, chat)
    literal: Any = NAMED[name].literal
    begin, *number = literal.before.split("COUNT")
    before = begin.replace("NAME", "COUNT_NAME_KEY") + "".join("0" + text for text in number)
    arguments = "{}" if NAMED[name].parameter is None else ""
    assert takes(asked, f"{literal.first}{before}{arguments}{literal.after}{literal.last}")


def test_a_named_tool_is_called_once(takes: Takes) -> None:
    call = '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>'
    named = prompt("hermes", ToolChoice("required", "get-time"))
    assert takes(named, call)
    assert not takes(named, f"{call}\n{call}")
    assert not takes(named, call.replace("get-time", "get_weather"))
    alone = prompt("hermes", ToolChoice("required", is_parallel=False))
    assert takes(alone, call)
    assert not takes(alone, f"{call}\n{call}")
    assert takes(prompt("hermes", ToolChoice("required")), f"{call}\n{call}")


PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "of the place"},
        "size": {"$ref": "#/$defs/size"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}},
        "kind": {"const": "city"},
        "open": {"type": ["boolean", "null"]},
    },
    "required": ["name", "kind"],
    "$defs": {"size": {"type": "integer", "minimum": 3}},
}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("qwen3-coder", "<parameter=KEY>\n", "\n</parameter>\n"),
        ("glm", "<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>\n"),
        ("minimax", '<parameter name="KEY">', "</parameter>\n"),
    ],
)
def test_parameters_have_the_types_of_their_schema(name: str, before: str, after: str, takes: Takes) -> None:
    literal: Any = NAMED[name].literal
    chat = Chat((Message("user", "Hi", "messages[0]"),), (Tool("place", parameters=PLACE),), ToolChoice("required"))
    asked = Prompt([1], AnswerFormat(NAMED[name], None, True), False, False, chat)

    def written(**values: str) -> str:
        parameters = "".join(f"{before.replace('KEY', key)}{value}{after}" for key, value in values.items())
        return f"{literal.first}{literal.before.replace('NAME', 'place')}{parameters}{literal.after}{literal.last}"

    text = written(name='New\n"York" <b>', size="12", tags='["a","b"]', kind="city", open="null")
    assert takes(asked, text)
    parser = asked.parser()
    [call] = Answer.of([*parser.feed(text), *parser.finish()]).calls
    assert json.loads(call.arguments) == {
        "name": 'New\n"York" <b>',
        "size": 12,
        "tags": ["a", "b"],
        "kind": "city",
        "open": None,
    }
    assert takes(asked, written(name="x", kind="city"))
    for wrong in (
        {"name": "x"},
        {"name": "x", "size": "2", "kind": "city"},
        {"name": "x", "kind": "town"},
        {"name": "x", "tags": '["too long"]', "kind": "city"},
        {"name": "x", "kind": "city", "open": "yes"},
    ):
        assert not takes(asked, written(**wrong)), wrong


@pytest.mark.parametrize(
    ("template", "parameters"),
    [
        ("", {"type": "object", "properties": {}}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {}}}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {"type": ["string", "null"]}}}),
        ("<function= <parameter=", {"type": "object", "properties": {}, "required": ["a"]}),
        ("<function= <parameter=", {"type": "object", "properties": {}, "required": 5}),
        ("<function= <parameter=", {"type": "object", "properties": {}, "required": [["a"]]}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {"type": "string", "enum": ["b", 1]}}}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {"type": "string", "enum": 5}}}),
        ("<function= <parameter=", {"type": "object", "properties": {"a": {"type": "string", "const": 5}}}),
        ("<function= <parameter=", {"type": "object", "anyOf": [{}]}),
    ],
)
def test_schemas_that_a_format_cannot_say_are_forced_in_the_plain_one(
    template: str, parameters: dict[str, Any]
) -> None:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = (
        f"{{# {template} #}}{{% for t in tools %}}{{{{ t }}}}{{% endfor %}}{{{{ messages[0].content }}}}"
    )
    tools = (Tool("f", parameters=parameters),)
    chat = Chat((Message("user", "Hi", "messages[0]"),), tools, ToolChoice("required"))
    assert prompt_of(tokenizer, chat).answer_format.calls is HERMES


def test_the_thinking_before_a_forced_call_is_free(takes: Takes) -> None:
    call = '<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>'
    inside = prompt("hermes", ToolChoice("required"), thinks=True, is_thinking=True)
    assert takes(inside, f"What <tool_call> is it?\n</think>\n\n{call}")
    assert not takes(inside, call)
    before = prompt("hermes", ToolChoice("required"), thinks=True)
    assert takes(before, call)
    assert takes(before, f"<think>So.</think>{call}")
    assert not takes(before, f"So.</think>{call}")
    harmony = prompt("harmony", ToolChoice("required"))
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert takes(harmony, thought + TEXTS["harmony"])


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"harmony"}))
def test_strict_tools_leave_the_text_free_up_to_a_call(name: str, takes: Takes) -> None:
    asked = prompt(name, ToolChoice("auto"))
    text = TEXTS[name].replace("get_time", "get-time")
    for free in ("Hello, how are you?", f"Let me look.\n{text}", f"{text}\nDone.", ""):
        assert takes(asked, free), free
    assert not takes(asked, f"Let me look.\n{text.replace('Paris', 'Rome')}")
    assert not takes(asked, f"I write {asked.answer_format.calls and asked.answer_format.calls.begin} for no call.")


def test_strict_tools_of_harmony_have_their_channel(takes: Takes) -> None:
    asked = prompt("harmony", ToolChoice("auto"))
    assert takes(asked, TEXTS["harmony"])
    assert takes(asked, "<|channel|>final<|message|>Hello.")
    assert not takes(asked, TEXTS["harmony"].replace("Paris", "Rome"))


def test_only_strict_tools_keep_to_their_schema_where_no_call_is_forced(takes: Takes) -> None:
    chat = Chat((Message("user", "Hi", "messages[0]"),), (*TOOLS, Tool("loose", parameters=CITY)))
    asked = Prompt([1], AnswerFormat(HERMES, None, True), False, False, chat)
    call = '<tool_call>\n{"name": "NAME", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert takes(asked, call.replace("NAME", "loose"))
    assert not takes(asked, call.replace("NAME", "get_weather"))


def test_without_strict_tools_nothing_is_constrained() -> None:
    chat = Chat((Message("user", "Hi", "messages[0]"),), (Tool("get-time"),))
    plain = Prompt([1], AnswerFormat(HERMES, None, True), False, False, chat)
    assert answer_constraint(plain, None)[0] is None


def test_beside_tools_the_model_chooses_between_content_and_calls(takes: Any) -> None:
    asked = prompt("hermes", ToolChoice("auto"))
    content = Json({"enum": ["yes"]})
    assert takes(asked, '"yes"', content)
    assert takes(asked, TEXTS["hermes"].replace("get_time", "get-time"), content)
    assert not takes(asked, "yes", content)


@pytest.mark.parametrize(
    ("is_thinking", "taken", "refused"),
    [
        (True, ["so it is</think>\n\nyes", "</think>yes"], ["yes", "so</think> or not"]),
        (False, ["yes", "<think>so it is</think>\n\nyes"], ["so it is</think>yes", "<think>yes"]),
    ],
)
def test_a_constraint_on_the_content_leaves_the_thinking_free(
    is_thinking: bool, taken: list[str], refused: list[str], takes: Any
) -> None:
    chat = Chat((Message("user", "Hi", "messages[0]"),))
    asked = Prompt([1], AnswerFormat(None, ("<think>", "</think>"), False), is_thinking, False, chat)
    assert [takes(asked, text, Text("yes")) for text in taken + refused] == [True, True, False, False]
