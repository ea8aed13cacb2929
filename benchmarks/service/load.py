"""The HTTP service under load, beside `transformers serve` on the same checkpoint, machine and number of threads.

What is measured, in words: C locust users in a closed loop (`service/load_users.py`), the same greedy streams of
`POST /v1/completions` in the same order for every server.
- *tokens/s*: tokens of all answers (counted by the checkpoint's tokenizer on the text), divided by the time from
  the first request to the last answer.
- *TTFT*: from sending a request to the first chunk with text; *latency*: to the end of the stream. Median and p99 of
  one round's requests.
- *same*: prompts whose every answer is the text that stock transformers' `generate` gives, of those asked.
- *failed*: requests without a whole answer, of all rounds.
Each figure is the median over the rounds, with the least and the greatest in the JSON. In every round each server is
started, warmed by one user who sends every prompt once, measured at every level of C, and ended; the order of the
servers is reversed from round to round, and none runs beside another. All compute in float32 on as many threads as
there are cores, which the users share.

`transformers serve` runs as it is for one request after another (`generate`), and again with `--continuous-batching`,
its best at several users; its other knobs (block size, memory) bound the batch, which these loads do not reach. Chats
are left out: it takes every qwen3_moe checkpoint for a Qwen, and begins its answers to ours with the prompt.

    python -m benchmarks.service.load [--users 1,4,8] [--requests 12] [--rounds 3] [--plot FILE] [--save]

It needs locust (`.venv/bin/pip install -c constraints.txt -e '.[load]'`) and what `make test` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from benchmarks.harness.servers import (
    PROMPTS,
    Served,
    ours,
    require_transformers_serve,
    running,
    theirs,
)

WARM_REQUESTS = 6
COLUMNS = ("tokens/s", "TTFT p50 ms", "TTFT p99 ms", "latency p50 ms", "latency p99 ms")
Rounds = dict[tuple[str, int], list[dict[str, Any]]]


def main() -> None:
    """Measure all servers; a table, a JSON line, and a plot when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="1,4,8", help="levels of concurrency")
    parser.add_argument("--requests", type=int, default=12, help="requests of each user")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", default="64,16", help="slots in every layer of ours, of 64 experts")
    parser.add_argument("--plot", type=Path, help="picture of tokens/s and p99 latency over the users")
    parser.add_argument("--save", action="store_true", help="write the result file that the documentation cites")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.users.split(",")]
    require_transformers_serve()
    require_locust()
    rounds: Rounds = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        store = make_store(BUNDLED, Path(folder) / "store")
        servers = [ours(store, int(slots), max(levels)) for slots in arguments.slots.split(",")]
        servers += [theirs(continuous_batching=False), theirs(continuous_batching=True)]
        right = expected(arguments.max_tokens)
        for number in range(arguments.rounds):
            for server in servers if number % 2 == 0 else reversed(servers):
                measure(server, levels, arguments, right, rounds)
    rows = [summary(name, level, found) for (name, level), found in sorted(rounds.items(), key=_order(servers))]
    print(table(["server", "users", *COLUMNS, "failed", "same"], [_cells(row) for row in rows]))
    if arguments.plot is not None:
        draw(arguments.plot, rows, [server.name for server in servers])
    settings = {name: getattr(arguments, name) for name in ("requests", "max_tokens", "rounds")}
    result = {**conditions(servers), **settings, "rows": rows}
    finish("load", result, save=arguments.save)
    sys.exit(any(row["failed"] for row in rows))


def measure(
    server: Served, levels: list[int], arguments: argparse.Namespace, right: dict[str, str], rounds: Rounds
) -> None:
    """One round of one server; adds a row of figures for each level to `rounds`."""
    with running(server.command) as url:
        users(url, server.model, 1, WARM_REQUESTS, arguments.max_tokens)
        for level in levels:
            found = users(url, server.model, level, arguments.requests, arguments.max_tokens)
            row = figures(found, right)
            rounds[server.name, level].append(row)
            print(f"{server.name}, {level} users: {row} {found['reasons'] or ''}", file=sys.stderr, flush=True)


