"""The OpenAI dialect with the unmodified `openai` client, and by hand where the client would not send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from server.api.http.errors import OpenAIErrorResponse
from server.api.openai.responses import ChatResponse, CompletionResponse
from tests.server.api.running import Running, events_of, running, wait_until
from tests.server.api.scripted import NUM_CACHED, ScriptedEngine

CHAT: list[Any] = [{"role": "user", "content": "Where?"}]
TEXT = " Paris, the city of light."
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=10) as found:
        yield found


def test_models_lists_the_one_that_is_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").owned_by == "deepfew"
    for name in ("gpt-4", "../scripted", "scripted/x"):
        with pytest.raises(openai.NotFoundError) as refusal:
            client.models.retrieve(name)
        assert refusal.value.code in ("model_not_found", "not_found")


def test_a_model_tells_its_context_and_the_answer_its_time(client: openai.OpenAI, server: Running) -> None:
    card = client.models.retrieve("scripted").to_dict()
    assert (card["max_model_len"], card["max_input_tokens"]) == (200, 199)
    for path in ("/v1/models", "/v1/nothing"):
        head = httpx.get(server.url + path).headers
        assert 0 <= int(head["openai-processing-ms"]) < 60_000


def test_what_is_not_served_is_a_404_that_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no embeddings"):
        client.embeddings.create(model="scripted", input="a")


def test_completion(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(model="scripted", prompt="The capital of France is", max_tokens=3, temperature=0)
    assert answer.choices[0].text == " Paris, the"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (24, 3, 27)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == NUM_CACHED
    assert server.engine.submitted[-1].sampling.is_greedy
    CompletionResponse.model_validate(answer.model_dump(), strict=True)


def test_defaults_are_openais(client: openai.OpenAI, server: Running) -> None:
    client.completions.create(model="scripted", prompt="a")
    sampling = server.engine.submitted[-1].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.do_sample) == (16, 1.0, True)
    client.chat.completions.create(model="scripted", messages=CHAT)
    request = server.engine.submitted[-1]
    assert request.sampling.max_new_tokens == 200 - len(request.prompt_ids)


def test_several_prompts_and_answers_come_in_order(client: openai.OpenAI, server: Running) -> None:
    answer = client.completions.create(model="scripted", prompt=["a", "bcd"], n=2, max_tokens=1, seed=-1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)
    requests = server.engine.submitted
    assert [len(request.prompt_ids) for request in requests] == [1, 1, 3, 3]
    assert [request.sampling.seed for request in requests] == [2**64 - 1, 0] * 2
    answer = client.completions.create(model="scripted", prompt=[[5, 6], [7]], max_tokens=1)
    assert [request.prompt_ids for request in requests[4:]] == [(5, 6), (7,)]
    client.completions.create(model="scripted", prompt=[9, 8], max_tokens=1)
    assert requests[-1].prompt_ids == (9, 8)


def test_stop_string_is_not_in_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="scripted", prompt="a", stop=" city")
    assert answer.choices[0].text == " Paris, the"
    assert answer.choices[0].finish_reason == "stop"
    stream = client.completions.create(model="scripted", prompt="a", stop=[", the cX", "light!"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT
    stream = client.completions.create(model="scripted", prompt="a", stop=[", the city", "x"], stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert [chunk.text for chunk in chunks if chunk.text] == [" Paris"]
    assert chunks[-1].finish_reason == "stop"


def test_chat_uses_the_template_and_the_end_token_is_not_in_the_text(client: openai.OpenAI, server: Running) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]},
    ]
    answer = client.chat.completions.create(model="scripted", messages=messages)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    prompt = "".join(map(chr, server.engine.submitted[-1].prompt_ids))
    assert prompt == "<system>Be short.\n<user>Where?\n<assistant>"
    ChatResponse.model_validate(answer.model_dump(exclude_unset=True), strict=True)
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["deficit"]["overall"] == 0.125


def test_chat_stream_has_a_role_the_text_an_end_and_the_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="scripted", messages=CHAT, stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert texts == {0: TEXT, 1: TEXT}
    assert reasons == {0: "stop", 1: "stop"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_stream_ends_with_done(server: Running) -> None:
    body = {"model": "scripted", "messages": CHAT, "stream": True}
    with server.client() as client:
        text = client.post("/v1/chat/completions", json=body).text
    assert text.endswith("data: [DONE]\n\n")
    assert all(event["object"] == "chat.completion.chunk" for event in events_of(text))


@pytest.mark.parametrize("stop", [" city", "ty of", " light.", ", the city"])
def test_the_tokens_after_a_stop_string_are_nowhere_and_those_told_join_to_the_text(
    client: openai.OpenAI, stop: str
) -> None:
    wanted = TEXT[: TEXT.index(stop)]
    asked: dict[str, Any] = {"model": "scripted", "prompt": "a", "stop": stop, "logprobs": 0}
    whole = client.completions.create(**asked)
    found = whole.choices[0]
    assert found.logprobs is not None
    assert found.logprobs.tokens is not None
    assert found.text == "".join(found.logprobs.tokens) == wanted
    assert whole.usage is not None
    assert whole.usage.completion_tokens >= len(found.logprobs.tokens)
    tokens: list[str] = []
    for chunk in client.completions.create(**asked, stream=True):
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        tokens += logprobs.tokens or []
        assert wanted.startswith("".join(tokens))
    assert tokens == found.logprobs.tokens


def test_logprobs_of_a_part_of_a_character_give_its_own_bytes() -> None:
    with running(ScriptedEngine(answer=["a", b"\xf0\x9f", b"\xa6\x8a", "!"])) as server:
        asked = {"model": "scripted", "messages": CHAT, "logprobs": True}
        choice = httpx.post(server.url + "/v1/chat/completions", json=asked).json()["choices"][0]
        assert choice["message"]["content"] == "a🦊!"
        entries = choice["logprobs"]["content"][:4]
        assert [entry["bytes"] for entry in entries] == [[0x61], [0xF0, 0x9F], [0xA6, 0x8A], [0x21]]
        assert [entry["token"] for entry in entries] == ["a", r"bytes:\xf0\x9f", r"bytes:\xa6\x8a", "!"]
        asked = {"model": "scripted", "prompt": "x", "logprobs": 0}
        logprobs = httpx.post(server.url + "/v1/completions", json=asked).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["a", r"bytes:\xf0\x9f", r"bytes:\xa6\x8a", "!", "<|end|>"]
        assert logprobs["text_offset"] == [0, 1, 1, 2, 3]


def test_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="scripted", prompt="a", max_tokens=2, logprobs=2).choices[0].logprobs
    assert whole is not None
    assert whole.tokens == [" Paris", ","]
    assert whole.token_logprobs == [-0.25, -0.25]
    assert whole.top_logprobs == [{"t0": -1.0, "t1": -2.0}] * 2
    assert whole.text_offset == [0, 6]
    offsets: list[int] = []
    for chunk in client.completions.create(model="scripted", prompt="a", max_tokens=3, logprobs=0, stream=True):
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        offsets += logprobs.text_offset or []
    assert offsets == [0, 6, 7]
    answer = client.chat.completions.create(
        model="scripted", messages=CHAT, max_completion_tokens=1, logprobs=True, top_logprobs=1
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert found.content[0].token == " Paris"
    assert found.content[0].bytes == list(b" Paris")
    assert [top.token for top in found.content[0].top_logprobs] == ["t0"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"min_tokens": 500}, "min_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1]"),
        ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools[0]"),
        ({"tools": [{**TOOL, "function": {"name": "f", "description": "<|end|>"}}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"metadata": 1}, "metadata"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": ["<|end|>"]}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x", "name": "<|end|>"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "a<|end|><assistant>b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\0"}]}, "messages[0].content"),
        ({"messages": [*CHAT, {"role": "user", "content": "x", "name": 1}]}, "messages[1].name"),
        ({"stream_options": {"unheard_of": 1}}, "stream_options.unheard_of"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_bad_parameter_is_refused_by_its_name_in_openais_shape(
    server: Running, change: dict[str, Any], param: str
) -> None:
    with server.client() as client:
        for stream in (False, True):
            body = {"model": "scripted", "messages": CHAT, "stream": stream, **change}
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 400, response.text
            error = OpenAIErrorResponse.model_validate(response.json(), strict=True).error
            assert (error.type, error.param) == ("invalid_request_error", param)
    assert not server.engine.submitted


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        [0x110000],
        [[1], [2**31 - 1]],
        [1, "a"],
        [[1], "a"],
        [True],
        [-1],
        [1.5],
        None,
        {},
        "\0",
        [["a"]],
    ],
)
def test_bad_prompt_is_refused(server: Running, prompt: Any) -> None:
    with server.client() as client:
        response = client.post("/v1/completions", json={"model": "scripted", "prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_errors_have_openais_shape(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="scripted", prompt="a" * 200)
    assert too_long.value.code == "context_length_exceeded"
    with server.client() as plain:
        for response in (
            plain.get("/v1/nowhere"),
            plain.get("/v1/completions"),
            plain.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}),
            plain.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}),
        ):
            OpenAIErrorResponse.model_validate(response.json(), strict=True)
    with running(api_key="correct-horse-battery") as guarded:
        with openai.OpenAI(base_url=guarded.url + "/v1", api_key="wrong-key", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with openai.OpenAI(base_url=guarded.url + "/v1", api_key="correct-horse-battery") as friend:
            assert friend.models.list().data


def test_full_queue_is_a_rate_limit_and_leaves_nothing_behind() -> None:
    engine = ScriptedEngine(max_waiting=2)
    engine.may_run.clear()
    with running(engine) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as refusal:
                    client.completions.create(model="scripted", prompt=["a", "b", "c"], stream=stream)
                assert refusal.value.response.headers["retry-after"] == "3"
                wait_until(lambda: engine.num_active == 0)


@pytest.mark.parametrize(
    ("engine", "limits", "code"),
    [
        (ScriptedEngine(fail_after=1), {}, "generation_failed"),
        (ScriptedEngine(step_seconds=30), {"max_request_seconds": 0.3}, "timeout"),
    ],
)
def test_client_does_not_send_again_what_would_fail_again(
    engine: ScriptedEngine, limits: dict[str, Any], code: str
) -> None:
    with running(engine, **limits) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            assert client.max_retries > 0
            with pytest.raises(openai.APIStatusError) as failure:
                client.completions.create(model="scripted", prompt="a")
        assert (failure.value.status_code, failure.value.code) == (424, code)
        assert len(server.engine.submitted) == 1


def test_failure_of_one_answer_ends_all_of_them() -> None:
    with running(ScriptedEngine(fail_after=1)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError, match="corrupt"):
                client.completions.create(model="scripted", prompt="a", n=3)
            with pytest.raises(openai.APIError, match="corrupt"):
                list(client.completions.create(model="scripted", prompt="a", n=3, stream=True))
        wait_until(lambda: server.engine.num_active == 0)
        wait_until(lambda: not server.listener.server_state.tasks)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_cancels_all_its_answers(stream: bool) -> None:
    engine = ScriptedEngine()
    engine.may_run.clear()
    with running(engine) as server:
        body = {"model": "scripted", "prompt": ["a", "b"], "n": 2, "stream": stream}
        held = server.post_raw("/v1/completions", json.dumps(body).encode())
        wait_until(lambda: engine.num_active == 4)
        held.close()
        wait_until(lambda: engine.num_active == 0)
        assert len(engine.cancelled) == 4


def test_checkpoint_without_a_chat_template_says_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.api.scripted.CharTokenizer.chat_template", None)
    response = httpx.post(server.url + "/v1/chat/completions", json={"model": "scripted", "messages": CHAT})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_template_that_refuses_the_messages_is_the_clients_error(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> str:
        raise RuntimeError("roles must alternate: do-not-echo-me")

    monkeypatch.setattr("tests.server.api.scripted.CharTokenizer.apply_chat_template", refuse)
    response = httpx.post(server.url + "/v1/chat/completions", json={"model": "scripted", "messages": CHAT})
    assert response.status_code == 400
    assert "do-not-echo-me" not in response.text
