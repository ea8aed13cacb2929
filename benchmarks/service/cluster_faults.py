"""Answers that clients get when a process of `deepfew cluster` is killed or slowed: real processes, two CPU replicas.

Clients stream answers of the bundled checkpoint, one after the other, from two replicas. After some seconds a process
gets a signal: a replica, Ray's proxy, Serve's controller or the head's store of its state (GCS) is killed, or a replica
is stopped for nine tenths of the time, which makes it slow by ten. Each answer ends in one way:

- *whole*: with its last event and `[DONE]`; *error*: with an error event in its dialect; *refused*: with a status of
  4xx or 5xx and the reason; *broken*: its connection broke or was refused, which the client sees;
- *silent*: as if it were whole, without an end. There should be none.

*gap*: the longest time from the fault on in which no answer was whole. *slow share*: of the tokens after the fault, the
share that came from the slow replica.

    python -m benchmarks.service.cluster_faults [--faults replica proxy controller head slow] [--save]  # deepfew[ray]
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from benchmarks.harness.servers import free_port
from server.cli.main import main as deepfew

CLIENTS, TOKENS = 4, 48
SECONDS_BEFORE = 12.0
SECONDS_AFTER = {"head": 110.0}
"""Processes wait a minute for a head that is gone; other faults are watched for `USUAL_SECONDS`."""
USUAL_SECONDS = 45.0
REPLICA = "ray::ServeReplica:deepfew:all"
FAULTS: dict[str, tuple[str, ...]] = {
    "replica": (REPLICA,),
    "proxy": ("ray::ProxyActor",),
    "controller": ("ray::ServeController",),
    "head": ("gcs_server",),
    "slow": (REPLICA,),
}
OUTCOMES = ("whole", "error", "refused", "broken", "silent")


class Clients:
    """Streams from several clients until `stop`; `ends` has (time, outcome) of each answer."""

    def __init__(self, url: str) -> None:
        self.ends: list[tuple[float, str]] = []
        self._url, self._stopping = url, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(at,)) for at in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for at in range(10**6):
                if self._stopping.is_set():
                    return
                body = {"prompt": f"Story {at} of client {number}", "max_tokens": TOKENS, "ignore_eos": True,
                        "stream": True, "model": "tiny-moe"}  # fmt: skip
                outcome = outcome_of(client, body)
                self.ends.append((time.monotonic(), outcome))
                if outcome not in ("whole", "error"):
                    time.sleep(0.25)


def outcome_of(client: httpx.Client, body: dict[str, Any]) -> str:
    """The way in which a stream ends."""
    last = ""
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                return "refused"
            for line in response.iter_lines():
                last = line.removeprefix("data:").strip() or last
    except httpx.HTTPError:
        return "broken"
    if last == "[DONE]":
        return "whole"
    return "error" if last.startswith("{") and "error" in json.loads(last) else "silent"


def processes(of: psutil.Process, names: tuple[str, ...]) -> list[psutil.Process]:
    """The processes below one whose command begins with one of these names, or whose program is called so."""
    found = []
    for process in of.children(recursive=True):
        try:
            command = process.cmdline()[:1]
            if command and (command[0].startswith(names) or Path(command[0]).name in names):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def slow_down(process: psutil.Process, stopping: threading.Event) -> None:
    """Let a process run a tenth of the time."""
    while not stopping.is_set() and process.is_running():
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.09)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def generated(client: httpx.Client) -> dict[str, float]:
    """Tokens that each replica has generated."""
    lines = client.get("/metrics").text.splitlines()
    samples = [line for line in lines if line.startswith("deepfew_generated_tokens_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in samples}


def measure(folder: Path, fault: str) -> dict[str, Any]:
    """Start a cluster, load it, put the fault in, and count how answers end."""
    config, port = folder / "cluster.toml", free_port()
    config.write_text(
        f'store = "{folder}/store"\n[http]\nport = {port}\n[usage]\nusage_directory = "{folder}/usage"\n'
        '[model]\ndevice = "cpu"\nslots = 24\n[cluster]\nreplicas = 2\nstatistics_seconds = 1\nwait_seconds = 10\n'
    )
    with (folder / f"log-{fault}").open("w") as log:
        command = [sys.executable, "-m", "server.cli", "cluster", str(config)]
        started = subprocess.Popen(command, stdout=log, stderr=log)
    seconds = SECONDS_AFTER.get(fault, USUAL_SECONDS)
    cluster, url = psutil.Process(started.pid), f"http://127.0.0.1:{port}"
    try:
        wait(lambda: len(processes(cluster, (REPLICA,))) == 2 and is_ready(url), 240, "two ready replicas")
        clients = Clients(url)
        time.sleep(SECONDS_BEFORE)
        with httpx.Client(base_url=url, timeout=60) as client:
            before = generated(client)
            at, slowing = time.monotonic(), threading.Event()
            victim = processes(cluster, FAULTS[fault])[0]
            if fault == "slow":
                threading.Thread(target=slow_down, args=(victim, slowing), daemon=True).start()
            else:
                victim.kill()
            time.sleep(seconds)
            clients.stop()
            slowing.set()
            after = generated(client) if is_ready(url) else {}
        status = started.poll()
    finally:
        started.terminate()
        started.wait(120)
    tokens = [after[name] - before.get(name, 0.0) for name in after]
    whole = [end for end, outcome in clients.ends if outcome == "whole" and end > at]
    gaps = [later - earlier for earlier, later in zip([at, *whole], [*whole, at + seconds], strict=True)]
    counts = Counter(outcome for _, outcome in clients.ends)
    return {
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "gap_seconds": max(gaps),
        "slow_share": min(tokens) / sum(tokens) if fault == "slow" and sum(tokens) else None,
        "exit_status": status,
    }


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def wait(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come in {seconds:g} s")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cluster_faults.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert deepfew(["extract", str(BUNDLED), str(folder / "store")]) == 0
        faults: dict[str, Any] = {}
        for fault in arguments.faults:
            faults[fault] = measure(folder, fault)
            print(fault, faults[fault], flush=True)
    columns = (*OUTCOMES, "gap_seconds", "slow_share", "exit_status")
    print(table(("fault", *columns), [(fault, *(one[column] for column in columns)) for fault, one in faults.items()]))
    result = {"benchmark": "cluster_faults", **environment(), "clients": CLIENTS, "tokens": TOKENS, "faults": faults}
    finish("cluster_faults", result, save=arguments.save)


if __name__ == "__main__":
    main()
