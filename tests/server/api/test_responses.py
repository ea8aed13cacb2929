"""OpenAI's Responses dialect with the unmodified `openai` client, and by hand where the client would not send it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from server.api.chat.parser import Content, Thinking
from server.api.http.errors import OpenAIErrorResponse
from server.api.responses.items import ResponseObject, ResponseWriter
from server.engine.request import EngineError
from tests.server.api.running import Running, running
from tests.server.api.scripted import NUM_CACHED, ScriptedEngine
from tests.server.api.test_tools import CALLS, THINKS, serving

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": False,
    },
    {"type": "function", "name": "get_time", "parameters": None, "strict": None},
]
TEXT = " Paris, the city of light."


def prompt_of(server: Running) -> str:
    return "".join(map(chr, server.engine.submitted[-1].prompt_ids))


def shown(items: list[Any]) -> list[dict[str, Any]]:
    """Items without their ids, which are new in every answer."""
    return [{key: value for key, value in item.to_dict().items() if "id" not in key} for item in items]


def test_response() -> None:
    with serving("Rain.") as (client, server):
        answer = client.responses.create(
            model="x", input="Weather?", instructions="Be short.", max_output_tokens=50, temperature=0, store=False
        )
        assert answer.output_text == "Rain."
        assert (answer.status, answer.error, answer.model) == ("completed", None, "scripted")
        assert prompt_of(server) == "<system>Be short.\n<user>Weather?\n<assistant>"
        usage: Any = answer.usage
        assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (len(prompt_of(server)), 3, 47)
        assert usage.input_tokens_details.cached_tokens == NUM_CACHED
        sampling = server.engine.submitted[-1].sampling
        assert (sampling.is_greedy, sampling.max_new_tokens) == (True, 50)
        ResponseObject.model_validate(answer.model_dump(exclude_unset=True))


def test_answer_that_broke_off_is_incomplete() -> None:
    with serving("Rain and more rain.") as (client, _):
        answer = client.responses.create(model="x", input="Weather?", max_output_tokens=2)
        details: Any = answer.incomplete_details
        assert (answer.status, details.reason, answer.output_text) == ("incomplete", "max_output_tokens", "Rain a")
        *_, last = client.responses.create(model="x", input="Weather?", max_output_tokens=2, stream=True)
        assert last.type == "response.incomplete"
        assert shown(last.response.output) == shown(answer.output)


@pytest.mark.parametrize(
    ("answer", "template", "kinds"),
    [
        ("Rain.", None, ["message"]),
        (CALLS, None, ["message", "function_call", "function_call"]),
        ("It may rain.\n</think>\n\n" + CALLS, THINKS, ["reasoning", "message", "function_call", "function_call"]),
    ],
)
def test_stream_tells_the_same_items_as_the_whole_answer(answer: str, template: str | None, kinds: list[str]) -> None:
    with serving(answer, template) as (client, _):
        whole = client.responses.create(model="x", input="Weather?", tools=TOOLS)
        with client.responses.stream(model="x", input="Weather?", tools=TOOLS) as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert [item.type for item in whole.output] == kinds
    for item in final.output:  # the client adds it
        for name in ("parsed", "parsed_arguments"):
            item.__dict__.pop(name, None)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert shown(done) == shown(whole.output)
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert events[-1].type == "response.completed"
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text
    if "function_call" in kinds:
        calls: Any = whole.output[-2:]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [
            ("get_weather", {"city": "Paris"}),
            ("get_time", {}),
        ]
        arguments = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(arguments) == '{"city": "Paris"}{}'
    if "reasoning" in kinds:
        thought = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        assert "".join(thought) == "It may rain."
        usage: Any = whole.usage
        assert usage.output_tokens_details.reasoning_tokens == 7


def test_output_is_taken_back_as_input_with_the_results_of_calls() -> None:
    with serving(
        "It may rain.\n</think>\n\n" + CALLS, THINKS.replace("m.content", "(m.reasoning_content or '') + m.content")
    ) as (
        client,
        server,
    ):
        asked: dict[str, Any] = {"model": "x", "tools": TOOLS, "include": ["reasoning.encrypted_content"]}
        user: dict[str, Any] = {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}
        answer = client.responses.create(**asked, input=[user])
        calls: Any = [item for item in answer.output if item.type == "function_call"]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "7 °C"} for call in calls]
        for output in (answer.output, [item.to_dict() for item in answer.output]):
            history: Any = [{"role": "developer", "content": "Be short."}, user, *output, *results]
            client.responses.create(**asked, input=history, instructions="Be kind.")
            system, rest = prompt_of(server).split("\n<user>", 1)
            assert system.startswith("<system>Be kind.\n\nBe short.\n\n# Tools")
            assert rest.startswith(
                f"Weather?\n<assistant>It may rain.{CALLS}\n<user><tool_response>\n7 °C\n</tool_resp"
            )


def test_thinking_is_switched_by_the_effort() -> None:
    template = THINKS + "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    with serving("Rain.", template) as (client, server):
        for effort, is_on in (("none", False), ("high", True), (None, True)):
            reasoning: Any = {"effort": effort, "summary": "auto"}
            client.responses.create(model="x", input="Weather?", reasoning=reasoning)
            assert prompt_of(server).endswith("</think>") != is_on
    with serving("Rain.", "{{ reasoning_effort }}{{ messages[0].content }}") as (client, server):
        client.responses.create(model="x", input="Weather?", reasoning={"effort": "low"})
        assert prompt_of(server) == "lowWeather?"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "do-not-echo-me"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": "a<|end|>b"}, "input[0].content"),
        ({"input": "\0"}, "input[0].content[0].text"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_bad_parameter_is_refused_by_its_name(change: dict[str, Any], param: str) -> None:
    with running() as server, server.client() as client:
        for stream in (False, True):
            response = client.post("/v1/responses", json={"input": "Weather?", "stream": stream, **change})
            assert response.status_code == 400, response.text
            error = OpenAIErrorResponse.model_validate(response.json(), strict=True).error
            assert (error.type, error.param) == ("invalid_request_error", param)
            assert "do-not-echo-me" not in response.text
        assert server.engine.submitted == []


def test_functions_of_a_namespace_have_its_name_before_theirs_for_the_model_alone() -> None:
    call = '<tool_call>\n{"name": "agents.close", "arguments": {"id": "7"}}\n</tool_call>'
    tools: Any = [
        {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [{**TOOLS[0], "name": "close"}]},
        {"type": "web_search", "external_web_access": False},
    ]
    with serving(call) as (client, server):
        answer = client.responses.create(model="x", input="Close it.", tools=tools)
        assert '"name": "agents.close"' in prompt_of(server)
        assert "web_search" not in prompt_of(server)
        [item] = answer.output
        assert item.type == "function_call"
        assert (item.name, item.namespace, item.arguments) == ("close", "agents", '{"id": "7"}')
        result = {"type": "function_call_output", "call_id": item.call_id, "output": "closed"}
        history: Any = [{"role": "user", "content": "Close it."}, item, result]
        client.responses.create(model="x", input=history, tools=tools)
        assert call in prompt_of(server)


def test_nothing_stored_is_said_where_it_is_asked_for() -> None:
    with running() as server, server.client() as client:
        refused = client.post("/v1/responses", json={"input": "a", "previous_response_id": "resp_1"}).json()["error"]
        assert "nothing is stored here" in refused["message"]


def test_answer_that_fails_ends_its_stream_with_the_failure() -> None:
    with running(ScriptedEngine(fail_after=2)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            *_, last = client.responses.create(model="x", input="Weather?", stream=True)
            assert last.type == "response.failed"
            error: Any = last.response.error
            assert error.code == "generation_failed"
            with pytest.raises(openai.APIStatusError) as failure:
                client.responses.create(model="x", input="Weather?")
            assert failure.value.status_code == 424


def test_of_an_answer_that_failed_the_last_item_alone_is_incomplete() -> None:
    writer = ResponseWriter(ResponseObject.model_construct(), {})
    writer.add([Thinking("Look."), Content("Rai")])
    [event] = [line for line in writer.fail(EngineError("broke off")).splitlines() if line.startswith(b"data: ")]
    output = json.loads(event.removeprefix(b"data: "))["response"]["output"]
    assert [(item["type"], item["status"]) for item in output] == [
        ("reasoning", "completed"),
        ("message", "incomplete"),
    ]
