"""Anthropic's dialect with the unmodified `anthropic` client, and by hand where the client would not send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest

from server.api.anthropic.responses import SIGNATURE
from server.api.http.errors import AnthropicErrorResponse
from tests.server.api.running import Running, running, wait_until
from tests.server.api.scripted import NUM_CACHED, ScriptedEngine
from tests.server.api.test_tools import CALLS, THINKS, pieces, serving

CHAT: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "Weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    {"name": "get_time", "input_schema": {"type": "object"}},
]
TEXT = " Paris, the city of light."
ASKED: dict[str, Any] = {"model": "x", "max_tokens": 1000, "messages": CHAT}


@contextmanager
def client_of(server: Running, key: str = "none") -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=10) as client:
        yield client


@contextmanager
def answering(answer: str, template: str | None = None) -> Iterator[tuple[anthropic.Anthropic, Running]]:
    with serving(answer, template) as (_, server), client_of(server) as client:
        yield client, server


def prompt_of(server: Running) -> str:
    return "".join(map(chr, server.engine.submitted[-1].prompt_ids))


def test_message() -> None:
    with running() as server, client_of(server) as client:
        answer = client.messages.create(
            **{**ASKED, "max_tokens": 50}, system="Be short.", extra_body={"temperature": 0}, stop_sequences=[" light"]
        )
        assert answer.content[0].to_dict() == {"type": "text", "text": " Paris, the city of"}
        assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "stop_sequence", " light")
        assert answer.model == "scripted"
        assert prompt_of(server) == "<system>Be short.\n<user>Weather in Paris?\n<assistant>"
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt_of(server)) - NUM_CACHED, 6)
        assert answer.usage.cache_read_input_tokens == NUM_CACHED
        sampling = server.engine.submitted[-1].sampling
        assert (sampling.is_greedy, sampling.max_new_tokens) == (True, 50)
        assert answer.model_extra is not None
        assert answer.model_extra["deficit"]["overall"] == 0.125


def test_answers_errors_and_models_have_what_the_client_reads() -> None:
    with running() as server, client_of(server) as client:
        answer = client.messages.create(**ASKED)
        assert answer._request_id is not None
        assert answer.usage.cache_creation_input_tokens == 0
        with client.messages.stream(**ASKED) as stream:
            assert stream.get_final_message().usage.cache_creation_input_tokens == 0
            assert stream.response.headers["request-id"] == stream.response.headers["x-request-id"]
        with pytest.raises(anthropic.BadRequestError) as refusal:
            client.messages.create(**{**ASKED, "messages": []})
        assert refusal.value.request_id is not None
        assert refusal.value.body["request_id"] == refusal.value.request_id  # type: ignore[index, call-overload]
        page = client.models.list()
        assert [(model.id, model.type, model.display_name) for model in page] == [("scripted", "model", "scripted")]
        assert abs(page.data[0].created_at.timestamp() - server.service.started_at) < 1
        assert (page.has_more, page.first_id, page.last_id) == (False, "scripted", "scripted")


def test_end_has_the_reason_of_the_end() -> None:
    with running() as server, client_of(server) as client:
        assert client.messages.create(**{**ASKED, "max_tokens": 2}).stop_reason == "max_tokens"
        assert client.messages.create(**ASKED).stop_reason == "end_turn"


def test_system_and_messages_may_be_blocks() -> None:
    with running() as server, client_of(server) as client:
        cached: Any = {"type": "ephemeral"}
        client.messages.create(
            model="x",
            max_tokens=10,
            system=[
                {"type": "text", "text": "Be short."},
                {"type": "text", "text": "Be kind.", "cache_control": cached},
            ],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": cached}]},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            ],
            metadata={"user_id": "u"},
        )
        assert (
            prompt_of(server) == "<system>Be short.\n\nBe kind.\n<user>Hi\n<assistant>Yes?\n<user>a\n\nb\n<assistant>"
        )


def test_events_of_a_stream_have_their_names_and_order() -> None:
    with running(ScriptedEngine(answer=pieces(CALLS))) as server, server.client() as client:
        body = {"max_tokens": 1, "messages": CHAT, "stream": True}
        lines = client.post("/v1/messages", json=body).text.split("\n\n")
        events = [line.split("\n") for line in lines if line]
        names = [name.removeprefix("event: ") for name, _ in events]
        payloads = [json.loads(data.removeprefix("data: ")) for _, data in events]
        assert names == [payload["type"] for payload in payloads]
        assert names == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]


def test_the_clients_own_accumulation_of_a_stream_is_the_whole_answer() -> None:
    for answer, template, kinds in (
        (CALLS, None, ["text", "tool_use", "tool_use"]),
        ("It may rain.\n</think>\n\n" + CALLS, THINKS, ["thinking", "text", "tool_use", "tool_use"]),
    ):
        with answering(answer, template) as (client, _):
            whole = client.messages.create(**ASKED, tools=TOOLS)
            with client.messages.stream(**ASKED, tools=TOOLS) as stream:
                texts = "".join(stream.text_stream)
                final = stream.get_final_message()
        assert texts == "I look it up."
        assert [block.type for block in whole.content] == kinds
        shown = [[block.to_dict() for block in each.content] for each in (whole, final)]
        for block in [*shown[0], *shown[1]]:
            block.pop("id", None)
        assert shown[0] == shown[1]
        assert shown[0][-2:] == [
            {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
            {"type": "tool_use", "name": "get_time", "input": {}},
        ]
        assert (whole.stop_reason, final.stop_reason) == ("tool_use", "tool_use")
        assert final.usage.output_tokens == whole.usage.output_tokens > 0
        assert final.usage.input_tokens == whole.usage.input_tokens > 0
        assert final.usage.cache_read_input_tokens == NUM_CACHED


def test_thinking_is_told_taken_back_and_counted() -> None:
    with answering("It may rain.\n</think>\n\nRain.", THINKS) as (client, server):
        answer = client.messages.create(**ASKED, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [block.to_dict() for block in answer.content] == [
            {"type": "thinking", "thinking": "It may rain.", "signature": SIGNATURE},
            {"type": "text", "text": "Rain."},
        ]
        details: Any = answer.usage.output_tokens_details
        assert details.thinking_tokens == 7
        messages: Any = [*CHAT, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "So?"}]
        client.messages.create(model="x", max_tokens=10, messages=messages)
        assert "<assistant>Rain.\n<user>So?" in prompt_of(server)


def test_thinking_is_switched_where_the_template_has_a_switch() -> None:
    template = THINKS + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    with answering("Rain.", template) as (client, server):
        for kind, is_on in (({"type": "disabled"}, False), ({"type": "adaptive"}, True)):
            thinking: Any = kind
            client.messages.create(**ASKED, thinking=thinking)
            assert prompt_of(server).endswith("</think>") != is_on


def test_calls_are_taken_back_with_their_results() -> None:
    with answering(CALLS) as (client, server):
        answer = client.messages.create(**ASKED, tools=TOOLS)
        uses: Any = [block for block in answer.content if block.type == "tool_use"]
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": uses[0].id, "content": [{"type": "text", "text": "7 °C"}]},
            {"type": "tool_result", "tool_use_id": uses[1].id, "content": "no clock", "is_error": True},
            {"type": "text", "text": "And now?"},
        ]
        for content in (answer.content, [block.to_dict() for block in answer.content]):
            messages: Any = [*CHAT, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
            client.messages.create(model="x", max_tokens=10, messages=messages, tools=TOOLS)
            assert prompt_of(server).endswith(
                f"<assistant>{CALLS}\n<user><tool_response>\n7 °C\n</tool_response>\n<tool_response>\nError: no clock\n"
                "</tool_response>\n<user>And now?\n<assistant>"
            )


def test_the_choice_of_tools_is_that_of_the_other_dialects() -> None:
    with answering(CALLS) as (client, server):
        answer = client.messages.create(**ASKED, tools=TOOLS, tool_choice={"type": "none"})
        assert [block.type for block in answer.content] == ["text"]
        assert "get_weather" not in prompt_of(server)
        answer = client.messages.create(
            **ASKED, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        )
        assert [block.type for block in answer.content] == ["text", "tool_use"]


def test_a_call_that_broke_off_is_told_as_text_where_its_input_must_be_an_object() -> None:
    with answering(CALLS) as (client, _):
        answer = client.messages.create(model="x", max_tokens=24, messages=CHAT, tools=TOOLS)
        assert answer.stop_reason == "max_tokens"
        assert [block.to_dict() for block in answer.content] == [
            {"type": "text", "text": "I look it up."},
            {"type": "text", "text": 'get_weather: {"city": '},
        ]


def test_tokens_are_counted_without_an_answer() -> None:
    with answering(CALLS) as (client, server):
        told = client.messages.count_tokens(model="x", messages=CHAT, tools=TOOLS, system="Be short.")
        assert server.engine.submitted == []
        answer = client.messages.create(**ASKED, tools=TOOLS, system="Be short.")
        assert told.input_tokens == answer.usage.input_tokens + NUM_CACHED


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "do-not-echo-me"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a<|end|>b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\0"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [*CHAT, {"role": "assistant", "content": "The"}]}, "messages"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"container": "c"}, "container"),
        ({"do-not-echo-me!": 1}, ""),
    ],
)
def test_bad_parameter_is_refused_in_anthropics_shape(change: dict[str, Any], named: str) -> None:
    with running() as server, server.client() as client:
        for stream in (False, True):
            response = client.post("/v1/messages", json={"max_tokens": 5, "messages": CHAT, "stream": stream, **change})
            assert response.status_code == 400, response.text
            error = AnthropicErrorResponse.model_validate(response.json(), strict=True).error
            assert error.type == "invalid_request_error"
            assert f"`{named}" in error.message
            assert "do-not-echo-me!" not in response.text
        assert server.engine.submitted == []


def test_errors_are_those_of_the_client() -> None:
    with running(api_key="correct-horse-battery") as server:
        with client_of(server, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**ASKED)
        with client_of(server, "correct-horse-battery") as client:
            assert client.messages.create(**ASKED).content
        bearer = anthropic.Anthropic(base_url=server.url, auth_token="correct-horse-battery", max_retries=0)
        with bearer as client:
            assert client.messages.create(**ASKED).content
    with running(ScriptedEngine(max_waiting=0)) as server, client_of(server) as client:
        with pytest.raises(anthropic.RateLimitError) as refusal:
            client.messages.create(**ASKED)
        assert refusal.value.response.headers["retry-after"] == "3"
    with running(ScriptedEngine(fail_after=2)) as server, client_of(server) as client:
        with pytest.raises(anthropic.APIStatusError) as failure:
            client.messages.create(**ASKED)
        assert failure.value.status_code == 424
        with pytest.raises(anthropic.APIStatusError), client.messages.stream(**ASKED) as stream:
            list(stream)


def test_a_client_that_leaves_cancels_its_request() -> None:
    engine = ScriptedEngine(pause_after=1)
    with running(engine) as server, client_of(server) as client:
        with client.messages.stream(**ASKED) as stream:
            next(iter(stream.text_stream))
        wait_until(lambda: len(engine.cancelled) == 1)
