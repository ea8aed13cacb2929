"""Experts in 16, 8 and 4 bits on a CPU: bytes, decode and prefill side by side, and llama.cpp beside them.

What is measured, in words, on one checkpoint of random weights that is mostly experts (or one of your own):
- *experts MiB*: the memory of all slots while serving, one for each expert of each layer.
- *decode tokens/s*, *TTFT*, *held*: as in `benchmarks.cpu.decode`; every row is a process of its own, rows take turns,
  figures are medians. Computing is in bfloat16; the products of encoded rows add in float32.
- *llama.cpp*: the same weights in a GGUF file, everything but norms and routers in Q8_0 or Q4_0; a prompt of as many
  tokens, then random tokens one at a time. It rounds the inputs of its products to 8 bits; ours are not rounded.
  Needs the packages gguf and llama-cpp-python, which builds llama.cpp for this machine; without them it is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks.cpu.decode_worker import Job
from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from benchmarks.harness.reporting import REPOSITORY, environment, finish, table
from extractor.encoding.names import ExpertsDtype

Results = dict[str, list[dict[str, Any]]]


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="deepfew-bench-") as temporary:
        work = arguments.work or Path(temporary)
        if arguments.checkpoint is None:
            write_checkpoint(work / "checkpoint", Shape())
        commands = _commands(arguments, arguments.checkpoint or work / "checkpoint", work)
        results: Results = {label: [] for label in commands}
        for repetition in range(arguments.runs):
            for label, command in commands.items():
                print(f"run {repetition + 1} of {arguments.runs}: {label}", file=sys.stderr)
                results[label].append(_run(command, arguments.threads))
    rows = {label: _summary(found) for label, found in results.items()}
    plain = rows["deepfew, 16bit"]
    print(f"\n{arguments.threads} threads, {arguments.prompt_tokens} prompt tokens, medians of {arguments.runs}\n")
    columns = ["", "experts MiB", "of 16 bit", "decode tokens/s", "times 16 bit", "TTFT ms", "held MiB"]
    print(table(columns, [_cells(label, row, plain) for label, row in rows.items()]))
    settings = {name: getattr(arguments, name) for name in ("runs", "threads", "prompt_tokens", "new_tokens")}
    result = {"benchmark": "packed", "environment": environment(), "settings": settings, "rows": rows}
    finish("packed_cpu", result, save=arguments.save)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu.packed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="directory; default: one is generated, mostly experts")
    parser.add_argument("--work", type=Path, help="where the checkpoint, stores and GGUF files are kept")
    parser.add_argument("--dtypes", default="fp8,int4", help=f"beside 16bit, of {', '.join(get_args(ExpertsDtype))}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/packed_cpu.json")
    return parser.parse_args()


def _commands(arguments: argparse.Namespace, checkpoint: Path, work: Path) -> dict[str, list[str]]:
    """The command of each row; makes the stores and the GGUF files."""
    commands = {}
    config = json.loads((checkpoint / "config.json").read_text())
    for dtype in ["16bit", *arguments.dtypes.split(",")]:
        store = work / f"store-{dtype}"
        if not (store / "manifest.json").is_file():
            make_store(checkpoint, store, experts_dtype=dtype)
        job = Job(
            kind="deepfew",
            path=str(store),
            device="cpu",
            dtype="bfloat16",
            num_threads=arguments.threads,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            warmup_tokens=8,
            sample=True,
            num_slots=config["num_experts"],
        )
        commands[f"deepfew, {dtype}"] = ["-m", "benchmarks.cpu.decode_worker", json.dumps(asdict(job))]
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "llama_cpp")):
        print("gguf or llama-cpp-python is not installed: llama.cpp is left out", file=sys.stderr)
        return commands
    for kind in ("Q8_0", "Q4_0"):
        given = [work / f"{kind}.gguf", checkpoint, kind, arguments.prompt_tokens, arguments.new_tokens]
        commands[f"llama.cpp, {kind}"] = ["-m", "benchmarks.cpu.llama", *map(str, given), str(arguments.threads)]
    return commands


def _run(command: list[str], threads: int) -> dict[str, Any]:
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("experts_bytes", "tokens_per_second", "ttft_seconds", "held_bytes")
    summary: dict[str, Any] = {key: statistics.median(result[key] for result in results) for key in keys}
    return summary | {"runs": [result["tokens_per_second"] for result in results]}


def _cells(label: str, row: dict[str, Any], plain: dict[str, Any]) -> list[object]:
    return [
        label,
        row["experts_bytes"] / 2**20,
        row["experts_bytes"] / plain["experts_bytes"],
        row["tokens_per_second"],
        row["tokens_per_second"] / plain["tokens_per_second"],
        row["ttft_seconds"] * 1000,
        row["held_bytes"] / 2**20,
    ]


if __name__ == "__main__":
    main()
