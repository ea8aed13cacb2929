"""The main job on a GPU, through the commands that users type: extract, generate, serve, and a POST /generate.

What is measured, in words:
- *extraction*: seconds and rate of `deepfew extract` on a generated checkpoint.
- *servings*: `deepfew serve` of it three times, a quarter of the experts in slots: on the device-driven path with
  nothing compiled before, once more with what the first left in Triton's cache, and on the host-driven path.
- *ready*: seconds from the command to the first 200 of `/health/ready`; *phases*: how long the log said what was done,
  by its times, to 50 ms.
- *first request*: seconds of the very first one, of 8 tokens.
- *tokens/s*: generated tokens over the wall time of the requests, prompt included: one greedy request, one sampled
  (temperature 0.8, top-p 0.95), four greedy ones at once.
- *ms between tokens*: median time between the events of a stream as its client sees them, greedy and sampled;
  *ms to the first*: from sending the request to its first event.
- *peak device memory*: as the driver counts it, the most seen while serving, beside the bytes of all experts.

That texts are equal on every path is `tests/server/serving/test_serve_gpu.py`'s to show. Run on a machine with a GPU:
python -m benchmarks.gpu.serve --directory /tmp/serve-gpu [--save]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoints import Shape, write_checkpoint
from benchmarks.harness.reporting import REPOSITORY, environment, finish, table

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
        [sys.executable, "-c", "from server.cli.main import main; main()", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment_},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"deepfew {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


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


def serve_quarter(store: Path, shape: Shape, num_tokens: int, path: str, triton_cache: Path) -> dict[str, Any]:
    """Serve with a quarter of the experts in slots; one request, a sampled one, then four at once."""
    import torch

    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    before = total - free
    options = ["--slots", str(shape.num_experts // 4), "--port", str(PORT), "--device", "cuda", "--host-memory", "100%"]
    options += ["--decode-path", path, "--max-batch-size", "4", "--log-format", "json", "--max-context-tokens", "4096"]
    command = [sys.executable, "-c", "from server.cli.main import main; main()", "serve", str(store), *options]
    log = store.parent / "serve.log"
    started = time.time()
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=file, stderr=file, env={**os.environ, "TRITON_CACHE_DIR": str(triton_cache)}
        )
    try:
        _wait_until_ready(server)
        ready = time.time()
        memory = PeakMemory()
        memory.start()
        asked = time.perf_counter()
        _generate(8)
        first_seconds = time.perf_counter() - asked
        rates: dict[str, float] = {}
        streams: dict[str, dict[str, float]] = {}
        for name, options_, many in (
            ("one greedy", {}, 1),
            ("one sampled", {"temperature": 0.8, "top_p": 0.95, "seed": 1}, 1),
            ("four greedy", {}, 4),
        ):
            wall = time.perf_counter()
            with ThreadPoolExecutor(many) as clients:
                answers = list(clients.map(lambda at, o=options_: _generate(num_tokens, at, **o), range(many)))
            generated = sum(answer["details"]["generated_tokens"] for answer in answers)
            rates[name] = generated / (time.perf_counter() - wall)
            if many == 1:
                streams[name] = _stream(num_tokens, **options_)
        peak = memory.stop() - before
        experts = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/experts").read())
        info = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/info").read())
    finally:
        server.terminate()
        server.wait(60)
        print(log.read_text()[-1500:], flush=True)
    return {
        "decode_path": info["decode_path"],
        "ready_seconds": ready - started,
        "first_request_seconds": first_seconds,
        "phases": phases(log, started, ready),
        "tokens_per_second": rates,
        "streams": streams,
        "peak_device_bytes": peak,
        "totals": experts["totals"],
    }


def phases(log: Path, started: float, ready: float) -> dict[str, float]:
    """Seconds that each thing took which the log says was done while loading."""
    moments = [("python and imports", started)]
    for line in log.read_text().splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("message") == "loading" and record["doing"] != moments[-1][0]:
            moments.append((record["doing"], datetime.fromisoformat(record["time"]).timestamp()))
    took: dict[str, float] = {}
    for (doing, since), (_, until) in zip(moments, [*moments[1:], ("", ready)], strict=True):
        took[doing] = took.get(doing, 0.0) + until - since
    return took


def _wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5)
            return
        except OSError:
            time.sleep(0.2)


def _generate(num_tokens: int, prompt: int = 1, **options: Any) -> dict[str, Any]:
    with _post("/generate", num_tokens, prompt, details=True, **options) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer


def _stream(num_tokens: int, **options: Any) -> dict[str, float]:
    """Milliseconds to the first event of a stream, and the median between one and the next."""
    times = [time.perf_counter()]
    with _post("/generate_stream", num_tokens, 1, **options) as response:
        times += [time.perf_counter() for line in response if line.startswith(b"data:")]
    gaps = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
    return {"first_ms": gaps[0], "between_ms": statistics.median(gaps[1:])}


def _post(path: str, num_tokens: int, prompt: int, **options: Any) -> Any:
    parameters = {"max_new_tokens": num_tokens, **options}
    body = json.dumps({"inputs": PROMPTS[prompt % len(PROMPTS)], "parameters": parameters}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def arguments_over_a_large_store(description: str) -> tuple[argparse.Namespace, Shape]:
    """The command line of a benchmark that makes a large store, and the store's shape; makes the directory."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--directory", type=Path, required=True, help="for checkpoint and store, twice their size")
    parser.add_argument("--num-layers", type=int, default=LARGE.num_layers)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    return arguments, replace(LARGE, num_layers=arguments.num_layers)


def main() -> None:
    arguments, shape = arguments_over_a_large_store((__doc__ or "").splitlines()[0])
    store, extraction = extract_large(arguments.directory, shape)
    print(f"extracted in {extraction['seconds']:.0f} s, {extraction['bytes_per_second'] / 1e9:.2f} GB/s", flush=True)
    servings = {}
    cache = arguments.directory / "triton"
    shutil.rmtree(cache, ignore_errors=True)
    for name, path in (("device, first start", "device"), ("device, second start", "device"), ("host", "host")):
        servings[name] = serve_quarter(store, shape, arguments.num_tokens, path, cache)
    rows = [
        ["seconds until ready", *(one["ready_seconds"] for one in servings.values())],
        ["seconds of the first request", *(one["first_request_seconds"] for one in servings.values())],
        *(
            [f"tokens/s, {kind}", *(one["tokens_per_second"][kind] for one in servings.values())]
            for kind in ("one greedy", "one sampled", "four greedy")
        ),
        *(
            [f"{text}, {kind}", *(one["streams"][kind][key] for one in servings.values())]
            for kind in ("one greedy", "one sampled")
            for key, text in (("between_ms", "ms between tokens"), ("first_ms", "ms to the first"))
        ),
        ["peak device memory, GB", *(one["peak_device_bytes"] / 1e9 for one in servings.values())],
    ]
    print(table([f"{shape.experts_bytes / 1e9:.1f} GB of experts, a quarter in slots", *servings], rows))
    for name, one in servings.items():
        print(name, json.dumps({doing: round(seconds, 1) for doing, seconds in one["phases"].items()}))
    result = {"extraction": extraction, "servings": servings}
    finish("serve_gpu", {**environment("cuda"), **result}, save=arguments.save)


if __name__ == "__main__":
    main()
