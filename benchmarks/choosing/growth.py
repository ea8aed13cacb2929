"""A store that grows while it serves: starts with few deep experts, is sent two kinds of text, and its deficit falls.

What is measured, in words:
- *deficit*: missing share of the router mass over the tokens of one round of requests (prompt and generated), as the
  answers say it.
- *kept*: experts of every layer that the store holds when the round begins.
- *seconds*: wall time of a round's requests, and of the same requests again while the store grows.
Everything goes through `deepfew serve`'s HTTP routes. A round sends four prompts of the first kind, from round
`--switch` on of the second kind. Then `POST /experts/grow` adds what was wanted and missing, while the same requests
run once more; `--shrink` gives as many of the least wanted ones up first, so that the store follows the text without
becoming larger. No request fails and no restart happens.

    python -m benchmarks.choosing.growth [--rounds 10] [--start 8] [--step 4] [--shrink] [--plot FILE] [--save]
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from benchmarks.harness.servers import ours, running
from server.quality.texts import documents, find_domains

TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
KINDS = ("stories_synth", "math_qa")
NUM_PROMPTS, PROMPT_CHARACTERS, NEW_TOKENS = 4, 250, 24


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--switch", type=int, default=5, help="round from which the second kind is sent")
    parser.add_argument("--start", type=int, default=8, help="deep experts at the start")
    parser.add_argument("--step", type=int, default=4, help="deep experts added after each round")
    parser.add_argument("--shrink", action="store_true", help="from --switch on, give up as many as are added")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/growth.json")
    arguments = parser.parse_args()
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="deepfew-growth-") as folder:
        store = make_store(BUNDLED, Path(folder) / "store", arguments.start)
        command = (*ours(store, 64, NUM_PROMPTS).command, "--admin-key", key)
        with running(command) as url, httpx.Client(base_url=url, timeout=300, headers={"X-API-Key": key}) as client:
            rounds = [_round(client, number, arguments) for number in range(arguments.rounds)]
            growth = client.get("/experts/growth").raise_for_status().json()
    columns = ["round", "kind", "kept", "deficit", "seconds", "seconds while it grows"]
    print(table(columns, [list(one.values()) for one in rounds]))
    if arguments.plot is not None:
        draw(arguments.plot, rounds)
    finish("growth", {"environment": environment(), "rounds": rounds, "growth": growth}, save=arguments.save)


def _round(client: httpx.Client, number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send a round, then grow behind another one."""
    kind = KINDS[number >= arguments.switch]
    kept = client.get("/experts/growth").raise_for_status().json()["deep_experts"]
    deficit, seconds = _ask(client, kind, number)
    if arguments.shrink and number >= arguments.switch:
        client.post("/experts/shrink", json={"count": arguments.step}).raise_for_status()
    response = client.post("/experts/grow", json={"count": arguments.step})
    if response.status_code != 409:  # 409: it has every expert
        response.raise_for_status()
    _, meanwhile = _ask(client, kind, number)
    while client.get("/experts/growth").raise_for_status().json()["state"] != "idle":
        time.sleep(0.05)
    error = client.get("/experts/growth").json()["error"]
    assert error is None, error
    return {
        "round": number,
        "kind": kind,
        "kept": kept,
        "deficit": round(deficit, 4),
        "seconds": round(seconds, 3),
        "growing_seconds": round(meanwhile, 3),
    }


def _ask(client: httpx.Client, kind: str, number: int) -> tuple[float, float]:
    """The mean deficit of one round's requests, sent together, and how long they took."""
    texts = list(documents(find_domains([str(TEXTS / f"{kind}.txt")])[0]))
    parameters = {"max_new_tokens": NEW_TOKENS, "details": True}

    def one(at: int) -> float:
        text = texts[(number * NUM_PROMPTS + at) % len(texts)][:PROMPT_CHARACTERS]
        response = client.post("/generate", json={"inputs": text, "parameters": parameters}).raise_for_status()
        return float(response.json()["details"]["deficit"]["overall"])

    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_PROMPTS) as pool:
        deficits = list(pool.map(one, range(NUM_PROMPTS)))
    return sum(deficits) / NUM_PROMPTS, time.perf_counter() - began


def draw(path: Path, rounds: list[dict[str, Any]]) -> None:
    """Deficit and kept experts over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers = [one["round"] for one in rounds]
    axes.plot(numbers, [one["deficit"] for one in rounds], marker="o", color="tab:red")
    axes.set(xlabel="round", ylabel="deficit", ylim=(0, 1), title="A store grows while it serves")
    other = axes.twinx()
    other.step(numbers, [one["kept"] for one in rounds], where="mid", color="tab:blue", alpha=0.6)
    other.set_ylabel("deep experts kept", color="tab:blue")
    switch = next((one["round"] for one in rounds if one["kind"] != rounds[0]["kind"]), None)
    if switch is not None:
        axes.axvline(switch - 0.5, color="black", linestyle=":", linewidth=1)
        axes.text(switch - 0.4, 0.95, f"{rounds[switch]['kind']} from here", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
