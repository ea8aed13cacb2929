"""Churn with faults injected: nothing lost, nothing leaked, the same answers.

Clients of every kind come and go at one server for `--minutes`: whole answers, streams, streams left in the middle,
answers not waited for, slow readers, half bodies, bad bodies, bursts over the queue's bound, OpenAI's dialect, several
answers to a request. Meanwhile shards are altered, cut, removed and exchanged for a second each, the disk fills up, and
in the first half of the time the server is ended (SIGTERM) and killed (-9) by turns and started again. The second half
is one life of one process, in which leaks are looked for. Counted, in words:
- *wrong*: a greedy answer of status 200 that differs from the one given before the churn.
- *lost*: a request that got neither an answer nor a refusal nor an error event, with nothing done to the server that
  explains it: sent before SIGTERM and cut, failed for want of an expert while every shard was whole, or not answered
  within two minutes while hundreds of others were. Waiting that long on a machine too busy to answer anybody is counted
  apart. Events of a stream must be numbered without a gap, every response must carry the id of its request, and in the
  last life the server must have finished what the clients read and no more than that and what they left.
- *faults*: an exit status of SIGTERM other than 0, usage lost or counted twice by a restart, an unhealthy server, a
  traceback in the log, a file left in the store.
- *leaked*: requests running or waiting, or blocks of KV memory in use, after the last client left; more open files or
  threads at rest than in the beginning; growth of the server's own memory (anonymous pages, a line fitted through the
  last life without its first fifth) above `--max-growth-mib`.
The figures so far are written to `--result` every half minute, so that an interrupted run still has them.

Filling the disk takes a file system of its own, which takes the right to mount one; without it the result says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, RESULTS, environment, finish
from benchmarks.service.churn_clients import Clients
from benchmarks.service.churn_server import (
    ChurnServer,
    Disk,
    Sample,
    finished,
    growth,
    held_json,
    metrics_of,
    mount_small_disk,
)

DRAIN_SECONDS = 90
SAVE_USAGE_SECONDS = 3
SAMPLE_SECONDS = 5
REPORT_SECONDS = 30
USED_BLOCKS = 'deepfew_kv_blocks{state="used"}'
MAX_MORE_OPEN_FILES = 8
MAX_MORE_THREADS = 40  # what the web framework's pool may keep


class Churn:
    """One run: the server, its disk, its clients, and what came of them."""

    def __init__(self, store: Path, log: Path, arguments: argparse.Namespace, can_fill: bool) -> None:
        limits = ["--slots", "36", "--max-queue-requests", "12", "--max-batch-size", "4"]
        others = ["--dtype", "float32", "--log-level", "warning", "--log-format", "json", "--idle-seconds", "10"]
        times = ["--drain-seconds", str(DRAIN_SECONDS), "--usage-save-seconds", str(SAVE_USAGE_SECONDS)]
        # room for the beginnings of prompts, but not for those of all and four long requests besides, for which slots
        # lend memory
        limits += ["--prefill-chunk-tokens", "32", "--kv-memory", "4MiB", "--max-context-tokens", "384"]
        serve = [sys.executable, "-m", "server.cli", "serve", str(store)]
        self.server = ChurnServer([*serve, *limits, *others, *times], store / "usage.json", log)
        self.disk = Disk(store, arguments.seed)
        self.clients = Clients(self.server, self.disk, BUNDLED.name, arguments.seed)
        self._arguments = arguments
        self._can_fill = can_fill
        self._random = random.Random(arguments.seed + 1)
        self._seconds = arguments.minutes * 60
        self._began = 0.0
        self._at_rest: list[Sample] = []
        self._left: dict[str, float] = {}
        self._last_life = (0, 0)

    async def run(self) -> dict[str, Any]:
        """Everything; returns the result."""
        await self.server.start()
        await self.clients.learn()
        await self._rest()
        self._began = time.monotonic()
        until = self._began + self._seconds
        work = [self.clients.run(until) for _ in range(self._arguments.clients)]
        async with asyncio.TaskGroup() as group:  # what watches the server must not end unseen
            background = [
                group.create_task(each) for each in (self.server.watch(SAMPLE_SECONDS), self._keep_reporting())
            ]
            await asyncio.gather(self._inject(until), *work)
            await self.clients.learn()  # reads every expert again: a fault that stayed would show
            for task in background:
                task.cancel()
        await self.clients.close()
        await self._rest()
        values = await self._metrics()
        names = ("prompt_tokens", "cached_prompt_tokens", "preemptions")
        kv_memory = {name: values[f"deepfew_{name}_total"] for name in names}
        for kind in ("slots", "kv"):
            kv_memory[f"moves_to_{kind}"] = values[f'deepfew_memory_moves_total{{kind="{kind}"}}']
        return self.result(is_finished=True, num_finished=finished(values)) | {"kv_memory_of_the_last_life": kv_memory}

    async def _inject(self, until: float) -> None:
        """Faults one after another: of the disk all the time, outages by turns in the first half."""
        num_outages = max(2, min(6, int(self._arguments.minutes / 4)))
        outages = [self._began + self._seconds / 2 * (number + 1) / num_outages for number in range(num_outages)]
        kinds = ["terminate", "kill"] * num_outages
        fill_at = self._began + self._seconds / 20
        while time.monotonic() < until - 8:
            await asyncio.sleep(self._random.uniform(2, 6))
            if outages and time.monotonic() > outages[0]:
                outages.pop(0)
                await self.server.end(kinds.pop(0), DRAIN_SECONDS)
                await asyncio.sleep(1)  # what had been received is counted
                self._last_life = (self.clients.num_answered, self.clients.num_unseen)
                await self.server.start()
            elif self._can_fill and time.monotonic() > fill_at:
                fill_at += max(self._seconds / 10, 40)
                await self._fill()
            else:
                await self.disk.spoil_shard()

    async def _fill(self) -> None:
        """Fill the disk for longer than the interval of saving the usage, and see that it is saved again afterwards."""
        await self.disk.fill(SAVE_USAGE_SECONDS * 2)
        usage = self.disk.store / "usage.json"
        freed = time.time()
        for _ in range(600):
            if usage.exists() and usage.stat().st_mtime > freed:
                return
            await asyncio.sleep(0.1)
        self.server.faults.append("the usage was not saved within a minute after the disk had room again")

    async def _rest(self) -> None:
        """Wait until nothing runs and idle connections are closed, and note what the process holds then."""
        for _ in range(100):
            values = await self._metrics()
            names = ["deepfew_requests_running", "deepfew_requests_waiting", "deepfew_kv_used_tokens", USED_BLOCKS]
            self._left = {name: values[name] for name in names if values[name]}
            if not self._left:
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(12)
        self._at_rest.append(self.server.held())

    async def _metrics(self) -> dict[str, float]:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
            return metrics_of((await client.get("/metrics")).text)

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            _write(self._arguments.result, self.result())

    def result(self, *, is_finished: bool = False, num_finished: float | None = None) -> dict[str, Any]:
        """The figures so far."""
        clients, server, life = self.clients, self.server, self.server.lives[-1]
        records, num_tracebacks = server.records()
        faults = list(server.faults)
        faults += [f"{num_tracebacks} tracebacks in the log"] if num_tracebacks else []
        memory = growth(life.samples)
        leaked = [f"{name} {value:g}" for name, value in self._left.items()] if is_finished else []
        answers: dict[str, Any] = {}
        if num_finished is not None:
            faults += [f"left in the store: {name}" for name in self.disk.strays()]
            answered = clients.num_answered - self._last_life[0]
            unseen, most = num_finished - answered, clients.num_unseen - self._last_life[1]
            answers = {"finished": num_finished, "read": answered, "unseen": unseen, "at_most_unseen": most}
            if not 0 <= unseen <= most:
                faults.append(f"the server finished {num_finished:g}, clients read {answered} and left at most {most}")
            leaked += self._more_at_rest()
            faults += [] if memory["minutes"] else ["the last life was too short for its memory to be judged"]
        if memory["growth_mib"] > self._arguments.max_growth_mib:
            leaked.append(f"{memory['growth_mib']:.1f} MiB in {memory['minutes']:.1f} minutes")
        busy = [one.idle_seconds for each in server.lives for one in each.samples if one.busy]
        return {
            **environment(),
            "minutes": self._arguments.minutes,
            "minutes_done": round((time.monotonic() - self._began) / 60, 1),
            "is_finished": is_finished,
            "requests": sum(clients.seen.values()),
            "answers_read": clients.num_answered,
            "seen": dict(sorted(clients.seen.items())),
            "wrong": clients.wrong[:20],
            "lost": clients.lost[:20],
            "num_wrong": len(clients.wrong),
            "num_lost": len(clients.lost),
            "faults": faults[:20],
            "leaked": leaked,
            "injected": dict(sorted(self.disk.done.items())) | _kinds(server),
            "not_injected": [] if self._can_fill else ["disk full: no right to mount a file system"],
            "last_life": answers,
            "memory_of_the_last_life": memory,
            "memory_by_minute": _by_minute(life.samples),
            "at_rest": [held_json(sample) for sample in self._at_rest],
            "most_open_files": max((one.open_files for each in server.lives for one in each.samples), default=0),
            "most_threads": max((one.threads for each in server.lives for one in each.samples), default=0),
            "longest_seconds_without_progress_while_busy": max(busy, default=0.0),
            "samples_not_answered": server.unanswered_samples,
            "log": dict(records.most_common(20)),
        }

    def _more_at_rest(self) -> list[str]:
        first, last = self._at_rest[0], self._at_rest[-1]
        found = []
        if last.open_files > first.open_files + MAX_MORE_OPEN_FILES:
            found.append(f"open files at rest: {first.open_files} at first, {last.open_files} at the end")
        if last.threads > first.threads + MAX_MORE_THREADS:
            found.append(f"threads at rest: {first.threads} at first, {last.threads} at the end")
        return found


def main() -> None:
    """Run the churn and print what was seen; status 1 when something was wrong, lost, faulty or leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth-mib", type=float, default=16, help="of the server's own memory in its last life")
    parser.add_argument("--result", type=Path, default=None, help="file for the figures so far, written all the time")
    parser.add_argument("--save", action="store_true", help="write the result file that the documentation cites")
    arguments = parser.parse_args()
    if arguments.result is None:
        arguments.result = RESULTS / "churn.json" if arguments.save else Path(tempfile.gettempdir()) / "churn.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that server and disk are given back
    with tempfile.TemporaryDirectory(prefix="churn-") as folder:
        made, store = Path(folder) / "made", Path(folder) / "store"
        make_store(BUNDLED, made)
        store.mkdir()
        can_fill = mount_small_disk(store, sum(path.stat().st_size for path in made.rglob("*")))
        try:
            shutil.copytree(made, store, dirs_exist_ok=True)
            run = Churn(store, Path(folder) / "log", arguments, can_fill)
            try:
                result = asyncio.run(run.run())
            finally:
                run.server.close()
        finally:
            if can_fill:
                subprocess.run(["umount", "--lazy", str(store)], check=False)
    finish("churn", result, save=arguments.save)
    sys.exit(bool(result["wrong"] or result["lost"] or result["faults"] or result["leaked"]))


def _kinds(server: ChurnServer) -> dict[str, int]:
    kinds = [outage.kind for outage in server.outages]
    return {f"server: {kind}, started again": kinds.count(kind) for kind in sorted(set(kinds))}


def _by_minute(samples: list[Sample]) -> list[list[float]]:
    """(minute, MiB of the server's own memory) once a minute."""
    step = 60 // SAMPLE_SECONDS
    return [[round((one.at - samples[0].at) / 60, 1), round(one.anonymous / 2**20, 1)] for one in samples[::step]]


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
