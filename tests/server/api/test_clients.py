"""Requests as unmodified clients send them: defaults, null values, bookkeeping, and their readers of lines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.api.readiness import checked
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.running import Running, events_of, running, wait_until
from tests.server.api.scripted import ScriptedEngine, loaded

CHAT: list[Any] = [{"role": "user", "content": "Where?"}]
LINE_BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r\n\t\x7f"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def taken(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "field",
    [
        {"store": False},
        {"store": True},
        {"metadata": {}},
        {"metadata": {"run": "7"}},
        {"parallel_tool_calls": False},
        {"service_tier": "auto"},
        {"user": "u"},
        {"safety_identifier": "u"},
        {"prompt_cache_key": "k"},
        {"prompt_cache_retention": "24h"},
        {"prediction": {"type": "content", "content": "x"}},
        {"tools": []},
        {"reasoning_effort": "none"},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"functions": []},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"verbosity": "medium"},
        {"logprobs": False, "top_logprobs": 0},
        {"stream_options": {"include_usage": True}},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 0},
        {"min_p": 0.0},
        {"typical_p": 1.0},
        {"top_p": 1.0},
        {"top_p": 1},
        {"temperature": 0},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"repetition_penalty": 1},
        {"logit_bias": {}},
        {"min_tokens": 0},
        {"stop": []},
        {"stop": ""},
        {"stop": [""]},
        {"stop_token_ids": []},
        {"bad_words": []},
        {"n": 1},
        {"ignore_eos": False},
        {"skip_special_tokens": True},
        {"include_stop_str_in_output": False},
        {"use_beam_search": False},
        {"length_penalty": 1.0},
        {"early_stopping": False},
        {"spaces_between_special_tokens": True},
        {"add_generation_prompt": True},
        {"continue_final_message": False},
        {"add_special_tokens": False},
        {"documents": []},
        {"echo": False},
        {"chat_template_kwargs": {}},
    ],
    ids=str,
)
def test_neutral_values_and_bookkeeping_change_nothing(
    client: httpx.Client, server: Running, field: dict[str, Any]
) -> None:
    body = {"model": "scripted", "messages": CHAT, "temperature": 0}
    plain = taken(client, "/v1/chat/completions", body)["choices"]
    sampling = server.engine.submitted[-1].sampling
    assert taken(client, "/v1/chat/completions", {**body, **field})["choices"] == plain
    asked = server.engine.submitted[-1].sampling
    assert (asked.is_greedy, asked.stop, asked.max_new_tokens) == (True, (), sampling.max_new_tokens)


REQUESTS = {
    "/generate": "GenerateRequest",
    "/v1/completions": "CompletionRequest",
    "/v1/chat/completions": "ChatRequest",
    "/v1/responses": "ResponsesRequest",
    "/v1/messages": "MessagesRequest",
    "/v1/messages/count_tokens": "CountTokensRequest",
}


@pytest.mark.parametrize("path", REQUESTS)
def test_null_stands_for_every_optional_field(client: httpx.Client, path: str) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    given: dict[str, Any] = {"inputs": "a", "prompt": "a", "messages": CHAT, "input": "a", "max_tokens": 5}
    fields = schemas[REQUESTS[path]]["properties"]
    required = schemas[REQUESTS[path]].get("required", [])
    body = {field: given[field] if field in required else None for field in fields}
    if path == "/generate":
        taken(client, path, body)
        body["parameters"] = dict.fromkeys(schemas["GenerateParameters"]["properties"])
    taken(client, path, body)


@pytest.mark.parametrize("name", ["dummy", "tgi", "gpt-4", "", "../../etc/passwd", None])
def test_any_model_name_is_taken_and_the_served_one_told(client: httpx.Client, name: str | None) -> None:
    answer = taken(client, "/v1/chat/completions", {"model": name, "messages": CHAT})
    assert answer["model"] == "scripted"
    assert taken(client, "/v1/completions", {"prompt": "a"})["model"] == "scripted"


def test_a_model_of_several_names_tells_the_one_that_was_asked_for() -> None:
    engine = ScriptedEngine()
    with running(engine, load=lambda progress: loaded(engine, other_names=("org/short",))) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            wait_until(lambda: server.service.loaded is not None)
            assert [model.id for model in client.models.list()] == ["scripted", "org/short"]
            assert client.models.retrieve("org/short").id == "org/short"
            for asked, told in (("org/short", "org/short"), ("scripted", "scripted"), ("other", "scripted")):
                assert client.chat.completions.create(model=asked, messages=CHAT).model == told


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions", "/v1/chat/completions"])
def test_events_are_one_line_to_every_line_reader(path: str) -> None:
    pieces = [f"a{char}b" for char in LINE_BREAKS]
    with running(ScriptedEngine(answer=[*pieces, "é", "漢"])) as server, server.client() as client:
        body = {
            "inputs": f"Hello{LINE_BREAKS}",
            "parameters": {"return_full_text": True, "details": True},
            "prompt": f"Hello{LINE_BREAKS}",
            "messages": [{"role": "user", "content": f"Hello{LINE_BREAKS}"}],
            "max_tokens": 100,
        }
        known = {"/generate_stream": ("inputs", "parameters"), "/v1/completions": ("prompt", "max_tokens")}
        keys = known.get(path, ("messages",))
        stream = {} if path == "/generate_stream" else {"stream": True}
        text = client.post(path, json={**{key: body[key] for key in keys}, **stream}).content.decode()
        lines = [line for line in text.splitlines() if line]
        assert all(line.startswith("data: ") for line in lines)
        events = events_of(text)
        whole = "".join(pieces) + "é漢"
        if path == "/generate_stream":
            assert events[-1]["generated_text"] == body["inputs"] + whole
        elif path == "/v1/completions":
            assert "".join(event["choices"][0]["text"] for event in events) == whole
        else:
            assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole


def test_sampling_parameters_of_other_servers_reach_the_engine(client: httpx.Client, server: Running) -> None:
    parameters = {
        "min_p": 0.1,
        "typical_p": 0.95,
        "logit_bias": {"5": 1, "7": -100},
        "min_tokens": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "stop": "x",
    }
    taken(client, "/v1/chat/completions", {"messages": CHAT, **parameters})
    taken(client, "/v1/completions", {"prompt": "a", **parameters})
    taken(client, "/generate", {"inputs": "a", "parameters": parameters})
    for request in server.engine.submitted[-3:]:
        sampling = request.sampling
        assert not sampling.is_greedy
        assert (sampling.min_p, sampling.typical_p, sampling.min_tokens) == (0.1, 0.95, 2)
        assert sampling.logit_bias == {5: 1.0, 7: -100.0}
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
        assert (sampling.ignore_eos, sampling.skip_special_tokens) == (True, False)
        assert (sampling.include_stop_str_in_output, sampling.stop) == (True, ("x",))


def test_each_dialect_has_its_default_for_the_stop_string(client: httpx.Client, server: Running) -> None:
    taken(client, "/v1/completions", {"prompt": "a"})
    taken(client, "/generate", {"inputs": "a"})
    assert [one.sampling.include_stop_str_in_output for one in server.engine.submitted[-2:]] == [False, True]


def test_generation_config_counts_where_a_request_says_nothing() -> None:
    engine = ScriptedEngine()
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True}
    with running(engine, load=lambda progress: loaded(engine, generation_defaults=defaults)) as server:
        with server.client() as client:
            wait_until(lambda: server.service.loaded is not None)
            assert client.get("/info").json()["generation_defaults"] == defaults
            for path, body in (
                ("/v1/chat/completions", {"messages": CHAT}),
                ("/v1/completions", {"prompt": "a"}),
                ("/generate", {"inputs": "a"}),
            ):
                taken(client, path, body)
                sampling = engine.submitted[-1].sampling
                found = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty)
                assert found == (0.6, 20, 0.95, 1.05), path
            own = {"temperature": 1, "top_k": -1, "top_p": 1, "repetition_penalty": 1}
            taken(client, "/v1/completions", {"prompt": "a", **own})
            sampling = engine.submitted[-1].sampling
            assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1, None, 1)
            assert sampling.repetition_penalty == 1
            for body in (
                {"inputs": "a", "parameters": {"do_sample": False}},
                {"inputs": "a", "parameters": {"temperature": 0}},
            ):
                taken(client, "/generate", body)
                assert engine.submitted[-1].sampling.is_greedy, body


def test_max_tokens_is_at_most_what_the_context_has_room_for(client: httpx.Client, server: Running) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 150, "max_tokens": 10**6}),
        ("/v1/chat/completions", {"messages": CHAT, "max_completion_tokens": 2**31 - 1}),
    ):
        taken(client, path, body)
        request = server.engine.submitted[-1]
        assert len(request.prompt_ids) + request.sampling.max_new_tokens == 200


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_agents_look_for(client: httpx.Client) -> None:
    """Claude Code and litellm look for the first, opencode and litellm for the second, to shorten their history."""
    long = [{"role": "user", "content": "a" * 300}]
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 205}),
        ("/v1/chat/completions", {"messages": long}),
        ("/v1/responses", {"input": "a" * 300}),
        ("/v1/messages", {"messages": long, "max_tokens": 5}),
    ):
        refusal = client.post(path, json=body).json()["error"]
        assert re.search(r"prompt is too long: [23]\d\d tokens > 199 maximum", refusal["message"]), path
        assert "This model's maximum context length is 200 tokens" in refusal["message"]
        assert refusal.get("code", "context_length_exceeded") == "context_length_exceeded"
        assert refusal["type"] == "invalid_request_error"
    assert "205 tokens" in client.post("/v1/completions", json={"prompt": "a" * 205}).text
    assert "by at least 6" in client.post("/v1/completions", json={"prompt": "a" * 205}).text


@pytest.mark.parametrize(
    "path", ["/health", "/health/live", "/health/ready", "/info", "/v1/models", "/v1/models/scripted", "/metrics"]
)
def test_head_answers_as_get_does_without_a_body(client: httpx.Client, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/nowhere").status_code == 404
    assert client.head("/generate").status_code == 405


@pytest.mark.parametrize("path", ["/v1/models/", "//v1//models", "/v1/models//", "/health/live/", "//health", "//"])
def test_double_and_trailing_slashes_are_taken(client: httpx.Client, path: str) -> None:
    if path == "//":
        assert client.post(path, json={"inputs": "a"}).status_code == 200
    else:
        assert client.get(client.base_url.copy_with(raw_path=path.encode())).status_code == 200


def test_slashes_open_nothing_that_is_guarded() -> None:
    with running(api_key="correct-horse-battery") as server, server.client() as client:
        for path in ("//info", "/info/", "/v1/models/", "/health/live/../info", "/metrics//"):
            assert client.get(client.base_url.copy_with(raw_path=path.encode())).status_code in (401, 404), path
        assert client.get("/health/live/").status_code == 200


@pytest.mark.parametrize("logprobs", [False, True])
def test_last_text_and_the_reason_of_the_end_come_in_chunks_of_their_own(client: httpx.Client, logprobs: bool) -> None:
    body = {"messages": CHAT, "max_tokens": 3, "stream": True, "logprobs": logprobs}
    choices = [event["choices"][0] for event in events_of(client.post("/v1/chat/completions", json=body).text)]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert "".join(choice["delta"].get("content", "") for choice in choices) == " Paris, the"
    assert (choices[-1]["delta"], choices[-1]["finish_reason"], choices[-1]["logprobs"]) == ({}, "length", None)
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    choices = [event["choices"][0] for event in events_of(client.post("/v1/completions", json=body).text)]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert (choices[-1]["text"], choices[-1]["finish_reason"]) == ("", "length")


def test_echo_begins_with_the_prompt(client: httpx.Client) -> None:
    body = {"prompt": "ab", "max_tokens": 2, "echo": True}
    assert taken(client, "/v1/completions", body)["choices"][0]["text"] == "ab Paris,"
    found = taken(client, "/v1/completions", {**body, "logprobs": 0})["choices"][0]
    assert found["logprobs"]["tokens"] == ["a", "b", " Paris", ","]
    assert found["logprobs"]["token_logprobs"] == [None, -0.5, -0.25, -0.25]
    assert found["logprobs"]["text_offset"] == [0, 1, 2, 8]
    scored = taken(client, "/v1/completions", {**body, "max_tokens": 0, "logprobs": 0})
    assert scored["choices"][0]["text"] == "ab"
    assert scored["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
    assert scored["usage"]["completion_tokens"] == 0
    ids = {**body, "prompt": [ord("x"), ord("y")], "n": 2}
    assert [one["text"] for one in taken(client, "/v1/completions", ids)["choices"]] == ["xy Paris,"] * 2
    events = events_of(client.post("/v1/completions", json={**body, "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in events) == "ab Paris,"
    for change, param in (({"stream": True, "logprobs": 1}, "echo"), ({"echo": False, "max_tokens": 0}, "max_tokens")):
        refused = client.post("/v1/completions", json={**body, **change})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_history_holds_what_the_client_dumped(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="scripted", messages=CHAT).choices[0].message
        history: list[Any] = [*CHAT, answer.model_dump(), {"role": "user", "content": "And?"}]
        assert client.chat.completions.create(model="scripted", messages=history).choices[0].message.content
        history[1] = answer
        assert client.chat.completions.create(model="scripted", messages=history).choices[0].message.content
    prompt = "".join(map(chr, server.engine.submitted[-1].prompt_ids))
    assert prompt == "<user>Where?\n<assistant> Paris, the city of light.\n<user>And?\n<assistant>"


def test_part_of_another_kind_is_refused_with_that_reason(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "http://x"}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert "part 1 is not of type text" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    parts[1] = {"type": "text", "text": "b", "colour": "red"}
    assert "part 1 has an unknown key" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    parts[1] = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    assert json.loads(client.post("/v1/chat/completions", json=body).text)["choices"]


@pytest.fixture(scope="module")
def real(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A few experts of the bundled checkpoint, as a snapshot in the hub's cache with a generation config of its own."""
    folder = tmp_path_factory.mktemp("hub")
    snapshot = folder / "models--org--tiny" / "snapshots" / ("0a" * 20)
    shutil.copytree(tiny_checkpoint, snapshot)
    config = {"eos_token_id": [0, 4], "do_sample": True, "temperature": 0.7, "top_k": 20}
    (snapshot / "generation_config.json").write_text(json.dumps(config))
    prepare(Checkpoint.open(snapshot), folder / "store", SelectionRequest(experts="0-15")).run()
    flags = {"store": str(folder / "store"), "device": "cpu", "dtype": "float32", "max_context_tokens": 128}
    settings = load_settings(flags, environ={}).settings
    with running(load=lambda progress: checked(load(settings, progress))) as found:
        wait_until(lambda: found.service.loaded is not None or found.service.error is not None, seconds=120)
        yield found


