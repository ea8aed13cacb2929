"""A cluster of real processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import psutil


class Cluster:
    """`deepfew cluster` with these settings, on a free port, ready when it has so many replicas."""

    def __init__(self, settings: str, folder: Path, num_replicas: int, parts: tuple[str, ...] = ("all",)) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "cluster.toml"
        config.write_text(settings)
        environment = {"DEEPFEW_PORT": str(port), "DEEPFEW_USAGE_DIRECTORY": f"{folder}/usage"}
        self.parts = parts
        self.usage = folder / "usage"
        self.log = folder / "log"
        command = [sys.executable, "-m", "server.cli", "cluster", str(config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        try:
            self.wait(lambda: self.is_ready(self.client) and len(self.replicas()) == num_replicas)
        except BaseException:
            self.client.close()
            self.process.terminate()
            raise

    @staticmethod
    def is_ready(client: httpx.Client, headers: Mapping[str, str] | None = None) -> bool:
        try:
            return client.get("/health/ready", headers=headers).status_code == 200
        except httpx.HTTPError:
            return False

    def wait(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + 180
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def replicas(self) -> list[int]:
        """The process ids of all replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                name = "".join(process.cmdline()[:1]).removeprefix("ray::ServeReplica:deepfew:")
                if name in self.parts:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def running(self) -> float:
        text = self.client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("deepfew_requests_running{")]
        return sum(float(line.split()[-1]) for line in lines)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        assert self.process.wait(timeout=90) == 0, self.log.read_text()
