"""Health, information, experts, the key, and how a server begins and ends."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import warnings

import httpx
import pytest

from server.api.admin.schemas import ExpertsResponse, InfoResponse
from server.model.load_progress import LoadProgress, Phase
from server.serving.logging_setup import JsonFormatter, TextFormatter, configure_logging
from server.serving.service import LoadedModel
from tests.server.api.running import running, wait_until
from tests.server.api.scripted import EXPERTS, LAYERS, ScriptedEngine, loaded

KEY = "correct-horse-battery"
ROUTES = [
    ("GET", "/health"),
    ("GET", "/health/ready"),
    ("GET", "/info"),
    ("GET", "/experts"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("POST", "/"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
]


def test_ready_server_says_so() -> None:
    with running() as server, server.client() as client:
        assert client.get("/health/live").json() == {"status": "ok"}
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/health/ready").json() == {"state": "ready", "reason": "", "progress": 1.0, "phase": ""}


def test_while_loading_it_is_live_and_says_what_it_does_and_how_far() -> None:
    go = threading.Event()

    def load(progress: LoadProgress) -> LoadedModel:
        progress(Phase.SLOTS, 0.25)
        go.wait(10)
        return loaded(ScriptedEngine())

    with running(load=load) as server, server.client() as client:
        assert client.get("/health/live").status_code == 200
        wait_until(lambda: client.get("/health/ready").json()["progress"] == 0.25)
        response = client.get("/health/ready")
        assert response.status_code == 503
        assert response.json() == {
            "state": "loading",
            "reason": "loading: filling slots (25%)",
            "progress": 0.25,
            "phase": "filling slots",
            "error": "loading: filling slots (25%)",
            "error_type": "healthcheck",
        }
        assert client.get("/health").status_code == 200
        for response in (client.post("/generate", json={"inputs": "a"}), client.get("/info"), client.get("/experts")):
            assert response.status_code == 503
            assert response.json()["error_type"] == "healthcheck"
            assert response.headers["retry-after"] == "2"
        assert "deepfew_load_progress_ratio 0.25" in client.get("/metrics").text
        go.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/generate", json={"inputs": "a"}).status_code == 200


def test_failed_load_is_unhealthy_without_its_text_and_ends_the_server() -> None:
    def load(progress: LoadProgress) -> LoadedModel:
        raise RuntimeError("/secret/path is corrupt")

    with running(load=load) as server, server.client() as client:
        wait_until(lambda: server.service.error is not None)
        response = client.get("/health")
        assert response.status_code == 503
        assert "/secret/path" not in response.text


@pytest.mark.parametrize("how", ["failed", "stalled"])
def test_broken_engine_is_neither_ready_nor_healthy(how: str) -> None:
    engine = ScriptedEngine()
    with running(engine, stall_seconds=5) as server, server.client() as client:
        if how == "failed":
            engine.state, engine.reason = "failed", "CUDA error: device-side assert"
        else:
            engine.stalled_seconds = 9.0
        for path in ("/health", "/health/ready"):
            response = client.get(path)
            assert response.status_code == 503
            assert ("device-side assert" if how == "failed" else "no progress for 9 s") in response.json()["error"]
        assert client.get("/health/live").status_code == 200
        assert client.post("/generate", json={"inputs": "a"}).status_code == 503
        assert "deepfew_healthy 0.0" in client.get("/metrics").text


def test_info_and_experts_have_their_documented_shape() -> None:
    engine = ScriptedEngine()
    encodings = {"gate_up_proj": "int4 in groups of 64 with zero points"}
    model = loaded(engine, encodings=encodings, expert_bits=4.375)
    with running(engine, load=lambda progress: model) as server, server.client() as client:
        wait_until(lambda: server.service.loaded is not None)
        info = client.get("/info").json()
        InfoResponse.model_validate(info, strict=True)
        assert (info["model_id"], info["max_total_tokens"]) == ("scripted", 200)
        assert (info["expert_encodings"], info["expert_bits"], info["trunk_bits"]) == (encodings, 4.375, 16)
        assert info["kv_memory"] == {"block_tokens": 32, "num_blocks": 10, "used_blocks": 3, "cached_blocks": 2}
        assert info["memory"] == {
            "is_moving": True, "reason": "", "slot_bytes": 3000, "kv_bytes": 1000, "least_slot_bytes": 600,
            "least_kv_bytes": 500, "moves_to_slots": 2, "moves_to_kv": 1,
        }  # fmt: skip
        experts = client.get("/experts").json()
    ExpertsResponse.model_validate(experts, strict=True)
    for name in ("available", "resident", "uses", "demand", "served_mass", "demand_mass"):
        assert [len(row) for row in experts[name]] == [EXPERTS] * LAYERS
    for name in ("deficit", "hits", "misses", "evictions", "fetch_bytes", "fetch_seconds", "expert_bytes"):
        assert len(experts[name]) == LAYERS
    assert experts["totals"]["resident"] == 4
    assert experts["totals"]["hits"] == 30
    assert experts["shards"] == [{"file": "experts/deep-00000.safetensors", "bytes": 4096, "experts": [0, 1]}]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_liveness_needs_the_key(method: str, path: str) -> None:
    with running(api_key=KEY) as server, server.client() as client:
        assert client.get("/health/live").status_code == 200
        wrong = [
            {},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
            {"x-api-key": KEY.upper()},
            {"x-api-key": ""},
        ]
        for headers in wrong:
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error_type"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"authorization": f"bearer  {KEY}"}):
            assert client.request(method, path, headers=headers).status_code != 401
    assert not server.engine.submitted


def test_key_with_bytes_beyond_ascii_is_wrong_and_no_failure() -> None:
    with running(api_key=KEY) as server, server.raw() as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nHost: localhost\r\nX-API-Key: \xff\xfe\xc3\xa9\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 401 ")


def test_first_signal_lets_running_requests_finish_and_refuses_new_ones() -> None:
    engine = ScriptedEngine(pause_after=1)
    with running(engine, drain_seconds=10.0) as server, server.client() as client:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(client.post("/generate", json={"inputs": "a"})))
        asking.start()
        wait_until(lambda: engine.num_active == 1)
        server.listener.handle_exit(15, None)
        with server.client() as other:
            ready = other.get("/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "draining")
            assert other.post("/generate", json={"inputs": "a"}).status_code == 503
            assert other.get("/health/live").status_code == 200
        engine.resume.set()
        asking.join(30)
        assert answers[0].json() == {"generated_text": " Paris, the city of light."}
        server.thread.join(30)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_and_answers_are_logged_only_when_asked_for(
    log_prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="server")
    with running(log_prompts=log_prompts) as server, server.client() as client:
        client.post("/generate", json={"inputs": "secret-one"}, headers={"x-request-id": "mine"})
        client.post("/generate", json={"inputs": "secret-two", "stream": True})
        client.post("/v1/completions", json={"model": "scripted", "prompt": "secret-three"})
        chat = {"model": "scripted", "messages": [{"role": "user", "content": "secret-four"}]}
        client.post("/v1/chat/completions", json=chat)
        client.post("/generate", json={"inputs": 1, "secret-five": "secret-six"})
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("server")]
    assert next(json.loads(line)["request_id"] for line in lines if '"/generate"' in line) == "mine"
    text = "\n".join(lines)
    assert [f"secret-{name}" in text for name in ("one", "two", "three", "four")] == [log_prompts] * 4
    assert ("Paris" in text) == log_prompts
    assert "secret-five" not in text
    assert "secret-six" not in text


def test_log_lines_cannot_be_forged() -> None:
    with running() as server, server.raw() as connection:
        connection.sendall(b"GET /a%0d%0aforged%1b[31m HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 404 ")
    record = logging.LogRecord("server", logging.INFO, "", 0, "message", (), None)
    record.path = "/a\r\nforged\x1b[31m"
    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert line.isprintable()
        assert "forged" in line


def test_a_warning_of_a_library_is_a_line_of_the_log() -> None:
    stream = io.StringIO()
    configure_logging("json", "info", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a field has no effect", UserWarning, stacklevel=1)
    (line,) = stream.getvalue().splitlines()
    assert "a field has no effect" in json.loads(line)["message"]


def test_drain_is_bounded() -> None:
    engine = ScriptedEngine()
    engine.may_run.clear()
    with running(engine, drain_seconds=0.3) as server:
        held = server.post_raw("/generate_stream", b'{"inputs":"a"}')
        wait_until(lambda: engine.num_active == 1)
        started = time.monotonic()
        server.listener.handle_exit(15, None)
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert time.monotonic() - started > 0.2
        assert engine.num_active == 0
        with held:
            assert b'"error_type":"healthcheck"' in held.recv(4096), "another server can answer"
