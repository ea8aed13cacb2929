"""`deepfew serve` on a GPU, driven over HTTP: the device-driven path says what the host-driven one and the CPU say."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.plan import Plan, PlannedExpert, write_plan
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from tests.expert_store.damage import damage
from tests.server.cli.processes import Server

pytestmark = pytest.mark.gpu
PROMPTS = ("The capital of France is", "Once upon a time", "def main():", "Question: Calculate 159 - 43.")
WAYS = {
    "device": ("--device", "cuda", "--decode-path", "device"),
    "host": ("--device", "cuda", "--decode-path", "host"),
    "budget": ("--device", "cuda", "--host-memory", "25%"),
    "cpu": ("--device", "cpu"),
    "few": ("--device", "cuda", "--decode-path", "device", "--admin-key", "the-admin-key-of-the-test"),
    "damaged": ("--device", "cuda", "--decode-path", "device"),
    "biased": ("--device", "cuda", "--decode-path", "device", "--resident-bias", "0.2"),
}
ADMIN = {"Authorization": "Bearer the-admin-key-of-the-test"}
DAMAGED = (7, 27)
"""Layer and expert; of the prompts only the third comes to need it."""


class Servers:
    """One of each way, started when a test first wants it; those that a test wants together load side by side."""

    def __init__(self, start: Callable[[str], Server]) -> None:
        self._start, self._started = start, dict[str, Server]()

    def __getitem__(self, name: str) -> Server:
        return self.of(name)[0]

    def of(self, *names: str) -> list[Server]:
        """Those of these names, ready."""
        self._started |= {name: self._start(name) for name in names if name not in self._started}
        for name in names:
            self._started[name].wait_for("/health/ready", 240)
        return [self._started[name] for name in names]

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._started.values():
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def stores(tiny_store: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those that are not the whole bundled checkpoint: a quarter of it, and one with a damaged expert."""
    folder = tmp_path_factory.mktemp("stores")
    prepare(Checkpoint.open(tiny_checkpoint), folder / "few", SelectionRequest(count=16)).run()
    shutil.copytree(tiny_store, folder / "damaged")
    damage(folder / "damaged", *DAMAGED)
    return {"few": folder / "few", "damaged": folder / "damaged"}


