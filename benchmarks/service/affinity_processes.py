"""Fetched bytes of two real replicas of the bundled checkpoint, beside what the simulation says of them.

Two CPU replicas run behind the front of `deepfew cluster`. Requests of two kinds of text come in at random, one after
the other, each under the profile of its kind. Both policies see the same requests: two choices, and affinity. The
simulation of `benchmarks.affinity` gets the same requests, with the experts that each chooses in its prompt and its
answer under its profile. What remains to chance is the replica among equal ones, so it is drawn several times.

- *fetched*: bytes that went into slots after a third of the requests, for one generated token: the mean of the seeds;
- *fall*: share of these bytes that affinity saves.
- *short*: median time of a request about the state.

    python -m benchmarks.service.affinity_processes [--requests 60] [--seeds 1] [--save]     # needs deepfew[ray]
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.affinity import NO_WORDS, Kinds, Machine, Simulation, Traffic, Turn
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from benchmarks.harness.servers import free_port
from expert_store.store import Store
from server.cli.main import main as deepfew
from server.cluster.choice import ChoiceOptions
from server.cluster.likeness import Likeness
from server.masks.profiles import load_profiles
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, RunnerOptions

KINDS = ("arithmetic", "stories_synth")
TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
PROFILE_EXPERTS, SLOTS = 16, 24
PROMPT_CHARACTERS, ANSWER_TOKENS = 160, 32
RECORDED_ROWS = 16
SIMULATED_SEEDS = 6
"""Draws of a replica among equal ones, for each seed of the requests."""
Request = tuple[int, str]
"""The kind and the prompt."""
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


def requests(count: int, seed: int) -> list[Request]:
    """The same at every call."""
    draw = random.Random(seed)
    texts = [(TEXTS / f"{kind}.txt").read_text() for kind in KINDS]
    chosen = []
    for _ in range(count):
        kind = draw.randrange(len(KINDS))
        start = draw.randrange(len(texts[kind]) - PROMPT_CHARACTERS)
        chosen.append((kind, texts[kind][start : start + PROMPT_CHARACTERS]))
    return chosen


def measure(folder: Path, options: ChoiceOptions, asked: Sequence[Request]) -> dict[str, float]:
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
            return _measured(client, asked)
    finally:
        serve.shutdown()
        ray.shutdown()


def _measured(client: httpx.Client, asked: Sequence[Request]) -> dict[str, float]:
    before = generated = 0.0
    first = len(asked) // 3
    for at, (kind, prompt) in enumerate(asked):
        if at == first:
            before = _fetched(client)
        body = {"prompt": prompt, "profile": KINDS[kind], "max_tokens": ANSWER_TOKENS, "temperature": 0,
                "ignore_eos": True}  # fmt: skip
        answer = client.post("/v1/completions", json={"model": "tiny-moe", **body})
        answer.raise_for_status()
        generated += answer.json()["usage"]["completion_tokens"] if at >= first else 0
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


def recorded(store: Store, profiles: Path, asked: Sequence[Request]) -> Kinds:
    """The routing of each request as a kind of its own: the experts that its prompt and its answer use."""
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)
    model = load_model(store, options)
    runner = HostRunner(model, max_rows=RECORDED_ROWS, max_tokens=256)
    masks = list(load_profiles((profiles / f"{kind}.json" for kind in KINDS), model.routing.mask).values())
    traces: list[npt.NDArray[np.uint8]] = []
    for first in range(0, len(asked), RECORDED_ROWS):
        some = asked[first : first + RECORDED_ROWS]
        rows = [runner.allocate() for _ in some]
        read = [
            runner.prefill(row, model.tokenizer(prompt)["input_ids"], mask=masks[kind])
            for row, (kind, prompt) in zip(rows, some, strict=True)
        ]
        tokens = [int(output.logits.argmax()) for output in read]
        routing = [[output.record.served_index] for output in read]
        for _ in range(ANSWER_TOKENS - 1):
            steps = [RowStep(row, token, masks[kind]) for row, token, (kind, _) in zip(rows, tokens, some, strict=True)]
            output = runner.decode(steps)
            tokens = output.logits.argmax(dim=-1).tolist()
            for at, of_row in enumerate(routing):
                of_row.append(output.record.served_index[:, [at]])
        for row, of_row in zip(rows, routing, strict=True):
            runner.free(row)
            traces.append(np.concatenate(of_row, axis=1).transpose(1, 0, 2).astype(np.uint8))
    model.close()
    return Kinds.of(traces, store.manifest.model.num_experts)


class Replay(Simulation):
    """The simulation of given requests, one after the other.

    Args:
        kinds: the routing of each request.
        text_kinds: of each request, in `KINDS`.
    """

    def __init__(self, kinds: Kinds, text_kinds: Sequence[int], expert_bytes: int, policy: str, seed: int) -> None:
        machine = Machine(
            SLOTS, expert_bytes, base_seconds=0.004, token_seconds=1e-5, bytes_per_second=1e9, streams=False
        )
        traffic = Traffic(rate=0.0, drift_seconds=1e9, statistics_seconds=STATISTICS_SECONDS)
        super().__init__(kinds, machine, traffic, 2, policy, float(len(text_kinds)), seed)
        self.text_kinds = text_kinds

    def _on_conversation(self, now: float, number: int) -> None:
        if number < len(self.text_kinds):
            self._at(now + 1.0, "conversation", number + 1)
            answer = ANSWER_TOKENS - 1  # the prompt's last token gives the first
            prompt = int(self.kinds.length[number]) - answer
            self._on_turn(now, Turn(number, number, 0, 0, prompt, answer, True, 0.0))

    def _likeness(self, turn: Turn) -> Likeness:
        return Likeness((), (self.text_kinds[turn.kind] + 1,), NO_WORDS)


def simulate(folder: Path, asked: Sequence[Request]) -> dict[str, float]:
    """Fetched bytes for a token, of each policy."""
    store = Store.open(folder / "store")
    expert_bytes = store.manifest.layers[0].span_bytes
    kinds, text_kinds = recorded(store, folder / "profiles", asked), [kind for kind, _ in asked]
    answers = (len(asked) - len(asked) // 3) * ANSWER_TOKENS
    return {
        policy: float(np.mean([
            Replay(kinds, text_kinds, expert_bytes, policy, seed).run().fetched for seed in range(SIMULATED_SEEDS)
        ])) / answers
        for policy in POLICIES
    }  # fmt: skip


Seeds = dict[str, list[dict[str, float]]]
"""The figures of each policy, by seed."""


def add_seed(found: Seeds, folder: Path, count: int, seed: int) -> None:
    """Simulate and serve the requests of one seed under each policy; adds the figures to `found`."""
    asked = requests(count, seed)
    simulated = simulate(folder, asked)
    for policy, options in POLICIES.items():
        found[policy].append({"simulated_bytes_per_token": simulated[policy], **measure(folder, options, asked)})
        print(seed, policy, found[policy][-1], flush=True)


def report(found: Seeds, count: int, *, save: bool) -> None:
    """Print, and save if asked, the means of the seeds so far."""
    means = {
        policy: {name: float(np.mean([one[name] for one in seeds])) for name in seeds[0]}
        for policy, seeds in found.items()
    }
    falls = {
        name: 1 - means["affinity"][name] / means["two choices"][name]
        for name in ("fetched_bytes_per_token", "simulated_bytes_per_token")
    }
    print(table(("policy", "measured KB/token", "simulated KB/token"), [
        (policy, row["fetched_bytes_per_token"] / 1e3, row["simulated_bytes_per_token"] / 1e3)
        for policy, row in means.items()
    ]))  # fmt: skip
    print(f"fall: measured {falls['fetched_bytes_per_token']:.0%}, simulated {falls['simulated_bytes_per_token']:.0%}")
    result = {"benchmark": "affinity_processes", **environment(), "slots": SLOTS, "profile_experts": PROFILE_EXPERTS,
              "num_requests": count, "policies": means, "fall": falls, "seeds": found}  # fmt: skip
    finish("affinity_processes", result, save=save)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1, help="draws of the requests; saved after each")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/affinity_processes.json")
    arguments = parser.parse_args()
    found: Seeds = {policy: [] for policy in POLICIES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for seed in range(arguments.seeds):
            add_seed(found, folder, arguments.requests, seed)
            report(found, arguments.requests, save=arguments.save)


if __name__ == "__main__":
    main()
