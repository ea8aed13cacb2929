"""Messages through chat templates of every habit: no text is lost, and a refusal says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from server.api.chat.messages import Chat, Tool
from server.api.chat.template import prompt_of
from server.api.http.errors import ValidationFailed
from server.api.openai.schemas import ChatRequest
from tests.server.api.scripted import CharTokenizer, ScriptedEngine, loaded

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
NAMED_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif m.role == 'assistant' %}A:"
    "{{ m.content }}\n{% elif m.role == 'system' %}S:{{ m.content }}\n{% endif %}{% endfor %}A:"
)
KNOWS_DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'developer' %}D{% else %}{{ m.role[0] }}{% endif %}:"
    "{{ m.content }}\n{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role[0] }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
PARTS_THAT_FAIL_ON_TEXT = (
    "{% for m in messages %}{{ m.role[0] }}:{% for part in m.content %}{{ part['text'].strip() }}{% endfor %}{{ '\n' }}"
    "{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}s:{{ m.content }}{% else %}p:{{ m.content[0].text }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
TRIMMED = "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m.content | tojson }}\n{% endfor %}"
LAST_ONLY = "{{ messages[-1].content }}"
SHORTENED = "{% for m in messages %}{{ m.content[:20] }}\n{% endfor %}"
NO_THINKING = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{{ m.content }}\n{% endfor %}"
)
NAMES = "{% for m in messages %}{{ m.name or m.role }}:{{ m.content }}\n{% endfor %}"
EFFORT = "effort {{ reasoning_effort }}{% for m in messages %} {{ m.content }}{% endfor %}"


def rendered(template: str | dict[str, str], *messages: dict[str, Any], **more: Any) -> str:
    """The prompt of a chat, as text."""
    tokenizer = CharTokenizer()
    tokenizer.chat_template = template
    body = ChatRequest.model_validate({"messages": list(messages), **more}, strict=True)
    return "".join(map(chr, prompt_of(tokenizer, body.chat()).ids))


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHATML, "<system>Be short.\n<user>Hi\n<assistant>"),
        (NAMED_ROLES, "S:Be short.\nU:Hi\nA:"),
        (KNOWS_DEVELOPER, "D:Be short.\nu:Hi\n"),
        (PARTS_ONLY, "s:Be short.\nu:Hi\n"),
    ],
)
def test_developer_is_read_as_system_where_the_template_does_not_know_it(template: str, prompt: str) -> None:
    assert rendered(template, said("Be short.", "developer"), said("Hi")) == prompt


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHATML, "<user>Hi there\n<assistant>"),
        (PARTS_ONLY, "u:Hi there\n"),
        (PARTS_THAT_FAIL_ON_TEXT, "u:Hi there\n"),
        (EITHER, "s:Hi there\n"),
    ],
)
@pytest.mark.parametrize(
    "content", ["Hi there", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", "cache_control": None}]]
)
def test_content_has_the_form_that_the_template_takes(template: str, prompt: str, content: Any) -> None:
    assert rendered(template, said(content)) == prompt


def test_text_that_the_template_changes_in_form_alone_is_not_lost() -> None:
    assert rendered(TRIMMED, said("  two\n\nlines \n")) == "two\n\nlines\n"
    assert rendered(AS_JSON, said('a "quoted"\nline')) == '"a \\"quoted\\"\\nline"\n'
    assert rendered(NO_THINKING, said("a"), said("<think>so</think>b", "assistant"), said("c")) == "u:a\na:b\nu:c\n"


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (LAST_ONLY, [said("a"), said("b", "assistant"), said("a")], 0),
        (NAMED_ROLES.replace("== 'system'", "== 'none'"), [said("U", "system"), said("Hi")], 0),
        (SHORTENED, [said("Hi"), said("x" * 21)], 1),
        ("fixed", [said("f")], 0),
    ],
)
def test_lost_text_is_refused_with_that_reason(template: str, messages: list[dict[str, Any]], lost: int) -> None:
    with pytest.raises(ValidationFailed, match="does not show the text of this message") as refusal:
        rendered(template, *messages)
    assert refusal.value.param == f"messages[{lost}].content"


def test_assistants_answer_is_taken_back_as_the_clients_dump_it() -> None:
    dumped = {
        "content": "Paris",
        "refusal": None,
        "role": "assistant",
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    for change in ({}, {"tool_calls": []}, {"annotations": []}, {"name": "bot"}, {"parsed": None}):
        assert rendered(CHATML, said("a"), {**dumped, **change}) == "<user>a\n<assistant>Paris\n<assistant>"
    assert rendered(CHATML, said("a"), {**dumped, "content": None}, said("b")) == (
        "<user>a\n<assistant>\n<user>b\n<assistant>"
    )
    assert rendered(CHATML, {**dumped, "content": None, "refusal": "No."}) == "<assistant>No.\n<assistant>"
    refusal = [{"type": "refusal", "refusal": "No."}]
    assert rendered(CHATML, {**dumped, "content": refusal}) == "<assistant>No.\n<assistant>"


@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_only_an_assistants_content_may_be_null(role: str) -> None:
    with pytest.raises(ValidationFailed, match="only an assistant's may be") as refusal:
        rendered(CHATML, said(None, role))
    assert refusal.value.param == "messages[0].content"


def test_variables_reach_the_template() -> None:
    assert rendered(NO_THINKING, said("a")) == "u:a\n"
    off = {"enable_thinking": False}
    assert rendered(NO_THINKING, said("a"), chat_template_kwargs=off) == "u:a\n<think></think>"
    assert rendered(CHATML, said("a"), chat_template_kwargs=off) == "<user>a\n<assistant>"
    assert rendered(EFFORT, said("a"), reasoning_effort="low") == "effort low a"
    assert rendered(NAMES, said("a", name="Ann"), said("b")) == "Ann:a\nuser:b\n"


def test_a_template_says_in_its_own_words_why_it_refuses() -> None:
    with pytest.raises(ValidationFailed, match="roles must alternate user/assistant"):
        rendered(ALTERNATE, said("a"), said("b"))
    with pytest.raises(ValidationFailed, match="an error in line 1, whatever the messages are"):
        rendered("{% for m in messages %}", said("a"))
    with pytest.raises(ValidationFailed, match="their roles or their order") as refusal:
        rendered("{{ raise_exception(messages[0].content) }}", said("do-not-echo-me"))
    assert "do-not-echo-me" not in str(refusal.value)


def test_of_several_templates_the_default_is_taken() -> None:
    assert rendered({"default": CHATML, "tool_use": "x"}, said("a")) == "<user>a\n<assistant>"


TOOL = Tool("get_weather", "Weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
CALLED = [
    said("Weather?"),
    said(None, "assistant", tool_calls=[CALL]),
    said("Rain, 7 °C", "tool", tool_call_id="call_1"),
]
OBJECTS = (  # as Qwen's, GLM's and MiniMax's: arguments are objects
    "{% for tool in tools %}T:{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for call in m.tool_calls %}"
    "<tool_call>{{ call.function.name }}{% for key, value in call.function.arguments.items() %}"
    "<arg_key>{{ key }}</arg_key><arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{{ '\n' }}{% endfor %}"
)
TEXTS = (  # as DeepSeek's: arguments are texts, and the content beside calls is none
    "{% for tool in tools or [] %}{{ tool }}{% endfor %}"
    "{% for m in messages %}{% if m.tool_calls and m.content is none %}{% for call in m.tool_calls %}"
    "{{ 'C:' + call.function.name + call.function.arguments }}{% endfor %}{{ '\n' }}"
    "{% else %}{{ m.role[0] + ':' + m.content }}\n{% endif %}{% endfor %}"
)
NINE = (  # as Mistral's
    "{% if tools %}[TOOL_CALLS]{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids of 9') }}{% endif %}{{ call | tojson }}{% endfor %}"
    "{{ m.tool_call_id }}\n{% endfor %}"
)
NO_CALLS = (
    "{% for tool in tools %}{{ tool }}{% endfor %}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
)
ENABLES_THINKING = (
    "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}\n{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>\n{% endif %}"
)


def with_tools(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    tool = {"type": "function", "function": {"name": TOOL.name, "description": TOOL.description, "parameters": {}}}
    return rendered(template, *messages, tools=[tool], **more)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (
            OBJECTS,
            "T:get_weather\nu:Weather?\na:<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
            "</tool_call>\nt:Rain, 7 °C\n",
        ),
        (TEXTS, 'u:Weather?\nC:get_weather{"city": "Paris"}\nt:Rain, 7 °C\n'),
    ],
)
def test_calls_have_the_form_that_the_template_takes(template: str, prompt: str) -> None:
    assert with_tools(template, CALLED).endswith(prompt)


def test_arguments_that_nest_too_deep_to_be_read_stay_text() -> None:
    arguments = "[" * 100_000
    call = {**CALL, "function": {"name": "get_weather", "arguments": arguments}}
    assert f"C:get_weather{arguments}\n" in with_tools(TEXTS, [CALLED[0], said(None, "assistant", tool_calls=[call])])


def test_ids_are_made_to_fit_a_template_that_wants_nine_letters() -> None:
    prompt = with_tools(NINE, CALLED)
    own = prompt.rpartition("Rain, 7 °C")[2].strip()
    assert len(own) == 9
    assert f'"id": "{own}"' in prompt
    own = [CALLED[0], said(None, "assistant", tool_calls=[{**CALL, "id": "abc123def"}])]
    assert '"id": "abc123def"' in with_tools(NINE, own)


def test_calls_that_the_template_does_not_show_are_refused() -> None:
    with pytest.raises(ValidationFailed, match="does not show the text of this message") as refusal:
        with_tools(NO_CALLS, CALLED)
    assert refusal.value.param == "messages[1].tool_calls"


def test_a_template_that_knows_no_tools_has_them_in_the_system_prompt() -> None:
    prompt = with_tools(CHATML, [said("Be short.", "system"), *CALLED])
    system, rest = prompt.split("\n<user>", 1)
    assert system.startswith("<system>Be short.\n\n# Tools\n")
    assert '"name": "get_weather"' in system
    assert rest == (
        'Weather?\n<assistant><tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        "<user><tool_response>\nRain, 7 °C\n</tool_response>\n<assistant>"
    )
    assert with_tools(CHATML, CALLED).startswith("<system># Tools\n")
    results = [*CALLED, said("Sun", "tool", tool_call_id="call_2")]
    assert with_tools(CHATML, results).endswith(
        "<user><tool_response>\nRain, 7 °C\n</tool_response>\n<tool_response>\nSun\n</tool_response>\n<assistant>"
    )
    assert with_tools(CHATML, [said("Hi")], tool_choice="none") == "<user>Hi\n<assistant>"
    without_system = NAMED_ROLES.replace("== 'system'", "== 'none'")
    with pytest.raises(ValidationFailed) as refusal:
        with_tools(without_system, [said("Hi")])
    assert refusal.value.param == "tools.content"


def test_prompt_says_whether_it_ends_inside_the_thinking() -> None:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = ENABLES_THINKING
    for variables, is_thinking in (({}, True), ({"enable_thinking": False}, False)):
        body = ChatRequest.model_validate(
            {"messages": [said("a"), said("b", "assistant", reasoning_content="hm")], "chat_template_kwargs": variables}
        )
        prompt = prompt_of(tokenizer, body.chat())
        assert prompt.is_thinking == is_thinking
        assert "hmb\n" in "".join(map(chr, prompt.ids))


@pytest.mark.parametrize(("marks", "skips"), [((), None), (("<think>", "</think>"), False)])
def test_special_tokens_stay_in_the_text_where_they_tell_its_parts_apart(marks: Any, skips: bool | None) -> None:
    tokenizer = CharTokenizer()
    tokenizer.all_special_tokens = ("<|end|>", *marks)
    tokenizer.chat_template = ENABLES_THINKING
    body = ChatRequest.model_validate({"messages": [said("a")]})
    model = loaded(ScriptedEngine(), tokenizer=tokenizer)
    sampling = prompt_of(tokenizer, body.chat()).sampling(model, body, max_tokens=9, temperature=0)
    assert (sampling.skip_special_tokens, sampling.max_new_tokens) == (skips, 9)


ECHOES = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ m.tool_call_id or '' }}{{ eos_token }}\n"
    "{% endfor %}"
)


def called(arguments: str) -> list[dict[str, Any]]:
    """A call of a tool in an assistant's message."""
    return [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}]


