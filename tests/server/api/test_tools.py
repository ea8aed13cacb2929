"""Calls of tools and thinking in `/v1/chat/completions`, with the unmodified `openai` client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.server.api.running import Running, running, wait_until
from tests.server.api.scripted import CharTokenizer, ScriptedEngine, loaded

CHAT: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
THINKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant><think>\n{# </think> #}"
CALLS = (
    'I look it up.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)


def pieces(text: str, length: int = 3) -> list[str | bytes]:
    return [text[at : at + length] for at in range(0, len(text), length)]


@contextmanager
def serving(answer: str, template: str | None = None) -> Iterator[tuple[openai.OpenAI, Running]]:
    engine = ScriptedEngine(answer=pieces(answer), max_context=4000)
    tokenizer = CharTokenizer()
    if template is not None:
        tokenizer.chat_template = template
    with running(engine, load=lambda progress: loaded(engine, tokenizer=tokenizer, max_context_tokens=4000)) as server:
        wait_until(lambda: server.service.loaded is not None)
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=10) as client:
            yield client, server


def test_calls_are_told_beside_the_content() -> None:
    with serving(CALLS) as (client, _):
        choice = client.chat.completions.create(model="x", messages=CHAT, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look it up."
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "get_weather", {"city": "Paris"}),
        ("function", "get_time", {}),
    ]
    assert len({call.id for call in calls}) == 2


def test_a_stream_tells_arguments_piece_by_piece() -> None:
    with serving(CALLS) as (client, _):
        stream = client.chat.completions.create(model="x", messages=CHAT, tools=TOOLS, stream=True)
        choices = [chunk.choices[0] for chunk in stream]
    assert choices[-1].finish_reason == "tool_calls"
    assert "".join(choice.delta.content or "" for choice in choices) == "I look it up."
    deltas = [delta for choice in choices for delta in choice.delta.tool_calls or []]
    first = [delta for delta in deltas if delta.id is not None]
    assert [(delta.index, delta.type, delta.function and delta.function.name) for delta in first] == [
        (0, "function", "get_weather"),
        (1, "function", "get_time"),
    ]
    arguments = [delta.function.arguments or "" for delta in deltas if delta.index == 0 and delta.function]
    assert "".join(arguments) == '{"city": "Paris"}'


def test_the_clients_own_accumulation_of_a_stream_has_the_calls() -> None:
    with serving(CALLS) as (client, _):
        with client.chat.completions.stream(model="x", messages=CHAT, tools=TOOLS) as stream:
            for _event in stream:
                pass
            message = stream.get_final_completion().choices[0].message
    calls: Any = message.tool_calls
    assert [call.function.arguments for call in calls] == ['{"city": "Paris"}', "{}"]


def test_an_answer_with_calls_is_taken_back_with_their_results() -> None:
    with serving(CALLS) as (client, server):
        message = client.chat.completions.create(model="x", messages=CHAT, tools=TOOLS).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "7 °C"} for call in message.tool_calls or []]
        for sent in (message, message.model_dump()):
            history: list[Any] = [*CHAT, sent, *results]
            client.chat.completions.create(model="x", messages=history, tools=TOOLS)
            prompt = "".join(map(chr, server.engine.submitted[-1].prompt_ids))
            assert prompt.endswith(
                f"<assistant>{CALLS}\n<user><tool_response>\n7 °C\n</tool_response>\n<tool_response>\n7 °C\n"
                "</tool_response>\n<assistant>"
            )


def test_without_tools_an_answer_is_text_as_it_is() -> None:
    with serving(CALLS) as (client, server):
        for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = client.chat.completions.create(model="x", messages=CHAT, **more).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")
            prompt = "".join(map(chr, server.engine.submitted[-1].prompt_ids))
            assert prompt == "<user>Weather in Paris?\n<assistant>"


def test_one_call_alone_is_told_if_asked_for() -> None:
    with serving(CALLS) as (client, _):
        asked: dict[str, Any] = {"model": "x", "messages": CHAT, "tools": TOOLS, "parallel_tool_calls": False}
        message = client.chat.completions.create(**asked).choices[0].message
        assert len(message.tool_calls or []) == 1
        deltas = [
            d
            for chunk in client.chat.completions.create(**asked, stream=True)
            for d in chunk.choices[0].delta.tool_calls or []
        ]
        assert {delta.index for delta in deltas} == {0}


def test_arguments_that_broke_off_have_the_reason_length() -> None:
    with serving(CALLS) as (client, _):
        asked: dict[str, Any] = {"model": "x", "messages": CHAT, "tools": TOOLS, "max_tokens": 24}
        choice = client.chat.completions.create(**asked).choices[0]
        calls: Any = choice.message.tool_calls
        assert (choice.finish_reason, calls[0].function.arguments) == ("length", '{"city": ')


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_thinking_is_told_apart_and_counted(tools: Any) -> None:
    more: dict[str, Any] = {} if tools is None else {"tools": tools}
    with serving("It may rain.\n</think>\n\nRain.", THINKS) as (client, server):
        answer = client.chat.completions.create(model="x", messages=CHAT, **more)
        message = answer.choices[0].message
        assert message.content == "Rain."
        assert message.model_extra is not None
        assert message.model_extra["reasoning_content"] == "It may rain."
        details: Any = answer.usage and answer.usage.completion_tokens_details
        assert details.reasoning_tokens == 7
        stream = client.chat.completions.create(
            model="x", messages=CHAT, stream=True, stream_options={"include_usage": True}, **more
        )
        chunks = list(stream)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas) == "It may rain."
        assert "".join(delta.content or "" for delta in deltas) == "Rain."
        usage: Any = chunks[-1].usage
        assert usage.completion_tokens_details.reasoning_tokens == 7
        history: list[Any] = [*CHAT, message.model_dump(), {"role": "user", "content": "And then?"}]
        assert client.chat.completions.create(model="x", messages=history).choices[0].message.content == "Rain."
        with server.client() as plain:
            info = plain.get("/info").json()
        assert (info["tool_calls"], info["has_thinking"]) == ("hermes", True)


def test_cache_control_of_a_tool_is_taken_and_not_kept() -> None:
    marked: Any = [{**TOOLS[0], "cache_control": {"type": "ephemeral"}}]
    with serving(CALLS) as (client, server):
        for tools in (TOOLS[:1], marked):
            client.chat.completions.create(model="x", messages=CHAT, tools=tools)
        plain, same = (request.prompt_ids for request in server.engine.submitted)
    assert plain == same


def test_thinking_is_sent_back_by_either_name_and_switched_off_by_the_effort() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    with serving("Rain.", template) as (client, server):
        for name in ("reasoning", "reasoning_content"):
            answer: Any = {"role": "assistant", "content": "Rain.", name: "Clouds."}
            client.chat.completions.create(model="x", messages=[answer, *CHAT])
            assert "Clouds.Rain." in "".join(map(chr, server.engine.submitted[-1].prompt_ids))
    switch = THINKS + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    with serving("Rain.", switch) as (client, server):
        client.chat.completions.create(model="x", messages=CHAT, reasoning_effort="none")
        assert "".join(map(chr, server.engine.submitted[-1].prompt_ids)).endswith("</think>")
    for template, effort in ((switch, "low"), (THINKS, "none")):
        with serving("Rain.", template) as (client, _), pytest.raises(openai.BadRequestError, match="reasoning_effort"):
            client.chat.completions.create(model="x", messages=CHAT, reasoning_effort=effort)  # type: ignore[arg-type]


def test_a_template_with_an_unknown_format_leaves_calls_in_the_text() -> None:
    template = "{% for t in tools %}{{ t }}{% endfor %}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with serving(CALLS, template) as (client, server):
        choice = client.chat.completions.create(model="x", messages=CHAT, tools=TOOLS).choices[0]
        assert (choice.message.content, choice.finish_reason) == (CALLS, "stop")
        with server.client() as plain:
            assert plain.get("/info").json()["tool_calls"] == "unknown"
