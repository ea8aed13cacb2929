"""Rate and memory of extraction, against `cp -r` of the same bytes.

Metrics, in words:
- `copy rate`: bytes of the checkpoint's directory ÷ seconds of `cp -r CHECKPOINT COPY` and the `sync` after it.
- `extract rate`: bytes of the finished store ÷ seconds from the first byte read to the manifest's rename and a `sync`
  of the whole system, as for the copy (the command makes every file durable by itself; the `sync` is there to be fair).
- `ratio`: extract rate ÷ copy rate, both of the same round; the median over the rounds is the result, wanted ≥ 0.8.
- `start`: seconds that the command takes before it writes: Python, transformers, headers, fingerprint, layout.
- `peak memory`: the command's largest resident set, and that minus a bare interpreter's.
- `warm`: the checkpoint's files are in the page cache when a run begins; `cold`: they were dropped from it (fadvise).
- `load`: processes of others that wanted a core in the minute before; near 0 on a quiet machine.
The checkpoint is generated. Rounds alternate between copy and extraction, after one uncounted round. Outputs are
deleted and the disk is synced before each run. With --save the result file is written after every counted round; a run
that was cut off leaves its medians so far, with `is_finished` false.

This process stays small (it imports no torch), since Linux counts its size as the first size of each command.

    python -m benchmarks.cpu.extract [--gigabytes 2] [--rounds 3] [--directory DIR] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.reporting import REPOSITORY, environment, finish, table, write_result

MODES = ("warm", "cold")
HIDDEN, INTERMEDIATE, EXPERTS = 2048, 768, 64
LAYER_BYTES = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
SHAPE = {
    "--num-experts": EXPERTS, "--top-k": 8, "--hidden": HIDDEN, "--intermediate": INTERMEDIATE, "--num-heads": 16,
    "--num-kv-heads": 4, "--head-dim": 128, "--vocab-size": 32768,
}  # fmt: skip
COLUMNS = ("copy_gb_per_second", "extract_gb_per_second", "ratio", "start_seconds")


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the generated checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, warm and cold each")
    parser.add_argument("--directory", type=Path, default=None, help="working folder (default: a temporary one)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/extract.json")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="bench-extract-") as name:
        folder = Path(name)
        size = generate(folder / "checkpoint", arguments.gigabytes)
        bare_kib = measured([sys.executable, "-c", "pass"])[1]
        result = {
            "benchmark": "extract",
            **environment(),
            "checkpoint_bytes": size,
            "rounds": arguments.rounds,
            "load_average_before": round(load, 1),
        }
        peak = 0
        for mode in MODES:
            rows = []
            for number in range(arguments.rounds + 1):
                copy_rate = size / timed_copy(folder / "checkpoint", folder / "copy", mode)
                extract_rate, start, kib = timed_extract(folder / "checkpoint", folder / "store", mode)
                peak = max(peak, kib)
                if not number:
                    continue
                rows.append((copy_rate / 1e9, extract_rate / 1e9, extract_rate / copy_rate, start))
                medians = [statistics.median(column) for column in zip(*rows, strict=True)]
                result |= {
                    mode: {**dict(zip(COLUMNS, medians, strict=True)), "rounds": number},
                    "peak_mib": round(peak / 1024),
                    "peak_above_interpreter_mib": round((peak - bare_kib) / 1024),
                    "is_finished": mode == MODES[-1] and number == arguments.rounds,
                }
                if arguments.save:
                    write_result("extract", result)
            print(table([mode, *COLUMNS], [*enumerate_rows(rows), ["median", *medians]]), flush=True)
    finish("extract", result, save=arguments.save)


def enumerate_rows(rows: list[tuple[float, ...]]) -> list[list[object]]:
    """The rows with their numbers, from 1 on."""
    return [[f"round {number}", *row] for number, row in enumerate(rows, 1)]


def generate(checkpoint: Path, gigabytes: float) -> int:
    """Write a checkpoint of about that size, in a process of its own; returns its exact size."""
    sizes = [str(word) for flag, value in SHAPE.items() for word in (flag, value)]
    layers = str(max(1, round(gigabytes * 1e9 / LAYER_BYTES)))
    command = [sys.executable, "-m", "benchmarks.harness.checkpoints", str(checkpoint), "--num-layers", layers, *sizes]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def timed_copy(checkpoint: Path, copy: Path, mode: str) -> float:
    """Seconds of `cp -r` and `sync`."""
    settle(checkpoint, copy, mode)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", checkpoint, copy], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def timed_extract(checkpoint: Path, store: Path, mode: str) -> tuple[float, float, int]:
    """Bytes per second, seconds before the first byte, and peak KiB of one extraction."""
    settle(checkpoint, store, mode)
    output, kib = measured([sys.executable, "-m", "server.cli", "extract", str(checkpoint), str(store), "--json"])
    done = json.loads(output)
    start = time.perf_counter()
    os.sync()
    seconds = done["write_seconds"] + time.perf_counter() - start
    shutil.rmtree(store)
    return done["total_bytes"] / seconds, done["prepare_seconds"], kib


def settle(checkpoint: Path, output: Path, mode: str) -> None:
    """An empty place to write to, nothing left to be written, and the source in the page cache or out of it."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for path in checkpoint.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        if mode == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 2**24):
                pass
        os.close(descriptor)


def measured(command: list[str]) -> tuple[str, int]:
    """Standard output and the largest resident set in KiB of `command`; ends the benchmark where it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return output, usage.ru_maxrss


if __name__ == "__main__":
    main()
