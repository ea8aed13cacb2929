"""The HTTP service under load, against `transformers serve` on the same checkpoint, machine and number of threads.

What is measured, in words: a closed loop of C clients, each sending its next request when the last was answered, all
`POST /v1/chat/completions` as greedy streams with the same messages in the same order.
- *tokens/s*: tokens of all answers (counted by the checkpoint's tokenizer on the text), divided by the time from the
  first request to the last answer.
- *TTFT*: from sending a request to the first chunk with text; *latency*: to the end of the stream. Median and p99.
- *same*: answers equal to those of one client alone at our server.
Both servers warm up with one round that is not counted, compute in float32, and run one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.reporting import REPOSITORY, environment, finish, table

CHECKPOINT = REPOSITORY / "models" / "tiny-moe"
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a story about a boy and a boat.",
    "What is 5% of 120?",
    "What is the chemical symbol of gold?",
    "Tell me a story about a badger.",
    "Which continent is Kenya in?",
)


@dataclass
class Outcome:
    """What one level of concurrency gave; times in seconds."""

    ttft: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    answers: dict[str, set[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    failures: int = 0
    seconds: float = 0.0


def main() -> None:
    """Measure both and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,4,16", help="levels of concurrency")
    parser.add_argument("--requests", type=int, default=8, help="requests of each client")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--save", action="store_true", help="write the result file that the README cites")
    arguments = parser.parse_args()
    levels = [int(level) for level in arguments.clients.split(",")]
    rows, results = [], []
    reference: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command, model in servers(Path(folder)):
            with running(command) as url:
                asyncio.run(load(url, model, 1, len(QUESTIONS), arguments.max_tokens))
                for level in levels:
                    outcome = asyncio.run(load(url, model, level, arguments.requests, arguments.max_tokens))
                    reference = reference or outcome.answers
                    row = summary(name, level, outcome, reference)
                    rows.append(list(row.values()))
                    results.append(row)
                    print(row, file=sys.stderr)
    print(table(list(results[0]), rows))
    finish("serve", {**environment(), "max_tokens": arguments.max_tokens, "rows": results}, save=arguments.save)


def servers(folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """(name, command without the port, model name) of each server."""
    store = folder / "store"
    subprocess.run(
        [sys.executable, "-m", "server.cli", "extract", str(CHECKPOINT), str(store)], check=True, capture_output=True
    )
    ours = [sys.executable, "-m", "server.cli", "serve", str(store), "--dtype", "float32", "--log-level", "warning"]
    for slots in (64, 32, 16):
        flags = ["--slots", str(slots), "--max-batch-size", "16"]
        yield f"deepfew, {slots} of 64 slots", [*ours, *flags], CHECKPOINT.name
    theirs = [str(Path(sys.executable).parent / "transformers"), "serve", str(CHECKPOINT), "--dtype", "float32"]
    yield "transformers serve", [*theirs, "--device", "cpu"], str(CHECKPOINT)
    yield (
        "transformers serve, continuous batching",
        [*theirs, "--device", "cpu", "--continuous-batching"],
        str(CHECKPOINT),
    )


@contextmanager
def running(command: list[str]) -> Iterator[str]:
    """The address of a server that answers; it is ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            until = time.monotonic() + 300
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"{command} did not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        found = httpx.get(url + "/health/ready", timeout=5)
        if found.status_code == 404:  # not ours
            found = httpx.get(url + "/health", timeout=5)
    except httpx.HTTPError:
        return False
    return found.status_code == 200


async def load(url: str, model: str, clients: int, requests: int, max_tokens: int) -> Outcome:
    """Run the closed loop."""
    outcome = Outcome()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        started = time.perf_counter()

        async def one_client(number: int) -> None:
            for turn in range(requests):
                await ask(client, model, QUESTIONS[(number + turn) % len(QUESTIONS)], max_tokens, outcome)

        await asyncio.gather(*(one_client(number) for number in range(clients)))
        outcome.seconds = time.perf_counter() - started
    return outcome


async def ask(client: httpx.AsyncClient, model: str, question: str, max_tokens: int, outcome: Outcome) -> None:
    """One streamed answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    started, first, text = time.perf_counter(), None, ""
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line.removeprefix("data: ")).get("choices")
                piece = (choices[0]["delta"].get("content") or "") if choices else ""
                if piece and first is None:
                    first = time.perf_counter() - started
                text += piece
    except httpx.HTTPError:
        outcome.failures += 1
        return
    outcome.ttft.append(first if first is not None else time.perf_counter() - started)
    outcome.latency.append(time.perf_counter() - started)
    outcome.answers.setdefault(question, set()).add(text)
    outcome.texts.append(text)


def summary(name: str, level: int, outcome: Outcome, reference: dict[str, set[str]]) -> dict[str, Any]:
    """One row of the table."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in outcome.texts)
    same = sum(outcome.answers[question] == reference.get(question) for question in outcome.answers)
    return {
        "server": name,
        "clients": level,
        "tokens/s": tokens / outcome.seconds,
        "TTFT p50 ms": _percentile(outcome.ttft, 50) * 1000,
        "TTFT p99 ms": _percentile(outcome.ttft, 99) * 1000,
        "latency p50 ms": _percentile(outcome.latency, 50) * 1000,
        "latency p99 ms": _percentile(outcome.latency, 99) * 1000,
        "failed": outcome.failures,
        "same": f"{same} of {len(outcome.answers)}",
    }


def _percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
