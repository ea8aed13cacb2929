"""The real engine behind the real server, and what goes wrong around them: nothing hangs, leaks or answers wrongly."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import logging
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from expert_store.residency import slots
from server.model.load_progress import LoadProgress
from server.serving.loading import load
from server.serving.service import LoadedModel
from server.settings.load import load_settings
from tests.server.api.running import Running, events_of, running, wait_until

PROMPTS = ["The capital of France is", "Once upon a time", "Water is", "The moon", "In the city of"]


def loader(store: Path, **flags: Any) -> Callable[[LoadProgress], LoadedModel]:
    """Loads the store on the CPU in float32, where equal means equal."""
    resolved = load_settings({"store": str(store), "device": "cpu", "dtype": "float32", **flags}, environ={})
    return lambda progress: load(resolved.settings, progress)


@pytest.fixture(scope="module")
def store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of this module's own, since these tests write to it."""
    found = tmp_path_factory.mktemp("faults") / "tiny"
    shutil.copytree(tiny_store, found)
    return found


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Running]:
    flags = {"slots": 16, "max_batch_size": 2, "max_queue_requests": 4, "prefill_chunk_tokens": 32}
    with running(load=loader(store, **flags)) as found:
        wait_until(lambda: found.service.loaded is not None, seconds=120)
        yield found


@pytest.fixture(scope="module")
def alone(server: Running) -> dict[str, str]:
    """The answer to each prompt when nothing else runs."""
    return {prompt: ask(server, prompt).json()["generated_text"] for prompt in PROMPTS}


def ask(server: Running, prompt: str, *, tokens: int = 12, stream: bool = False) -> httpx.Response:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens}, "stream": stream}
    return httpx.post(server.url + "/generate", json=body, timeout=60)


def is_idle(server: Running) -> bool:
    model = server.service.loaded
    assert model is not None
    status = model.engine.status()
    return status.num_running == status.num_waiting == status.kv_tokens == 0


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_burst_of_ten_times_the_capacity_is_answered_or_refused_and_leaves_nothing(
    server: Running, alone: dict[str, str]
) -> None:
    def one(number: int) -> tuple[int, str, str]:
        prompt = PROMPTS[number % len(PROMPTS)]
        response = ask(server, prompt, stream=number % 2 == 0)
        if response.status_code != 200:
            assert int(response.headers["retry-after"]) >= 1
            refused.set()
            return response.status_code, prompt, ""
        if number % 2 == 0:
            return 200, prompt, events_of(response.text)[-1]["generated_text"]
        return 200, prompt, response.json()["generated_text"]

    refused, model = threading.Event(), server.service.loaded
    assert model is not None
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        model.engine.between_steps(lambda: assert_set(refused))  # so that the queue fills, however fast the engine is
        answers = list(pool.map(one, range(60)))
    assert {status for status, _, _ in answers} == {200, 429}
    for status, prompt, text in answers:
        if status == 200:
            assert text == alone[prompt]
    wait_until(lambda: is_idle(server))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["queue", "prefill", "decode"])
def test_client_that_leaves_frees_everything(server: Running, when: str, stream: bool) -> None:
    model = server.service.loaded
    assert model is not None
    long = " ".join(["once upon a time"] * 150)
    body = {"inputs": long, "parameters": {"max_new_tokens": 300}, "stream": stream}
    if when == "decode":
        body["inputs"] = "Once upon a time"
    held: list[socket.socket] = []
    num = 5 if when == "queue" else 1
    generated = model.engine.status().totals.generated_tokens
    for _ in range(num):
        held.append(server.post_raw("/generate", json.dumps(body).encode()))
    if when == "queue":
        wait_until(lambda: model.engine.status().num_waiting >= 3, seconds=20)
    elif when == "prefill":
        wait_until(lambda: model.engine.status().num_running == 1, seconds=20)
    else:
        wait_until(lambda: model.engine.status().totals.generated_tokens > generated + 2, seconds=20)
    for connection in held:
        connection.close()
    wait_until(lambda: is_idle(server), seconds=20)
    wait_until(lambda: not server.listener.server_state.tasks)


def test_slots_get_memory_that_no_request_needs_and_info_tells_it(server: Running, alone: dict[str, str]) -> None:
    ask(server, "Once upon a time", tokens=70)  # steps enough for a look
    with server.client() as client:
        memory = client.get("/info").json()["memory"]
    assert memory["is_moving"]
    assert memory["moves_to_slots"] >= 1
    assert memory["kv_bytes"] >= memory["least_kv_bytes"]
    assert memory["slot_bytes"] > memory["least_slot_bytes"]
    assert {prompt: ask(server, prompt).json()["generated_text"] for prompt in PROMPTS} == alone