@pytest.fixture(scope="module")
def servers(tiny_store: Path, stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    logs = tmp_path_factory.mktemp("logs")
    profiles = tmp_path_factory.mktemp("profiles")
    for name, experts in {"low": range(24), "high": range(20, 64)}.items():
        plan = Plan(8, 64, {"kind": "index"}, tuple(PlannedExpert((expert,) * 8) for expert in experts))
        write_plan(profiles / f"{name}.json", plan)
    common = ("--slots", "16", "--dtype", "float32", "--max-context-tokens", "512", "--log-format", "json")
    named = ("--profiles", str(profiles))

    def start(name: str) -> Server:
        flags = (*common, *(named if name != "few" else ()), *WAYS[name])
        return Server(stores.get(name, tiny_store), logs / name, *flags)

    with Servers(start) as found:
        yield found


def post(server: Server, prompt: str, **parameters: Any) -> httpx.Response:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": 48, "details": True, **parameters}}
    return httpx.post(server.url + "/generate", json=body, timeout=300)


def generate(server: Server, prompt: str, **parameters: Any) -> str:
    response = post(server, prompt, **parameters)
    assert response.status_code == 200, response.text
    return response.json()["generated_text"]


def deficit(server: Server, prompt: str, **parameters: Any) -> float:
    return post(server, prompt, **parameters).json()["details"]["deficit"]["overall"]


def change(server: Server, what: str, **body: Any) -> dict[str, Any]:
    """Grow or shrink, and wait until it is done."""
    response = httpx.post(f"{server.url}/experts/{what}", json=body, headers=ADMIN, timeout=60)
    assert response.status_code in (200, 202), response.text
    until = time.monotonic() + 60
    while (growth := httpx.get(server.url + "/experts/growth").json())["state"] != "idle":
        assert time.monotonic() < until, growth
        time.sleep(0.02)
    assert growth["error"] is None
    return response.json()


def test_greedy_texts_are_equal_on_every_path_alone_and_together(servers):
    servers.of("cpu", "device", "host", "budget")
    wanted = [generate(servers["cpu"], prompt) for prompt in PROMPTS]
    for name in ("device", "host", "budget", "cpu"):
        server = servers[name]
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


def test_requests_with_pools_of_their_own_get_what_the_cpu_gives(servers):
    sizes = (16, 0.5)
    wanted = [generate(servers["cpu"], PROMPTS[1], pool=size) for size in sizes]
    assert len({*wanted, generate(servers["cpu"], PROMPTS[1])}) == 3
    with ThreadPoolExecutor(2) as clients:
        together = [clients.submit(generate, servers["device"], PROMPTS[1], pool=size) for size in sizes]
        assert [one.result() for one in together] == wanted
    assert deficit(servers["device"], PROMPTS[1], pool=16) > 0.0


def test_a_store_is_fetched_for_grown_and_shrunk_while_it_serves(servers):
    """In this order: fetching wants what the store lacks, and afterwards the store is as it was."""
    server, cpu = servers.of("few", "cpu")
    whole = [generate(cpu, prompt) for prompt in PROMPTS]
    few = [generate(server, prompt) for prompt in PROMPTS]
    assert all(deficit(server, prompt) > 0.1 for prompt in PROMPTS)
    with ThreadPoolExecutor(2 * len(PROMPTS)) as clients:
        fetched = [clients.submit(generate, server, prompt, on_missing="fetch") for prompt in PROMPTS]
        plain = [clients.submit(generate, server, prompt) for prompt in PROMPTS]
        assert [one.result() for one in fetched] == whole
        assert [one.result() for one in plain] == few
    assert deficit(server, PROMPTS[0], on_missing="fetch") == 0.0
    assert httpx.get(server.url + "/experts").json()["totals"]["host_misses"] > 0

    with ThreadPoolExecutor(4) as clients:
        busy = [clients.submit(post, server, prompt, max_new_tokens=256) for prompt in PROMPTS]
        change(server, "grow", count=48)
        assert all(one.result().status_code == 200 for one in busy)
    until = time.monotonic() + 30
    while deficit(server, PROMPTS[0]) > 0.0:
        assert time.monotonic() < until, "what the store grew by is not served"
    assert [generate(server, prompt) for prompt in PROMPTS] == whole

    change(server, "shrink", indices=list(range(16, 64)))
    assert [generate(server, prompt) for prompt in PROMPTS] == few
    assert generate(server, PROMPTS[1], on_missing="fetch") == whole[1]


def test_a_damaged_expert_fails_only_the_requests_that_need_it(servers):
    damaged, cpu = servers.of("damaged", "cpu")
    wanted = {prompt: generate(cpu, prompt) for prompt in PROMPTS}
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        answers = dict(zip(PROMPTS, clients.map(lambda prompt: post(damaged, prompt), PROMPTS), strict=True))
    failed = {prompt for prompt, answer in answers.items() if answer.status_code == 424}
    assert failed == {PROMPTS[2]}
    assert all(
        answer.json()["generated_text"] == wanted[prompt] for prompt, answer in answers.items() if prompt not in failed
    )
    said = [record["message"] for record in damaged.records()]
    assert any(f"expert {DAMAGED[1]} of layer {DAMAGED[0]} is read again" in message for message in said)
    assert "deepfew_store_errors_total" in httpx.get(damaged.url + "/metrics").text


def test_a_bias_for_resident_experts_saves_misses(servers):
    rates = {}
    for name in ("device", "biased"):
        before = httpx.get(servers[name].url + "/experts").json()["totals"]
        generate(servers[name], PROMPTS[1], max_new_tokens=200)
        after = httpx.get(servers[name].url + "/experts").json()["totals"]
        hits, misses = (after[what] - before[what] for what in ("hits", "misses"))
        rates[name] = hits / (hits + misses)
    assert rates["biased"] > rates["device"] + 0.02


def test_info_and_log_say_which_path_serves_and_why(servers):
    paths = {
        name: httpx.get(server.url + "/info").json()["decode_path"]
        for name, server in zip(WAYS, servers.of(*WAYS), strict=True)
    }
    on_host = {"host", "cpu"}
    assert paths == {name: "host" if name in on_host else "device" for name in WAYS}
    said = {
        name: " ".join(record["message"] for record in server.records())
        for name, server in zip(WAYS, servers.of(*WAYS), strict=True)
    }
    assert "on the device-driven path" in said["device"]
    assert "the others are read from the disk when a token needs them" in said["budget"]
    generate(servers["budget"], PROMPTS[1])
    tiers = httpx.get(servers["budget"].url + "/info").json()["tiers"]
    assert tiers["host_bytes"] > 0
    assert tiers["disk_reads"] > tiers["host_experts"], "tokens read from the disk"
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
