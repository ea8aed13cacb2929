"""Messages through chat templates of every habit: no text is lost, and a refusal says why."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.http.errors import ValidationFailed
from server.api.openai.chat import chat_ids
from server.api.openai.schemas import ChatRequest
from tests.server.api.scripted import CharTokenizer

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
    return "".join(map(chr, chat_ids(tokenizer, body)))


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