def test_a_real_model_has_the_hubs_name_and_the_defaults_of_its_generation_config(real: Running) -> None:
    with real.client() as client:
        info = client.get("/info").json()
    assert info["model_id"] == "org/tiny"
    assert info["generation_defaults"] == {"do_sample": True, "temperature": 0.7, "top_k": 20}
    assert info["has_chat_template"]


def test_a_real_template_keeps_what_the_developer_says(real: Running) -> None:
    with real.client() as client:
        counts = []
        for role in ("developer", "system"):
            messages = [{"role": role, "content": "Answer in one word, please."}, *CHAT]
            counts.append(taken(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})["usage"])
        alone = taken(client, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1})["usage"]
    assert counts[0] == counts[1]
    assert counts[0]["prompt_tokens"] > alone["prompt_tokens"]


def test_a_real_prompt_is_scored_alike_in_both_dialects(real: Running) -> None:
    with real.client() as client:
        prompt = "Once upon a time"
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        scored = taken(client, "/v1/completions", body)["choices"][0]
        parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
        details = taken(client, "/generate", {"inputs": prompt, "parameters": parameters})["details"]
    assert scored["text"] == "".join(scored["logprobs"]["tokens"]) == prompt
    assert scored["logprobs"]["token_logprobs"] == [token["logprob"] for token in details["prefill"]]
    tops = scored["logprobs"]["top_logprobs"]
    assert tops[0] is None
    for top, logprob in zip(tops[1:], scored["logprobs"]["token_logprobs"][1:], strict=True):
        assert next(iter(top.values())) >= logprob
