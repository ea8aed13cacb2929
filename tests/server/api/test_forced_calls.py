"""Forced calls with the bundled checkpoint: the arguments are always valid under their schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.running import Running, running, wait_until

ASKED: list[Any] = [{"role": "user", "content": "Book it."}]
SCHEMAS: dict[str, dict[str, Any]] = {
    "book": {
        "type": "object",
        "properties": {
            "who": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 12},
                    "ages": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 0, "maximum": 120},
                        "minItems": 1,
                        "maxItems": 3,
                    },
                },
                "required": ["name", "ages"],
                "additionalProperties": False,
            },
            "class": {"enum": ["first", "zweite Klasse", "三等", "🚃"]},
            "price": {"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.25},
            "flexible": {"type": "boolean"},
            "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 20}]},
        },
        "required": ["who", "class", "price", "flexible"],
        "additionalProperties": False,
    },
    "pay": {
        "type": "object",
        "properties": {
            "currency": {"const": "€"},
            "parts": {
                "type": "array",
                "items": {"$ref": "#/$defs/part"},
                "minItems": 1,
                "maxItems": 2,
            },
        },
        "required": ["currency", "parts"],
        "additionalProperties": False,
        "$defs": {
            "part": {
                "type": "object",
                "properties": {"amount": {"type": "integer", "minimum": -5, "maximum": 99}, "by": {"type": "null"}},
                "required": ["amount", "by"],
                "additionalProperties": False,
            }
        },
    },
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]


@pytest.fixture(scope="module")
def server(tiny_store: Path) -> Iterator[Running]:
    flags = {"store": str(tiny_store), "device": "cpu", "dtype": "float32"}
    settings = load_settings(flags, environ={}).settings
    with running(load=lambda progress: load(settings, progress)) as found:
        wait_until(lambda: found.service.loaded is not None or found.service.error is not None, seconds=120)
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


@pytest.mark.parametrize("num_runs", [2, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_arguments_are_valid_under_their_schema_in_every_run(client: openai.OpenAI, num_runs: int) -> None:
    def run(seed: int) -> None:
        tool = TOOLS[seed % 2]
        name = tool["function"]["name"]
        choice: Any = "required" if seed % 4 < 2 else {"type": "function", "function": {"name": name}}
        answer = client.chat.completions.create(
            model="x", messages=ASKED, tools=[tool], tool_choice=choice, parallel_tool_calls=False, seed=seed
        )
        [found] = answer.choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        assert found.message.tool_calls is not None
        call: Any = found.message.tool_calls[0]
        assert call.function.name == name
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[name])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(run, range(num_runs)))


def test_every_dialect_forces_calls(server: Running, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="x",
        messages=ASKED,
        tools=TOOLS[1:],
        tool_choice="required",
        seed=3,
        parallel_tool_calls=False,
        stream=True,
    )
    arguments = "".join(
        (delta.function and delta.function.arguments) or ""
        for chunk in stream
        for delta in chunk.choices[0].delta.tool_calls or []
    )
    jsonschema.validate(json.loads(arguments), SCHEMAS["pay"])
    tools: list[Any] = [{"type": "function", "name": "pay", "parameters": SCHEMAS["pay"], "strict": True}]
    response = client.responses.create(
        model="x", input="Pay.", tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    for item in response.output:
        assert item.type == "function_call"
        jsonschema.validate(json.loads(item.arguments), SCHEMAS["pay"])
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        message = other.messages.create(
            model="x",
            max_tokens=500,
            messages=ASKED,
            tools=[{"name": "pay", "input_schema": SCHEMAS["pay"]}],
            tool_choice={"type": "tool", "name": "pay"},
        )
    [block] = message.content
    assert block.type == "tool_use"
    assert message.stop_reason == "tool_use"
    jsonschema.validate(block.input, SCHEMAS["pay"])


def test_enforced_forms_of_the_text_have_the_spelling_of_each_dialect(server: Running, client: openai.OpenAI) -> None:
    schema = SCHEMAS["pay"]
    form: Any = {"type": "json_schema", "name": "pay", "schema": schema, "strict": True}
    jsonschema.validate(
        json.loads(client.responses.create(model="x", input="Pay.", text={"format": form}).output_text), schema
    )
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as other:
        config: Any = {"format": {"type": "json_schema", "schema": schema}}
        message = other.messages.create(model="x", max_tokens=500, messages=ASKED, output_config=config)
    [block] = message.content
    assert block.type == "text"
    jsonschema.validate(json.loads(block.text), schema)


def test_a_schema_that_cannot_be_enforced_is_refused_before_the_answer(client: openai.OpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "no-such-type"}}, "required": ["a"]}
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": bad}}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model="x", messages=ASKED, tools=tools, tool_choice="required", stream=True)
    assert refusal.value.param == "tools"