def users(url: str, model: str, level: int, requests: int, max_tokens: int, *options: str) -> dict[str, Any]:
    """The result of `benchmarks.service.load_users`, run in a process of its own."""
    counts = ["--users", str(level), "--requests", str(requests), "--max-tokens", str(max_tokens)]
    command = [sys.executable, "-m", "benchmarks.service.load_users", url, model, *counts, *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def expected(max_tokens: int) -> dict[str, str]:
    """The greedy answer of stock transformers to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    found = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found[prompt] = tokenizer.decode(tokens, skip_special_tokens=True)
    return found


def figures(found: dict[str, Any], right: dict[str, str]) -> dict[str, Any]:
    """The figures of one round at one level."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    answers = found["answers"]
    tokens = sum(len(tokenizer(text)["input_ids"]) for _, text, *_ in answers)
    asked = {prompt for prompt, *_ in answers}
    wrong = {prompt for prompt, text, *_ in answers if text != right[prompt]}
    ttft, latency = [one[2] * 1000 for one in answers], [one[3] * 1000 for one in answers]
    times = (percentile(ttft, 50), percentile(ttft, 99), percentile(latency, 50), percentile(latency, 99))
    values = dict(zip(COLUMNS, (tokens / found["seconds"], *times), strict=True))
    return {**values, "failed": found["failures"], "same": len(asked - wrong), "asked": len(asked)}


def summary(name: str, level: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and their range."""
    medians = {column: statistics.median(row[column] for row in found) for column in COLUMNS}
    ranges = {
        f"{column} range": [min(row[column] for row in found), max(row[column] for row in found)] for column in COLUMNS
    }
    same = f"{min(row['same'] for row in found)} of {max(row['asked'] for row in found)}"
    failed = sum(row["failed"] for row in found)
    return {"server": name, "users": level, **medians, **ranges, "failed": failed, "same": same}


def percentile(values: list[float], percent: int) -> float:
    """Interpolated between the two nearest; not a number when there is none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def draw(path: Path, rows: list[dict[str, Any]], names: list[str]) -> None:
    """tokens/s and p99 latency over the number of users, a line for each server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, column, label in zip(
        axes, ("tokens/s", "latency p99 ms"), ("output tokens/s", "p99 latency, ms"), strict=True
    ):
        for name in names:
            mine = [row for row in rows if row["server"] == name]
            axis.plot([row["users"] for row in mine], [row[column] for row in mine], marker="o", label=name)
        axis.set_xlabel("users at once")
        axis.set_xticks(sorted({row["users"] for row in rows}))
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _cells(row: dict[str, Any]) -> list[object]:
    return [row[column] for column in ("server", "users", *COLUMNS, "failed", "same")]


def _order(servers: list[Served]) -> Any:
    places = {server.name: number for number, server in enumerate(servers)}
    return lambda item: (item[0][1], places[item[0][0]])


def conditions(servers: list[Served]) -> dict[str, Any]:
    """Machine, versions, threads and commands, for the result."""
    commands = {server.name: " ".join(_plain(part) for part in server.command) for server in servers}
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return {**environment(), "locust": version("locust"), **threads, "commands": commands}


def _plain(part: str) -> str:
    """A part of a command without this machine's folders."""
    return Path(part).name if part.startswith("/") else part


def require_locust() -> None:
    """End with a message where locust is not installed."""
    try:
        version("locust")
    except PackageNotFoundError:
        raise SystemExit(
            "locust is not installed: pip install -c constraints.txt -e '.[load]', and run again"
        ) from None


def use_all_cores() -> None:
    """Set the environment of every server: a thread for each core, and no hub."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for every server what `deepfew` sets for itself
    os.environ["HF_HUB_OFFLINE"] = "1"


if __name__ == "__main__":
    use_all_cores()
    main()
