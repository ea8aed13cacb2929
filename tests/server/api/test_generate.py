"""`/generate` and its kin over a real socket: the TGI contract, refusals before the first byte, disconnects."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from server.api.tgi.schemas import GenerateResponse, StreamResponse
from tests.server.api.running import Running, events_of, running, wait_until
from tests.server.api.scripted import ScriptedEngine

PROMPT = "The capital of France is"


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def test_generate_answers_with_the_text_alone(server: Running) -> None:
    with server.client() as client:
        response = client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 3}})
    assert response.status_code == 200
    assert response.json() == {"generated_text": " Paris, the"}
    assert response.headers["x-prompt-tokens"] == str(len(PROMPT))
    assert response.headers["x-generated-tokens"] == "3"
    for name in ("x-request-id", "x-total-time", "x-queue-time", "x-inference-time", "x-time-per-token"):
        assert response.headers[name]


def test_root_answers_with_a_list_as_tgi_does(server: Running) -> None:
    with server.client() as client:
        response = client.post("/", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 3}})
    assert response.json() == [{"generated_text": " Paris, the"}]


def test_details_follow_the_contract_and_add_the_deficit(server: Running) -> None:
    parameters = {"max_new_tokens": 2, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    with server.client() as client:
        payload = client.post("/generate", json={"inputs": "ab", "parameters": parameters}).json()
    GenerateResponse.model_validate(payload, strict=True)
    details = payload["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 2
    assert details["seed"] is None
    assert details["prefill"] == [
        {"id": ord("a"), "text": "a", "logprob": None},
        {"id": ord("b"), "text": "b", "logprob": -0.5},
    ]
    assert details["tokens"][0] == {"id": 1001, "text": " Paris", "logprob": -0.25, "special": False}
    assert [len(top) for top in details["top_tokens"]] == [2, 2]
    assert (details["deficit"]["overall"], details["deficit"]["per_layer"]) == (0.125, [0.0, 0.25])


def test_full_text_truncation_stop_and_end_of_sequence(server: Running) -> None:
    def ask(**parameters: object) -> dict[str, object]:
        body = {"inputs": "abc", "parameters": {"details": True, **parameters}}
        answer: dict[str, object] = client.post("/generate", json=body).json()
        return answer

    with server.client() as client:
        assert ask(return_full_text=True, max_new_tokens=1)["generated_text"] == "abc Paris"
        stopped = ask(stop=["the"])
        assert stopped["generated_text"] == " Paris, the"
        assert stopped["details"]["finish_reason"] == "stop_sequence"  # type: ignore[index]
        assert ask()["details"]["finish_reason"] == "eos_token"  # type: ignore[index]
        ask(truncate=2)
    assert server.engine.submitted[-1].prompt_ids == (ord("b"), ord("c"))


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    parameters = {"temperature": 1e-300, "top_k": 2**31 - 1, "top_p": 0.5, "seed": 2**64 - 1, "repetition_penalty": 1.1}
    with server.client() as client:
        body = {"inputs": "a", "parameters": {**parameters, "do_sample": True, "details": True}}
        assert client.post("/generate", json=body).json()["details"]["seed"] == 2**64 - 1
    sampling = server.engine.submitted[-1].sampling
    assert sampling.temperature == 1e-4
    assert sampling.top_k == 0x110000
    assert (sampling.top_p, sampling.repetition_penalty, sampling.do_sample) == (0.5, 1.1, True)


def test_default_length_is_bounded_by_the_context(server: Running) -> None:
    with server.client() as client:
        assert client.post("/generate", json={"inputs": "a" * 150}).status_code == 200
        assert server.engine.submitted[-1].sampling.max_new_tokens == 50
        client.post("/generate", json={"inputs": "a" * 20})
        assert server.engine.submitted[-1].sampling.max_new_tokens == 100


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_stream_has_one_event_a_token_and_the_text_in_the_last(server: Running, path: str) -> None:
    body = {"inputs": "a", "stream": True, "parameters": {"max_new_tokens": 3, "details": True, "top_n_tokens": 1}}
    with server.client() as client:
        response = client.post(path, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    events = events_of(response.text)
    for event in events:
        StreamResponse.model_validate(event, strict=True)
    assert [event["index"] for event in events] == [1, 2, 3]
    assert [event["token"]["text"] for event in events] == [" Paris", ",", " the"]
    assert [event["generated_text"] for event in events] == [None, None, " Paris, the"]
    deficit = events[-1]["details"].pop("deficit")
    assert (deficit["overall"], deficit["per_layer"]) == (0.125, [0.0, 0.25])
    assert events[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 3,
        "seed": None,
        "input_length": 1,
    }
    assert "[DONE]" not in response.text


def test_last_token_and_end_are_one_event_however_late_the_end_is() -> None:
    with running(ScriptedEngine(end_seconds=0.1), keep_alive_seconds=0.03) as server, server.client() as client:
        body = {"inputs": "a", "parameters": {"max_new_tokens": 3}}
        events = events_of(client.post("/generate_stream", json=body).text)
        assert [(event["index"], event["generated_text"]) for event in events] == [
            (1, None),
            (2, None),
            (3, " Paris, the"),
        ]


def test_tokens_arrive_while_generation_goes_on() -> None:
    engine = ScriptedEngine(pause_after=1)
    with running(engine) as server, server.client() as client:
        with client.stream("POST", "/generate_stream", json={"inputs": "a"}) as response:
            chunks = response.iter_text()
            assert '"text":" Paris"' in next(chunks)
            assert engine.num_active == 1
            engine.resume.set()
            assert events_of("".join(chunks))[-1]["generated_text"] == " Paris, the city of light."


def test_idle_stream_is_kept_open_by_comments() -> None:
    engine = ScriptedEngine()
    engine.may_run.clear()
    with running(engine, keep_alive_seconds=0.05) as server, server.client() as client:
        with client.stream("POST", "/generate_stream", json={"inputs": "a"}) as response:
            chunks = response.iter_text()
            assert next(chunks) == ": keep-alive\n\n"
            engine.may_run.set()
            assert events_of("".join(chunks))[-1]["generated_text"] == " Paris, the city of light."


def test_failure_inside_a_stream_ends_it_with_an_error_event() -> None:
    with running(ScriptedEngine(fail_after=2)) as server, server.client() as client:
        events = events_of(client.post("/generate_stream", json={"inputs": "a"}).text)
        assert events[-1] == {"error": "experts/deep-00001.safetensors is corrupt", "error_type": "generation"}
        response = client.post("/generate", json={"inputs": "a"})
        assert response.status_code == 424
        assert response.json() == events[-1]


def test_full_queue_is_refused_at_once_with_retry_after() -> None:
    engine = ScriptedEngine(max_waiting=1)
    engine.may_run.clear()
    with running(engine) as server, server.client() as client:
        held = server.post_raw("/generate", b'{"inputs":"a"}')
        wait_until(lambda: engine.num_active == 1)
        for body in ({"inputs": "a"}, {"inputs": "a", "stream": True}):
            response = client.post("/generate", json=body)
            assert response.status_code == 429
            assert response.json()["error_type"] == "overloaded"
            assert response.headers["retry-after"] == "3"
        held.close()


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_cancels_its_request(stream: bool) -> None:
    engine = ScriptedEngine()
    engine.may_run.clear()
    with running(engine) as server:
        held = server.post_raw("/generate", json.dumps({"inputs": "a", "stream": stream}).encode())
        wait_until(lambda: engine.num_active == 1)
        held.close()
        wait_until(lambda: engine.num_active == 0)
        assert engine.cancelled == [engine.submitted[0].request_id]
        wait_until(lambda: b'deepfew_requests_total{outcome="cancelled"} 1.0' in server.metrics.render())


def test_client_that_leaves_in_the_middle_of_a_stream_cancels_its_request() -> None:
    engine = ScriptedEngine(pause_after=1)
    with running(engine) as server:
        held = server.post_raw("/generate_stream", b'{"inputs":"a","parameters":{"max_new_tokens":150}}', read=300)
        held.close()
        wait_until(lambda: engine.num_active == 0)
        assert engine.cancelled


def test_reader_that_never_reads_is_cut_off() -> None:
    engine = ScriptedEngine(answer=["x" * 200_000] * 150)
    with running(engine, send_seconds=0.2) as server:
        held = server.post_raw("/generate_stream", b'{"inputs":"a","parameters":{"max_new_tokens":150}}')
        wait_until(lambda: not server.listener.server_state.tasks and engine.submitted)
        wait_until(lambda: not server.listener.server_state.connections)
        held.close()


def test_request_that_takes_too_long_fails_and_is_cancelled() -> None:
    engine = ScriptedEngine()
    engine.may_run.clear()
    with running(engine, max_request_seconds=0.1) as server, server.client() as client:
        response = client.post("/generate", json={"inputs": "a"})
        assert response.status_code == 424
        assert "longer than 0.1 s" in response.json()["error"]
        wait_until(lambda: engine.num_active == 0)


def test_many_clients_at_once_each_get_their_own_answer() -> None:
    import concurrent.futures

    with running(ScriptedEngine(step_seconds=0.002)) as server, server.client() as client:

        def ask(number: int) -> str:
            body = {"inputs": "a", "parameters": {"max_new_tokens": 1 + number % 7}, "stream": number % 2 == 0}
            response = client.post("/generate", json=body)
            if number % 2 == 0:
                return str(events_of(response.text)[-1]["generated_text"])
            return str(response.json()["generated_text"])

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(64)))
    pieces = server.engine.answer
    assert answers == ["".join(pieces[: 1 + number % 7]) for number in range(64)]
