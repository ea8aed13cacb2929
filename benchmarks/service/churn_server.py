"""The server of the churn benchmark from outside: its process, its disk, and its memory, threads and files over time.

Invariant: every outage and every fault of the disk is an `Interval` that is recorded before it begins, so that each
result of a client can be compared with the faults of that time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.servers import free_port

MIB = 2**20
ENDED = ("length", "eos_token", "stop_sequence")
MOUNT_SPARE_BYTES = 32 * MIB


@dataclass
class Interval:
    """Something done to the server, from `begin` to `end` (infinite while it lasts), in time.monotonic()."""

    kind: str
    begin: float
    end: float = float("inf")

    def overlaps(self, begin: float, end: float) -> bool:
        """Whether it and [begin, end] have a moment in common."""
        return self.begin <= end and begin <= self.end


@dataclass
class Sample:
    """Memory, threads and files of the process at one moment, and its own metrics; bytes and counts."""

    at: float
    rss: int
    anonymous: int
    threads: int
    open_files: int
    idle_seconds: float = float("nan")
    busy: float = float("nan")
    healthy: float = float("nan")
    finished: float = float("nan")


@dataclass
class Life:
    """One process of the server: its samples, and how it ended."""

    begin: float
    start_tokens: int = 0
    last_tokens: int = 0
    samples: list[Sample] = field(default_factory=list)


class ChurnServer:
    """A server at one port that can be killed, ended and started again.

    Args:
        command: without the port.
        usage: the ledger's file, which must hold after an outage what the next life starts from.
        log: file that gets the log of every life.
    """

    def __init__(self, command: list[str], usage: Path, log: Path) -> None:
        port = free_port()
        self._command = [*command, "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self._usage = usage
        self.log = log
        self.outages: list[Interval] = []
        self.lives: list[Life] = []
        self.faults: list[str] = []
        self.unanswered_samples = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the present process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start a process and wait until it takes requests; fails after five minutes."""
        saved = json.loads(self._usage.read_text())["num_tokens"] if self._usage.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=log)
        until = time.monotonic() + 300
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as client:
            while True:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start: {self.log.read_text()[-2000:]}")
                try:
                    if (await client.get("/health/ready")).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                await asyncio.sleep(0.1)
            life = Life(time.monotonic())
            life.start_tokens = life.last_tokens = (await client.get("/experts")).json()["totals"]["tokens"]
        if life.start_tokens != saved:
            self.faults.append(f"usage: {saved} tokens in the file, {life.start_tokens} after the start")
        if self.outages and self.outages[-1].kind == "terminate" and saved < self.lives[-1].last_tokens:
            self.faults.append(f"usage lost by SIGTERM: {saved} tokens saved, {self.lives[-1].last_tokens} before")
        self.lives.append(life)
        for outage in self.outages:
            outage.end = min(outage.end, time.monotonic())

    async def end(self, kind: str, drain_seconds: float) -> None:
        """`kill`: kill -9. `terminate`: SIGTERM, which must end it with status 0 within the drain and a little."""
        assert self._process is not None
        self.outages.append(Interval(kind, time.monotonic()))
        self._process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        status = await self._ended(drain_seconds + 30)
        if kind == "terminate" and status != 0:
            self.faults.append(f"SIGTERM: the exit status was {status}, wanted 0 within {drain_seconds} s")
        if status is None:
            self.close()

    def close(self) -> None:
        """End the present process there and then."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def outage(self, begin: float, end: float) -> Interval | None:
        """The outage that overlaps [begin, end], if any."""
        return next((found for found in self.outages if found.overlaps(begin, end)), None)

    async def watch(self, seconds: float) -> None:
        """Take a sample every `seconds`, for ever; outages are left out."""
        async with httpx.AsyncClient(base_url=self.url, timeout=30) as client:
            while True:
                await asyncio.sleep(seconds)
                begin = time.monotonic()
                try:
                    sample = await self._sample(client)
                    tokens = (await client.get("/experts")).json()["totals"]["tokens"]
                except (OSError, httpx.HTTPError, KeyError, ValueError) as error:
                    if self.outage(begin, time.monotonic()) is None:
                        self.unanswered_samples += 1
                        if not isinstance(error, httpx.TimeoutException):
                            self.faults.append(f"metrics: {type(error).__name__} {error}")
                    continue
                if self.outage(begin, time.monotonic()) is None:
                    self.lives[-1].samples.append(sample)
                    self.lives[-1].last_tokens = tokens
                    if not sample.healthy:
                        self.faults.append(f"unhealthy: no progress for {sample.idle_seconds:.0f} s")

    async def _sample(self, client: httpx.AsyncClient) -> Sample:
        """Memory and metrics now. Raises KeyError while the model loads: the engine has no metrics yet."""
        sample = self.held()
        values = metrics_of((await client.get("/metrics")).text)
        sample.idle_seconds = values["deepfew_engine_idle_seconds"]
        sample.busy = values["deepfew_requests_running"] + values["deepfew_requests_waiting"]
        sample.healthy = values["deepfew_healthy"]
        sample.finished = finished(values)
        return sample

    def held(self) -> Sample:
        """Memory, threads and files of the process now."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        kib = {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}
        num_files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return Sample(time.monotonic(), kib["VmRSS"], kib["RssAnon"], int(fields["Threads"]), num_files)

    def records(self) -> tuple[Counter[str], int]:
        """Messages of the log with the figures taken out, and how many records carry a traceback."""
        seen: Counter[str] = Counter()
        num_tracebacks = 0
        for line in self.log.read_text().splitlines():
            try:
                record = json.loads(line)
                num_tracebacks += "exception" in record
                text = f"{record['level']}: {record['message']}"
            except (ValueError, TypeError, KeyError):
                num_tracebacks += line.startswith("Traceback")
                text = f"no record: {line}"
            seen["".join("#" if char.isdigit() else char for char in text)[:110]] += 1
        return seen, num_tracebacks

    async def _ended(self, seconds: float) -> int | None:
        assert self._process is not None
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return self._process.poll()