@pytest.mark.parametrize(
    "where",
    [
        lambda text: {"messages": [said(f"a{text}b {text}")]},
        lambda text: {"messages": [said(f"a{text}b {text} " * 50), said(text, "assistant"), said(f"x{text}")]},
        lambda text: {"messages": [said([{"type": "text", "text": text}, {"type": "text", "text": " c"}])]},
        lambda text: {"messages": [said("x"), said(f"y {text}", "assistant"), said("z")]},
        lambda text: {"messages": [said("x"), said("", "assistant", tool_calls=called(json.dumps({"k": text})))]},
        lambda text: {
            "messages": [said("x"), said("", "assistant", tool_calls=called(json.dumps({"k": "%"}).replace("%", text)))]
        },
        lambda text: {
            "messages": [said("x")],
            "tools": [{"type": "function", "function": {"name": "f", "description": text}}],
        },
    ],
    ids=["content", "many", "parts", "history", "arguments", "escaped", "tool"],
)
def test_the_text_of_a_special_token_stays_text(tiny_checkpoint: Path, where: Any, request: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = ECHOES
    text = tokenizer.eos_token
    given = text.replace("<", r"\u003c") if "escaped" in request.node.name else text
    body, plain = (
        ChatRequest.model_validate(where(value), strict=True).chat() for value in (given, text.replace("<", "("))
    )
    ids = prompt_of(tokenizer, body).ids
    assert tokenizer.decode(ids).replace("<", "(") == tokenizer.decode(prompt_of(tokenizer, plain).ids).replace(
        "<", "("
    )
    assert ids.count(tokenizer.eos_token_id) == len(body.messages), "those of the template alone"


def with_call(arguments: str) -> Chat:
    """A chat whose last message is a call with these arguments."""
    messages = [said("x"), said("", "assistant", tool_calls=called(arguments))]
    return ChatRequest.model_validate({"messages": messages}, strict=True).chat()


@pytest.mark.parametrize("shown", ["call", "call | tojson(ensure_ascii=True)"], ids=["python", "ascii"])
def test_no_mark_is_left_by_a_template_that_escapes(tiny_checkpoint: Path, shown: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = ECHOES.replace("call | tojson", shown)
    ids = prompt_of(tokenizer, with_call(json.dumps({"k": f"a{tokenizer.eos_token}b"}))).ids
    assert f"a{tokenizer.eos_token}b" in tokenizer.decode(ids)
    assert ids.count(tokenizer.eos_token_id) == 2, "those of the template alone"


def test_half_a_character_in_arguments_stays_an_escape(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = ECHOES.replace("call | tojson", "call.function.arguments")
    arguments = r'{"k": "\ud800"}'
    assert arguments in tokenizer.decode(prompt_of(tokenizer, with_call(arguments)).ids)
