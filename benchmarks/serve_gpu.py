"""The main job on a GPU, through the commands that users type: extract, generate, serve, and a POST /generate.

What is measured, in words:
- *equal text*: greedy text of the bundled checkpoint in float32 with 16 of 64 slots a layer, on the GPU and on the CPU.
- *extraction*: seconds and rate of `deepfew extract` on a generated checkpoint.
- *tokens/s, one request*: of `deepfew serve` with a quarter of the experts in slots: 1000 over `x-time-per-token`,
  prefill included; *four together*: all tokens of four requests sent at once over the wall time.
- *peak device memory*: as the driver counts it, the most seen while serving, beside the bytes of all experts.

Run on a machine with a GPU: python -m benchmarks.serve_gpu --directory /tmp/serve-gpu [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.generated import Shape, write_checkpoint
from benchmarks.reporting import REPOSITORY, environment, finish, table

PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def main():",
    "Question: Calculate 159 - 43.",
)
LARGE = Shape(
    num_layers=18, num_experts=128, top_k=8, hidden=2048, intermediate=768, num_heads=32, num_kv_heads=4, head_dim=128
)
PORT = 8123


def deepfew(*arguments: str, **environment_: str) -> str:
    """Run the command line; returns its standard output, raises with its errors when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", "from server.cli import main; main()", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment_},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"deepfew {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def equal_text(directory: Path) -> list[dict[str, Any]]:
    """Greedy text of the bundled checkpoint on both devices."""
    store = directory / "tiny-store"
    deepfew("extract", str(REPOSITORY / "models" / "tiny-moe"), str(store))
    results = []
    for prompt in PROMPTS[:3]:
        texts = {}
        for device in ("cpu", "cuda"):
            options = ("--device", device, "--dtype", "float32", "--slots", "16", "--max-new-tokens", "64", "--json")
            texts[device] = json.loads(deepfew("generate", str(store), prompt, *options))
        cpu, cuda = texts["cpu"], texts["cuda"]
        equal = cpu["generated_text"] == cuda["generated_text"]
        results.append({"prompt": prompt, "equal": equal, "num_tokens": cuda["generated_tokens"]})
    return results


def extract_large(directory: Path, shape: Shape) -> tuple[Path, dict[str, Any]]:
    """Generate a checkpoint and extract all of it."""
    checkpoint, store = directory / "checkpoint", directory / "store"
    started = time.perf_counter()
    write_checkpoint(checkpoint, shape, device="cuda")
    generated = time.perf_counter()
    print(f"generated {shape.experts_bytes / 1e9:.1f} GB of experts in {generated - started:.0f} s", flush=True)
    deepfew("extract", str(checkpoint), str(store))
    seconds = time.perf_counter() - generated
    return store, {
        "experts_bytes": shape.experts_bytes,
        "seconds": seconds,
        "bytes_per_second": shape.experts_bytes / seconds,
    }


class PeakMemory(threading.Thread):
    """Watches the device's memory in use until `stop`; bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        import torch

        while not self._stopped.wait(0.05):
            free, total = torch.cuda.mem_get_info()
            self.peak_bytes = max(self.peak_bytes, total - free)

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak_bytes


def serve_quarter(store: Path, shape: Shape, num_tokens: int) -> dict[str, Any]:
    """Serve with a quarter of the experts in slots; one request, then four at once."""
    import torch

    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    before = total - free
    options = ["--slots", str(shape.num_experts // 4), "--port", str(PORT), "--device", "cuda", "--host-memory", "100%"]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(store), *options]
    started = time.perf_counter()
    log = open(store.parent / "serve.log", "wb")  # noqa: SIM115 (the server's, for as long as it runs)
    server = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        _wait_until_ready(server)
        ready_seconds = time.perf_counter() - started
        memory = PeakMemory()
        memory.start()
        _generate(num_tokens=8)
        _, headers = _generate(num_tokens)
        single = {name: float(headers[name]) for name in ("x-time-per-token", "x-inference-time", "x-total-time")}
        wall = time.perf_counter()
        threads = [threading.Thread(target=_generate, args=(num_tokens, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = 4 * num_tokens / (time.perf_counter() - wall)
        peak = memory.stop() - before
        experts = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/experts").read())
    finally:
        server.terminate()
        server.wait(60)
    return {
        "ready_seconds": ready_seconds,
        "tokens_per_second": 1000 / single["x-time-per-token"],
        "headers_ms": single,
        "tokens_per_second_four_together": together,
        "peak_device_bytes": peak,
        "experts_bytes": shape.experts_bytes,
        "totals": experts["totals"],
    }


def _wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5)
            return
        except OSError:
            time.sleep(0.2)


def _generate(num_tokens: int, seed: int = 1) -> tuple[dict[str, Any], Any]:
    parameters = {"max_new_tokens": num_tokens, "do_sample": True, "seed": seed, "details": True}
    body = json.dumps({"inputs": PROMPTS[seed % len(PROMPTS)], "parameters": parameters}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.loads(response.read()), response.headers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for checkpoint and store, twice their size")
    parser.add_argument("--num-layers", type=int, default=LARGE.num_layers)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    shape = Shape(**{**LARGE.__dict__, "num_layers": arguments.num_layers})
    equal = equal_text(arguments.directory)
    print(
        table(
            ["prompt", "greedy tokens", "equal on CPU and GPU"],
            [[r["prompt"], r["num_tokens"], r["equal"]] for r in equal],
        )
    )
    store, extraction = extract_large(arguments.directory, shape)
    print(f"extracted in {extraction['seconds']:.0f} s, {extraction['bytes_per_second'] / 1e9:.2f} GB/s", flush=True)
    served = serve_quarter(store, shape, arguments.num_tokens)
    rows = [
        ["seconds until ready", served["ready_seconds"]],
        ["tokens/s, one request", served["tokens_per_second"]],
        ["tokens/s, four together", served["tokens_per_second_four_together"]],
        ["peak device memory, GB", served["peak_device_bytes"] / 1e9],
        ["all experts, GB", shape.experts_bytes / 1e9],
    ]
    print(table(["a quarter of the experts in slots", ""], rows))
    result = {"equal_text": equal, "extraction": extraction, "serving": served}
    finish("serve_gpu", {**environment("cuda"), **result}, save=arguments.save)


if __name__ == "__main__":
    main()