class Disk:
    """The store's files, and what is done to them; each fault is put right again by the same call.

    Attributes:
        intervals: from before a shard was touched until after it was whole again.
        done: how often each fault was injected.
    """

    def __init__(self, store: Path, seed: int) -> None:
        self.store = store
        self.intervals: list[Interval] = []
        self.done: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._shards = sorted((store / "experts").iterdir())

    def is_faulty(self, begin: float, end: float) -> bool:
        """Whether a shard was not whole at some moment of [begin, end]."""
        return any(interval.overlaps(begin, end) for interval in self.intervals[-50:])

    async def spoil_shard(self) -> None:
        """Alter, cut, remove or exchange a shard for a second or so."""
        kind = self._random.choice(("altered", "cut", "removed", "exchanged"))
        shard, other = self._random.sample(self._shards, 2)
        whole = shard.read_bytes()
        interval = Interval(kind, time.monotonic())
        self.intervals.append(interval)
        aside = shard.with_name(shard.name + ".aside")
        if kind == "altered":
            _write(shard, len(whole) // 2, bytes(byte ^ 0xFF for byte in whole[len(whole) // 2 :]))
        elif kind == "cut":
            os.truncate(shard, len(whole) // 3)
        elif kind == "removed":
            shard.rename(aside)
        else:
            _exchange(shard, other, aside)
        await asyncio.sleep(self._random.uniform(0.5, 2))
        if kind == "removed":
            aside.rename(shard)
        elif kind == "exchanged":
            _exchange(shard, other, aside)
        else:
            _write(shard, 0, whole)
        interval.end = time.monotonic()
        self.done[f"shard {kind} and restored"] += 1

    async def fill(self, seconds: float) -> None:
        """Leave no byte free for `seconds`."""
        filler = self.store / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (MIB, 4096, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    pass
        await asyncio.sleep(seconds)
        filler.unlink()
        self.done["disk full and freed"] += 1

    def strays(self) -> list[str]:
        """Files beside those that a store has; a usage file set aside would be among them."""
        known = {"manifest.json", "trunk", "experts", "usage.json", "statistics.safetensors"}
        return sorted(path.name for path in self.store.iterdir() if path.name not in known)


def mount_small_disk(folder: Path, num_bytes: int) -> bool:
    """Mount a file system of its own, a little larger than `num_bytes`; False without the right to."""
    size = num_bytes + MOUNT_SPARE_BYTES
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def metrics_of(text: str) -> dict[str, float]:
    """Samples of a text exposition by name and labels."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def finished(values: dict[str, float]) -> float:
    """Generations that ended by themselves."""
    return sum(values[f'deepfew_requests_total{{outcome="{outcome}"}}'] for outcome in ENDED)


def growth(samples: list[Sample], skipped: float = 0.2) -> dict[str, float]:
    """A line through the server's own memory (anonymous pages) over one life, its first part left out, in MiB.

    Fewer than three samples make no line: 0 minutes.
    """
    kept = samples[int(len(samples) * skipped) :]
    if len(kept) < 3:
        return {"minutes": 0.0, "growth_mib": 0.0, "mib_per_hour": 0.0}
    slope = statistics.linear_regression([one.at for one in kept], [one.anonymous / MIB for one in kept]).slope
    seconds = kept[-1].at - kept[0].at
    return {"minutes": seconds / 60, "growth_mib": slope * seconds, "mib_per_hour": slope * 3600}


def held_json(sample: Sample) -> dict[str, Any]:
    """A sample for the result."""
    return {
        "resident_mib": round(sample.rss / MIB, 1),
        "anonymous_mib": round(sample.anonymous / MIB, 1),
        "threads": sample.threads,
        "open_files": sample.open_files,
    }


def _write(shard: Path, at: int, content: bytes) -> None:
    with shard.open("r+b") as file:
        file.seek(at)
        file.write(content)


def _exchange(one: Path, other: Path, aside: Path) -> None:
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
