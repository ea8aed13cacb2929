"""Growing chats over HTTP, beside `transformers serve --continuous-batching` on the same checkpoint and machine.

What is measured, in words: C locust users, each a chat of its own in a closed loop (`service/load_users.py --chats`): a
turn's prompt is the whole chat so far (the last prompt and its answer) and 60 new words; a greedy stream of
`POST /v1/completions`, the same new words for every server.
- *tokens/s*: tokens of all answers, divided by the time from the first request to the last answer.
- *first turn*, *later turns*: median milliseconds from sending a request to the first chunk with text; *p99 later*.
- *growth*: median of the last turn's time to the first chunk, divided by that of the second turn.
- *same*: turns whose prompt and answer are those of the first server in the same round; a chat that once differs has
  other prompts from there on.
Each figure is the median over the rounds. In every round each server is started, warmed by one user with two turns,
measured, and ended; the order is reversed from round to round, and none runs beside another. All compute in float32 on
a thread for each core, which the users share.

Of ours there are three: all experts in slots; half of them at the start, with memory that moves between slots and KV
memory; all, without the prefix cache.

    python -m benchmarks.service.chats [--users 8] [--turns 6] [--max-tokens 32] [--rounds 3] [--save]

It needs what `benchmarks.service.load` needs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, finish, table
from benchmarks.harness.servers import Served, require_transformers_serve, running, theirs
from benchmarks.service.load import conditions, percentile, require_locust, use_all_cores, users

COLUMNS = ("tokens/s", "first turn ms", "later turns ms", "p99 later ms", "growth")


def main() -> None:
    """Measure all servers; a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write the result file that the documentation cites")
    asked = parser.parse_args()
    require_transformers_serve()
    require_locust()
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="chats-") as folder:
        servers = _servers(make_store(BUNDLED, Path(folder) / "store"), asked.users)
        for number in range(asked.rounds):
            told: dict[str, dict[str, str]] = {}
            for server in servers if number % 2 == 0 else reversed(servers):
                row, told[server.name] = _measure(server, asked)
                rounds[server.name].append(row)
                print(f"{server.name}: {row}", file=sys.stderr, flush=True)
            for server in servers:
                rounds[server.name][-1]["same"] = len(told[server.name].items() & told[servers[0].name].items())
    rows = [_summary(server.name, rounds[server.name]) for server in servers]
    print(table(["server", *COLUMNS, "failed", "same"], [list(row.values()) for row in rows]))
    settings = {name: getattr(asked, name) for name in ("users", "turns", "max_tokens")}
    finish("chats", {**conditions(servers), **settings, "rows": rows, "rounds": rounds}, save=asked.save)
    sys.exit(any(row["failed"] for row in rows))


def _servers(store: Path, rows: int) -> list[Served]:
    serve = (sys.executable, "-m", "server.cli", "serve", str(store), "--dtype", "float32", "--log-level", "warning")
    serve += ("--max-batch-size", str(rows))
    ways = {
        "deepfew": ("--slots", "64"),
        "deepfew, from 32 slots": ("--slots", "32"),
        "deepfew, no prefix cache": ("--slots", "64", "--no-prefix-cache"),
    }
    ours = [Served(name, (*serve, *flags), BUNDLED.name) for name, flags in ways.items()]
    return [*ours, theirs(continuous_batching=True)]


def _measure(server: Served, asked: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of one round, and the answer to each prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    with running(server.command) as url:
        users(url, server.model, 1, 2, asked.max_tokens, "--chats")
        found = users(url, server.model, asked.users, asked.turns, asked.max_tokens, "--chats")
    answers = found["answers"]
    tokens = sum(len(tokenizer(text)["input_ids"]) for _, text, *_ in answers)
    by_turn: dict[int, list[float]] = defaultdict(list)
    for _, _, first, _, turn in answers:
        by_turn[turn].append(first * 1000)
    later = [one for turn, values in by_turn.items() if turn > 1 for one in values]
    growth = statistics.median(by_turn[asked.turns]) / statistics.median(by_turn[2])
    values = (tokens / found["seconds"], statistics.median(by_turn[1]), statistics.median(later))
    row = dict(zip(COLUMNS, (*values, percentile(later, 99), growth), strict=True))
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt, *_ in answers]
    row |= {"failed": found["failures"], "tokens": tokens, "longest_prompt_tokens": max(lengths)}
    row["first_chunk_ms_by_turn"] = {turn: statistics.median(values) for turn, values in sorted(by_turn.items())}
    return row, {prompt: text for prompt, text, *_ in answers}


def _summary(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    medians = {column: statistics.median(row[column] for row in found) for column in COLUMNS}
    same = f"{min(row['same'] for row in found)} of {max(row['same'] for row in found)}"
    return {"server": name, **medians, "failed": sum(row["failed"] for row in found), "same": same}


if __name__ == "__main__":
    use_all_cores()
    main()
