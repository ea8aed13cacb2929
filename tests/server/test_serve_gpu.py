"""`deepfew serve` on a GPU, driven over HTTP: the device-driven path says what the host-driven one and the CPU say."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from extractor.plan import Plan, PlannedExpert, write_plan
from tests.server.test_cli import Server

pytestmark = pytest.mark.gpu
PROMPTS = ("The capital of France is", "Once upon a time", "def main():", "Question: Calculate 159 - 43.")
WAYS = {
    "device": ("--device", "cuda", "--decode-path", "device"),
    "host": ("--device", "cuda", "--decode-path", "host"),
    "budget": ("--device", "cuda", "--host-memory", "25%"),
    "cpu": ("--device", "cpu"),
}


@pytest.fixture(scope="module")
def servers(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    logs = tmp_path_factory.mktemp("logs")
    profiles = tmp_path_factory.mktemp("profiles")
    for name, experts in {"low": range(24), "high": range(20, 64)}.items():
        plan = Plan(8, 64, {"kind": "index"}, tuple(PlannedExpert((expert,) * 8) for expert in experts))
        write_plan(profiles / f"{name}.json", plan)
    common = ("--slots", "16", "--dtype", "float32", "--max-context-tokens", "512", "--log-format", "json")
    common = (*common, "--profiles", str(profiles))
    started = {name: Server(tiny_store, logs / name, *common, *flags) for name, flags in WAYS.items()}
    try:
        for server in started.values():
            server.wait_for("/health/ready", 240)
        yield started
    finally:
        for server in started.values():
            server.process.kill()
            server.process.wait()


def generate(server: Server, prompt: str, **parameters: Any) -> str:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 48, **parameters}}
    response = httpx.post(server.url + "/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


def test_greedy_texts_are_equal_on_every_path_alone_and_together(servers):
    wanted = [generate(servers["cpu"], prompt) for prompt in PROMPTS]
    for name, server in servers.items():
        assert [generate(server, prompt) for prompt in PROMPTS] == wanted, name
        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            assert list(clients.map(lambda prompt, server=server: generate(server, prompt), PROMPTS)) == wanted, name


def test_requests_with_profiles_of_their_own_run_together_as_alone(servers):
    wanted = [generate(servers["cpu"], PROMPTS[1], profile=profile) for profile in ("low", "high")]
    assert len({*wanted, generate(servers["cpu"], PROMPTS[1])}) == 3
    for name in ("device", "host"):
        with ThreadPoolExecutor(3) as clients:
            plain = clients.submit(generate, servers[name], PROMPTS[2])
            together = [clients.submit(generate, servers[name], PROMPTS[1], profile=p) for p in ("low", "high")]
            assert [one.result() for one in together] == wanted, name
            assert plain.result() == generate(servers["cpu"], PROMPTS[2])


def test_info_and_log_say_which_path_serves_and_why(servers):
    paths = {name: httpx.get(server.url + "/info").json()["decode_path"] for name, server in servers.items()}
    assert paths == {"device": "device", "host": "host", "budget": "host", "cpu": "host"}
    said = {name: " ".join(record["message"] for record in server.records()) for name, server in servers.items()}
    assert "on the device-driven path" in said["device"]
    assert "cannot pin all" in said["budget"]
    assert "page-locked host memory stand between disk and slots" in said["budget"]
    assert "need a CUDA device" in said["cpu"]


def test_a_stream_gives_the_text_token_by_token(servers):
    server = servers["device"]
    body = {"inputs": PROMPTS[1], "parameters": {"max_new_tokens": 48}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=60) as response:
        events = [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"]
    assert events[-1]["generated_text"] == generate(servers["host"], PROMPTS[1])
    assert len(events) == 48


def test_a_client_that_hangs_up_frees_its_row_and_leaves_the_others_text_alone(servers):
    server = servers["device"]
    wanted = generate(server, PROMPTS[1])
    body = {"inputs": PROMPTS[1], "parameters": {"max_new_tokens": 480}}
    with ThreadPoolExecutor(1) as clients:
        with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=60) as response:
            next(response.iter_lines())
            other = clients.submit(generate, server, PROMPTS[1])
        assert other.result() == wanted
    until = time.monotonic() + 10
    while "deepfew_requests_running 0" not in httpx.get(server.url + "/metrics").text:
        assert time.monotonic() < until, "the cancelled request still runs"
        time.sleep(0.05)


def test_seeded_sampling_is_the_same_alone_and_in_company(servers):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    for name in ("device", "host"):
        alone = generate(servers[name], PROMPTS[1], **options)
        with ThreadPoolExecutor(3) as clients:
            crowd = [clients.submit(generate, servers[name], prompt, do_sample=True) for prompt in PROMPTS[2:]]
            assert generate(servers[name], PROMPTS[1], **options) == alone, name
            assert all(one.result() for one in crowd)