def test_prompt_at_the_context_limit_is_answered_and_one_more_token_is_refused(server: Running) -> None:
    model = server.service.loaded
    assert model is not None
    limit = model.max_context_tokens
    with server.client(timeout=120) as client:
        for extra, status in ((0, 200), (1, 400)):
            prompt = [500] * (limit - 1 + extra)  # the longest leaves room for one of the two tokens
            body = {"model": model.name, "prompt": prompt, "max_tokens": 2, "temperature": 0}
            response = client.post("/v1/completions", json=body)
            assert response.status_code == status
            if status == 400:
                assert response.json()["error"]["code"] == "context_length_exceeded"
        bad_id = {"model": model.name, "prompt": [10**6], "max_tokens": 1}
        assert client.post("/v1/completions", json=bad_id).status_code == 400


def test_same_seed_gives_the_same_text_in_any_company(server: Running) -> None:
    body = {"inputs": "Once upon a", "parameters": {"max_new_tokens": 16, "temperature": 1.0, "seed": 2**64 - 1}}

    def once(_: int) -> Any:
        return httpx.post(server.url + "/generate", json=body, timeout=60).json()["generated_text"]

    first = once(0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        others = [pool.submit(ask, server, prompt) for prompt in PROMPTS[:2]]
        assert set(pool.map(once, range(2))) == {first}
        for other in others:
            other.result()


def test_corrupt_shard_fails_the_requests_that_need_it_and_is_named_in_the_log_alone(
    server: Running, store: Path, alone: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    shards = sorted((store / "experts").iterdir())
    whole = {shard: shard.read_bytes() for shard in shards}
    for shard, content in whole.items():
        with shard.open("r+b") as file:
            file.seek(len(content) // 2)
            file.write(bytes(byte ^ 0xFF for byte in content[len(content) // 2 :]))
    try:
        with caplog.at_level(logging.ERROR):
            responses = [ask(server, prompt, stream=number % 2 == 0) for number, prompt in enumerate(PROMPTS)]
        failed = [response for response in responses if "could not be read" in response.text]
        assert failed
        for response in failed:
            assert response.status_code == (424 if "application/json" in response.headers["content-type"] else 200)
            assert str(store) not in response.text
            assert events_of(response.text)[-1]["error_type"] == "generation" if response.status_code == 200 else True
        assert re.search(r"deep-\d{5}\.safetensors", caplog.text)
        counted = re.search(rb'deepfew_store_errors_total\{kind="corrupt"\} (\d+)', server.metrics.render())
        assert counted is not None
        assert int(counted.group(1)) == len(failed)
        assert httpx.get(server.url + "/health/ready").status_code == 200
    finally:
        for shard, content in whole.items():
            shard.write_bytes(content)
    wait_until(lambda: is_idle(server))
    for prompt, text in alone.items():
        assert ask(server, prompt).json()["generated_text"] == text


def test_disk_that_cannot_be_read_fails_the_requests_that_need_it_and_no_others(
    server: Running, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as disk, caplog.at_level(logging.ERROR):
        disk.setattr("os.preadv", fail)
        responses = [ask(server, prompt) for prompt in PROMPTS]
    failed = [response for response in responses if response.status_code != 200]
    assert failed  # sixteen slots of sixty-four: most prompts need what is not in one
    assert {(response.status_code, response.json()["error_type"]) for response in failed} == {(424, "generation")}
    assert "Input/output error" in caplog.text
    assert re.search(r"deep-\d{5}\.safetensors", caplog.text)
    wait_until(lambda: is_idle(server))
    for prompt, text in alone.items():
        assert ask(server, prompt).json()["generated_text"] == text


def test_read_only_store_is_served_and_costs_only_the_usage_file(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("server.engine.snapshots.UsageFile.write", refuse)
    with running(load=loader(store, slots=64)) as server:
        wait_until(lambda: server.service.loaded is not None, seconds=120)
        assert ask(server, PROMPTS[0], tokens=3).status_code == 200
    assert "could not be saved" in caplog.text


def test_slots_that_cannot_be_allocated_are_said_with_what_to_set(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(num_bytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(slots, "ReturnableMemory", fail)
    with running(load=loader(store, slots=64)) as server:
        wait_until(lambda: server.service.error is not None, seconds=120)
    assert re.search(r"no memory on cpu for 64 slots of \d+ bytes .*--slots", str(server.service.error))


def test_memory_that_does_not_suffice_is_said_with_a_value_that_would(store: Path) -> None:
    with running(load=loader(store, slots_memory="1KiB")) as server:
        wait_until(lambda: server.service.error is not None, seconds=120)
    assert re.search(r"at least \d+ bytes", str(server.service.error))
