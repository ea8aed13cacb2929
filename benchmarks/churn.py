"""Churn with faults injected: nothing lost, nothing leaked, the same answers.

Clients of every kind come and go at one server for `--minutes`: whole answers, streams, streams left in the middle,
slow readers, bad bodies, bursts over the queue's bound, OpenAI requests of several answers; meanwhile a shard is
corrupted and restored now and then. Counted, in words:
- *wrong*: a greedy answer of status 200 that differs from the one given before the churn.
- *lost*: a request that got neither an answer nor a refusal nor an error event (a connection cut, a 500, no reply).
- *leaked*: requests running or waiting, KV tokens in use, or connections, after the last client left; growth of the
  resident memory and of open files from the end of the first tenth of the time to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

from benchmarks.reporting import environment, finish
from benchmarks.serve import CHECKPOINT, running

PROMPTS = ("The capital of France is", "Once upon a time", "Water is", "The moon", "In the city of")
ANSWERED = {200, 422, 400, 413, 415, 424, 429}


class Churn:
    """Clients of one server and what they saw."""

    def __init__(self, client: httpx.AsyncClient, store: Path, seed: int) -> None:
        self.client = client
        self.store = store
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.reference: dict[str, str] = {}
        self.wrong: list[str] = []
        self.lost: list[str] = []

    async def learn(self) -> None:
        """The right answers, one at a time."""
        for prompt in PROMPTS:
            self.reference[prompt] = (await self._post(prompt)).json()["generated_text"]

    async def run(self, until: float) -> None:
        """One client after another until the time is over."""
        kinds = (self.whole, self.stream, self.leave, self.slow, self.bad, self.several, self.burst)
        while time.monotonic() < until:
            kind = self.random.choices(kinds, weights=(6, 6, 6, 1, 3, 2, 1))[0]
            try:
                await kind()
            except httpx.HTTPError as error:
                self.lost.append(f"{kind.__name__}: {type(error).__name__} {error}")

    async def whole(self) -> None:
        """A whole answer."""
        prompt = self.random.choice(PROMPTS)
        response = await self._post(prompt)
        self._count("whole", response)
        if response.status_code == 200:
            self._compare(prompt, response.json()["generated_text"])

    async def stream(self, pause: float = 0.0) -> None:
        """A stream read to its end."""
        prompt = self.random.choice(PROMPTS)
        async with self.client.stream("POST", "/generate_stream", json=_body(prompt)) as response:
            self._count("stream", response)
            last = ""
            async for line in response.aiter_lines():
                await asyncio.sleep(pause)
                last = line if line.startswith("data: ") else last
        if response.status_code != 200:
            return
        event = json.loads(last.removeprefix("data: ") or "{}")
        if event.get("generated_text") is not None:
            self._compare(prompt, event["generated_text"])
        elif "error" in event:
            self.seen["error event"] += 1
        else:
            self.lost.append("a stream without an end")

    async def slow(self) -> None:
        """A stream read slowly."""
        await self.stream(pause=0.05)

    async def leave(self) -> None:
        """A stream left after a few events, or before the first."""
        body = _body(self.random.choice(PROMPTS), tokens=200)
        async with self.client.stream("POST", "/generate_stream", json=body) as response:
            self._count("leave", response)
            num_lines = self.random.randrange(12)
            async for _ in response.aiter_lines():
                num_lines -= 1
                if num_lines < 0:
                    break

    async def bad(self) -> None:
        """A body that is refused."""
        body = self.random.choice(
            (b"{", b'{"inputs":1}', b"[" * 5000, b'{"inputs":"a","parameters":{"best_of":9}}', b"")
        )
        response = await self.client.post("/generate", content=body, headers={"content-type": "application/json"})
        self._count("bad", response)

    async def several(self) -> None:
        """Several prompts, two answers each."""
        prompts = self.random.sample(PROMPTS, 2)
        body = {"model": CHECKPOINT.name, "prompt": prompts, "n": 2, "max_tokens": 12, "temperature": 0}
        response = await self.client.post("/v1/completions", json=body)
        if (
            response.status_code == 500 and "could not be read" in response.text
        ):  # OpenAI's status for what is 424 elsewhere
            self.seen["several 500 could not be read"] += 1
            return
        self._count("several", response)
        if response.status_code == 200:
            texts = [choice["text"] for choice in response.json()["choices"]]
            for prompt, text in zip([prompt for prompt in prompts for _ in range(2)], texts, strict=True):
                self._compare(prompt, text)

    async def burst(self) -> None:
        """More at once than the queue takes."""
        await asyncio.gather(*(self.whole() for _ in range(30)))

    async def corrupt(self, until: float) -> None:
        """Corrupt a shard, restore it, and again."""
        shards = sorted((self.store / "experts").iterdir())
        while time.monotonic() < until - 5:
            await asyncio.sleep(self.random.uniform(3, 8))
            shard = self.random.choice(shards)
            whole = shard.read_bytes()
            middle = len(whole) // 2
            _write(shard, middle, bytes(byte ^ 0xFF for byte in whole[middle:]))
            await asyncio.sleep(self.random.uniform(0.5, 2))
            _write(shard, middle, whole[middle:])
            self.seen["shard corrupted and restored"] += 1

    async def _post(self, prompt: str) -> httpx.Response:
        return await self.client.post("/generate", json=_body(prompt))

    def _count(self, kind: str, response: httpx.Response) -> None:
        self.seen[f"{kind} {response.status_code}"] += 1
        if response.status_code not in ANSWERED:
            self.lost.append(f"{kind}: status {response.status_code}")

    def _compare(self, prompt: str, text: str) -> None:
        if text != self.reference[prompt]:
            self.wrong.append(f"{prompt!r}: {text!r}, wanted {self.reference[prompt]!r}")


def main() -> None:
    """Run the churn and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        extract = [sys.executable, "-m", "server.cli", "extract", str(CHECKPOINT), str(store)]
        subprocess.run(extract, check=True, capture_output=True)
        serve = [sys.executable, "-m", "server.cli", "serve", str(store), "--dtype", "float32", "--slots", "16"]
        limits = ["--max-queue-requests", "12", "--max-batch-size", "4", "--log-level", "error"]
        with running([*serve, *limits]) as url:
            result = asyncio.run(churn(url, store, arguments.minutes * 60, arguments.clients, arguments.seed))
    finish("churn", {**environment(), "minutes": arguments.minutes, **result}, save=arguments.save)
    sys.exit(bool(result["wrong"] or result["lost"] or result["left_behind"]))


