"""The cost of the front of `deepfew cluster`: the same requests at a server of its own, and through front and Ray.

Both serve the bundled checkpoint on this machine at the same time, one replica each; requests go to them in turn.

- *state*: median time of a request about the state; *first token*: time to the first event of a stream; *tokens a
  second*: of one stream after its first event;
- *front*: seconds of a core that the front and Ray's proxy use for one token that is passed on.

    python -m benchmarks.service.hop [--save]     # needs deepfew[ray]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from benchmarks.harness.servers import free_port, ours, running
from server.cli.main import main as deepfew

ROUNDS, TOKENS = 25, 200
BODY = {"model": "tiny-moe", "prompt": "Once there was", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
PASSING = ("ray::ServeReplica:deepfew:front", "ray::ProxyActor")


def state_seconds(client: httpx.Client) -> float:
    """Time of a request about the state."""
    started = time.perf_counter()
    client.get("/health/ready").raise_for_status()
    return time.perf_counter() - started


def stream_seconds(client: httpx.Client) -> tuple[float, float]:
    """Time to the first event of a stream, and from there to the end."""
    started = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.iter_lines()
        next(lines)
        first = time.perf_counter()
        for _ in lines:
            pass
    return first - started, time.perf_counter() - first


def passing_seconds(of: psutil.Process) -> float:
    """Seconds of a core that the processes between client and replica have used."""
    total = 0.0
    for process in of.children(recursive=True):
        if process.name() and process.cmdline()[:1] and process.cmdline()[0].startswith(PASSING):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measured(direct: httpx.Client, through: httpx.Client) -> dict[str, Any]:
    """All figures of both."""
    clients = {"server": direct, "cluster": through}
    times: dict[str, dict[str, list[float]]] = {name: {"state": [], "first": [], "rest": []} for name in clients}
    for client in clients.values():
        stream_seconds(client)
    for at in range(ROUNDS):
        for name, client in clients.items():
            times[name]["state"].append(state_seconds(client))
            if at % 5 == 0:
                first, rest = stream_seconds(client)
                times[name]["first"].append(first)
                times[name]["rest"].append(rest)
    before = passing_seconds(psutil.Process())
    for _ in range(3):
        stream_seconds(through)
    front = (passing_seconds(psutil.Process()) - before) / (3 * TOKENS)
    return {
        name: {
            "state_seconds": float(np.median(of["state"])),
            "first_token_seconds": float(np.median(of["first"])),
            "tokens_per_second": (TOKENS - 1) / float(np.median(of["rest"])),
        }
        for name, of in times.items()
    } | {"front_core_seconds_per_token": front}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/hop.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        assert deepfew(["extract", str(BUNDLED), str(folder / "store")]) == 0
        config = folder / "cluster.toml"
        config.write_text(
            f'store = "{folder}/store"\n[http]\nport = {port}\n[model]\nslots = 64\ndtype = "float32"\n'
            "[engine]\nmax_batch_size = 4\n[cluster]\nreplicas = 1\n"
        )
        with running(ours(folder / "store", 64, 4).command) as url, (folder / "log").open("w") as log:
            cluster = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "cluster", str(config)], stdout=log, stderr=log
            )
            try:
                with (
                    httpx.Client(base_url=url, timeout=120) as direct,
                    httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as through,
                ):
                    _wait(through, cluster, folder / "log")
                    figures = measured(direct, through)
            finally:
                cluster.terminate()
                cluster.wait()
    print(table(("", "state ms", "first token ms", "tokens/s"), [
        (name, *(figures[name][key] * scale for key, scale in
                 (("state_seconds", 1e3), ("first_token_seconds", 1e3), ("tokens_per_second", 1))))
        for name in ("server", "cluster")
    ]))  # fmt: skip
    print(f"front and proxy: {figures['front_core_seconds_per_token'] * 1e3:.2f} ms of a core for a token")
    finish("hop", {"benchmark": "hop", **environment(), **figures}, save=arguments.save)


def _wait(client: httpx.Client, cluster: Any, log: Path) -> None:
    until = time.monotonic() + 300
    while True:
        assert cluster.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            if client.get("/health/ready").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)


if __name__ == "__main__":
    main()
