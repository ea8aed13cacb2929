"""Fetched bytes of two real replicas of the bundled checkpoint, beside what the simulation says of them.

Two CPU replicas run behind the front of `deepfew cluster`. Requests of two kinds of text come in at random, one after
the other, each under the profile of its kind. Both policies see the same requests: two choices, and affinity. The
simulation of `benchmarks.affinity` gets the routing of the same texts under the same profiles.

- *fetched*: bytes that went into slots after a third of the requests, for one generated token;
- *fall*: share of these bytes that affinity saves.
- *short*: median time of a request about the state.

    python -m benchmarks.service.affinity_processes [--requests 60] [--save]     # needs deepfew[ray]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.affinity import Kinds, Machine, Simulation, Traffic, summary
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from benchmarks.harness.servers import free_port
from server.cli.main import main as deepfew
from server.cluster.choice import ChoiceOptions

KINDS = ("arithmetic", "stories_synth")
TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
PROFILE_EXPERTS, SLOTS = 16, 24
PROMPT_CHARACTERS, ANSWER_TOKENS = 160, 32
POLICIES = {"two choices": ChoiceOptions(block=0.0, held=0.0, wanted=0.0), "affinity": ChoiceOptions()}
STATISTICS_SECONDS = 0.5


def prepare(folder: Path) -> None:
    """A store, and a profile for each kind of text."""
    texts = [f"{kind}={TEXTS / f'{kind}.txt'}" for kind in KINDS]
    statistics = str(folder / "stats.safetensors")
    steps = [
        ["extract", str(BUNDLED), str(folder / "store")],
        ["calibrate", str(BUNDLED), *texts, "--max-tokens", "2048", "--price", "0", "--out", statistics],
        *(
            ["plan", "--stats", statistics, "--domains", kind, "--count", str(PROFILE_EXPERTS), "--criterion",
             "gate-mass", "--out", str(folder / "profiles" / f"{kind}.json")]
            for kind in KINDS
        ),
    ]  # fmt: skip
    (folder / "profiles").mkdir()
    for step in steps:
        assert deepfew(step) == 0, step


def requests(count: int) -> list[tuple[int, str]]:
    """(kind, prompt), the same at every call."""
    draw = random.Random(0)
    texts = [(TEXTS / f"{kind}.txt").read_text() for kind in KINDS]
    chosen = []
    for _ in range(count):
        kind = draw.randrange(len(KINDS))
        start = draw.randrange(len(texts[kind]) - PROMPT_CHARACTERS)
        chosen.append((kind, texts[kind][start : start + PROMPT_CHARACTERS]))
    return chosen


def measure(folder: Path, options: ChoiceOptions, count: int) -> dict[str, float]:
    """Serve the requests from two replicas; bytes for a token, and the median time of a short request."""
    import ray
    from ray import serve

    from server.cluster.application import build
    from server.cluster.settings import read_cluster

    config = folder / "cluster.toml"
    config.write_text(
        f'store = "{folder}/store"\n[model]\nslots = {SLOTS}\nmemory_balance = "fixed"\ndevice = "cpu"\n'
        f'[masks]\nprofiles = "{folder}/profiles"\n'
        f"[cluster]\nreplicas = 2\nstatistics_seconds = {STATISTICS_SECONDS}\n"
    )
    port = free_port()
    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(*read_cluster(config, {}), options), name="deepfew", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            return _measured(client, count)
    finally:
        serve.shutdown()
        ray.shutdown()


def _measured(client: httpx.Client, count: int) -> dict[str, float]:
    before = generated = 0.0
    for at, (kind, prompt) in enumerate(requests(count)):
        if at == count // 3:
            before = _fetched(client)
        body = {"prompt": prompt, "profile": KINDS[kind], "max_tokens": ANSWER_TOKENS, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        answer = client.post("/v1/completions", json={"model": "tiny-moe", **body})
        answer.raise_for_status()
        generated += answer.json()["usage"]["completion_tokens"] if at >= count // 3 else 0
    fetched = _fetched(client) - before
    return {"fetched_bytes_per_token": fetched / generated, "short_seconds": short_seconds(client)}


def _fetched(client: httpx.Client) -> float:
    found = re.findall(r"^deepfew_expert_fetch_bytes_total\S* (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def short_seconds(client: httpx.Client, count: int = 40) -> float:
    """The median time of a request about the state."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        client.get("/health/ready").raise_for_status()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def recorded(folder: Path) -> Kinds:
    """The routing of the texts, each under its profile: the router's choice among the profile's experts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from extractor.planning.plan import read_plan
    from server.masks.profiles import mask_of_plan

    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    traces: list[npt.NDArray[np.uint8]] = []
    for kind in KINDS:
        mask = mask_of_plan(read_plan(folder / "profiles" / f"{kind}.json"), 8, 64).allowed
        ids = tokenizer((TEXTS / f"{kind}.txt").read_text(), verbose=False)["input_ids"][:2048]
        parts = []
        for start in range(0, len(ids), 256):
            with torch.no_grad():
                logits = model(torch.tensor([ids[start : start + 256]]), output_router_logits=True).router_logits
            picks = [
                of_layer.masked_fill(~torch.tensor(allowed), -torch.inf).topk(8).indices
                for of_layer, allowed in zip(logits, mask, strict=True)
            ]
            parts.append(torch.stack(picks, 1))
        traces.append(torch.cat(parts).numpy().astype(np.uint8))
    return Kinds.of(traces, 64)


def simulate(kinds: Kinds, policy: str, expert_bytes: int) -> dict[str, float]:
    """Requests of the same shape, one after the other."""
    traffic = Traffic(
        0.5, zipf=0.0, drift_seconds=1e9, turns=(1, 1), prompt_tokens=(40, 60), known_share=1.0,
        answer_tokens=(ANSWER_TOKENS, ANSWER_TOKENS), statistics_seconds=STATISTICS_SECONDS,
    )  # fmt: skip
    machine = Machine(SLOTS, expert_bytes, base_seconds=0.004, token_seconds=1e-5, bytes_per_second=1e9, streams=False)
    return summary(Simulation(kinds, machine, traffic, 2, policy, 300.0).run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/affinity_processes.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        manifest = json.loads((folder / "store" / "manifest.json").read_text())
        expert_bytes = sum(deep["bytes"] for deep in manifest["deep_experts"]) // (64 * 8)
        kinds = recorded(folder)
        rows: dict[str, dict[str, Any]] = {}
        for policy, options in POLICIES.items():
            simulated = simulate(kinds, policy, expert_bytes)["fetched_bytes_per_token"]
            rows[policy] = {"simulated_bytes_per_token": simulated, **measure(folder, options, arguments.requests)}
            print(policy, rows[policy], flush=True)
    falls = {
        name: 1 - rows["affinity"][name] / rows["two choices"][name]
        for name in ("fetched_bytes_per_token", "simulated_bytes_per_token")
    }
    print(table(("policy", "measured KB/token", "simulated KB/token"), [
        (policy, row["fetched_bytes_per_token"] / 1e3, row["simulated_bytes_per_token"] / 1e3)
        for policy, row in rows.items()
    ]))  # fmt: skip
    print(f"fall: measured {falls['fetched_bytes_per_token']:.0%}, simulated {falls['simulated_bytes_per_token']:.0%}")
    result = {"benchmark": "affinity_processes", **environment(), "slots": SLOTS, "profile_experts": PROFILE_EXPERTS,
              "num_requests": arguments.requests, "policies": rows, "fall": falls}  # fmt: skip
    finish("affinity_processes", result, save=arguments.save)


if __name__ == "__main__":
    main()