async def churn(url: str, store: Path, seconds: float, clients: int, seed: int) -> dict[str, object]:
    """All clients for `seconds`; what they saw and what was left behind."""
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        found = Churn(client, store, seed)
        await found.learn()
        pid = _listener(url)
        until = time.monotonic() + seconds
        work = [asyncio.ensure_future(found.run(until)) for _ in range(clients)]
        work.append(asyncio.ensure_future(found.corrupt(until)))
        await asyncio.sleep(seconds / 10)
        before = _held(pid)
        await asyncio.gather(*work)
        await found.learn()  # reads every expert again: a fault that stayed would show
    left: dict[str, float] = {}
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for _ in range(50):
            left = _values((await client.get("/metrics")).text)
            if not any(left.values()):
                break
            await asyncio.sleep(0.2)
    return {
        "requests": sum(found.seen.values()),
        "seen": dict(sorted(found.seen.items())),
        "wrong": found.wrong[:20],
        "lost": found.lost[:20],
        "left_behind": {name: value for name, value in left.items() if value},
        "after_a_tenth": before,
        "at_the_end": _held(pid),
    }


def _body(prompt: str, tokens: int = 12) -> dict[str, object]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}


def _values(text: str) -> dict[str, float]:
    names = ("deepfew_requests_running", "deepfew_requests_waiting", "deepfew_kv_used_tokens")
    lines = [line.split() for line in text.splitlines() if line.startswith(names)]
    return {name: float(value) for name, value in lines}


def _write(shard: Path, at: int, content: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _listener(url: str) -> int:
    from server.cli_port import holder_of

    return int(holder_of(int(url.rpartition(":")[2])).split()[2])


def _held(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {
        "resident_mib": int(fields["VmRSS"].split()[0]) / 1024,
        "threads": int(fields["Threads"]),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
