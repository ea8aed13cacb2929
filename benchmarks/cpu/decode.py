"""Decode speed and peak memory against stock transformers, on the same checkpoint, machine and number of threads.

What is measured, in words:
- *decode tokens/s*: one sequence; new tokens after the first, divided by the time from the first to the last. Ours goes
  through the engine (scheduling, sampling, text, usage ledger). Stock is the faster of `generate()` and a bare loop
  over the model's forward that only picks the most likely token, or samples.
- *TTFT*: from handing over the prompt to the first new token, the prompt being 64 tokens unless told otherwise.
- *peak RSS*: most resident memory of the process since it began, loading included (VmHWM of the OS). It counts pages of
  mapped files too; *held* is what stays in anonymous memory after the last token, which the OS cannot drop.
  On CUDA, *peak device* is torch's most allocated memory, loading included.
- *hit rate*: experts found in a slot, of those wanted while decoding; *fetched*: bytes copied into slots for a decoded
  token. A miss is read from the store's file: from disk, or from the OS's page cache where memory is free.

Every configuration and repetition is a process of its own, which first generates a few tokens to warm up;
configurations take turns, and figures are medians over the repetitions (of stock's implementations only the one
that was fastest in the first round is repeated). Times are taken when a token's id is on the host, on CUDA too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cpu.decode_worker import Job
from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from benchmarks.harness.reporting import REPOSITORY, environment, finish, table

STOCK_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="deepfew-bench-") as temporary:
        work = arguments.work or Path(temporary)
        checkpoint = arguments.checkpoint or _generated(work)
        store = _extract(checkpoint, work)
        config = json.loads((checkpoint / "config.json").read_text())
        num_experts = config.get("num_experts") or config["num_local_experts"]
        jobs = _jobs(arguments, checkpoint, store, num_experts)
        runs: list[list[dict[str, Any]]] = [[] for _ in jobs]
        for repetition in range(arguments.runs):
            again = [repetition == 0 or _is_worth_repeating(at, jobs, runs) for at in range(len(jobs))]
            for job, results, wanted in zip(jobs, runs, again, strict=True):
                if wanted:
                    print(f"run {repetition + 1} of {arguments.runs}: {_label(job, num_experts)}", file=sys.stderr)
                    results.append(_run(job))
    rows = [_summary(job, results, num_experts) for job, results in zip(jobs, runs, strict=True)]
    if not arguments.sample:
        _compare(rows)
    _report(arguments, rows, checkpoint, config)


def _report(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], checkpoint: Path, config: dict[str, Any]
) -> None:
    experts_bytes, all_bytes = _checkpoint_bytes(checkpoint)
    name = "the generated checkpoint" if arguments.checkpoint is None else arguments.checkpoint.name
    print(
        f"\n{name}: {all_bytes / 2**20:.0f} MiB, experts {experts_bytes / all_bytes:.0%} of them; {arguments.device}, "
        f"{arguments.threads} threads, {arguments.prompt_tokens} prompt tokens, {arguments.new_tokens} new tokens, "
        f"medians of {arguments.runs}\n"
    )
    memory = "peak device MiB" if arguments.device.startswith("cuda") else "peak RSS MiB"
    columns = ["", "dtype", "decode tokens/s", "TTFT ms", memory, "held MiB", "hit rate", "fetched MiB/token"]
    print(table(columns, [_cells(row, arguments.device) for row in rows]))
    compared = [row["same_tokens"] for row in rows if row["same_tokens"] is not None]
    if compared:
        print(f"\ngreedy tokens in float32 are {'the same' if all(compared) else 'NOT the same'} as stock's")
    result = {
        "benchmark": "decode",
        "environment": environment(arguments.device),
        "checkpoint": {"name": name, "bytes": all_bytes, "experts_bytes": experts_bytes, "config": _shape(config)},
        "settings": {
            "runs": arguments.runs,
            "threads": arguments.threads,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "sampled": arguments.sample,
        },
        "rows": rows,
    }
    suffix = "generated" if arguments.checkpoint is None else arguments.checkpoint.name
    finish(f"decode-{suffix}-{arguments.device.partition(':')[0]}", result, save=arguments.save)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu.decode", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="directory; default: one is generated, mostly experts")
    parser.add_argument(
        "--work", type=Path, help="where the generated checkpoint and the store are kept; default: removed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of both sides")
    parser.add_argument("--implementations", default=",".join(STOCK_IMPLEMENTATIONS), help="stock's, tried one by one")
    parser.add_argument("--slots-percent", default="100,50,25", help="of the experts of every layer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--sample", action=argparse.BooleanOptionalAction, help="default: sample random weights only")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/decode-….json")
    arguments = parser.parse_args()
    if arguments.sample is None:
        # Random weights repeat one token when they are greedy, and with it one choice of experts.
        arguments.sample = arguments.checkpoint is None
    return arguments


def _jobs(arguments: argparse.Namespace, checkpoint: Path, store: Path, num_experts: int) -> list[Job]:
    def job(kind: str, path: Path, dtype: str, **more: Any) -> Job:
        return Job(
            kind=kind,
            path=str(path),
            device=arguments.device,
            dtype=dtype,
            num_threads=arguments.threads,
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            warmup_tokens=8,
            sample=arguments.sample,
            **more,
        )

    jobs = [job("imports", store, "float32")]
    for dtype in arguments.dtypes.split(","):
        jobs += [job("stock", checkpoint, dtype, implementation=name) for name in arguments.implementations.split(",")]
        percents = [float(text) for text in arguments.slots_percent.split(",")]
        jobs += [job("deepfew", store, dtype, num_slots=max(1, round(num_experts * p / 100))) for p in percents]
    return jobs


def _generated(work: Path) -> Path:
    write_checkpoint(work / "checkpoint", Shape())
    return work / "checkpoint"


def _extract(checkpoint: Path, work: Path) -> Path:
    store = work / f"store-{checkpoint.name}"
    return store if (store / "manifest.json").is_file() else make_store(checkpoint, store)


def _is_worth_repeating(at: int, jobs: list[Job], runs: list[list[dict[str, Any]]]) -> bool:
    """Whether job `at` is ours, or stock's fastest with its dtype so far: the others are shown from one run."""

    def first(index: int) -> float:
        return float(runs[index][0]["tokens_per_second"])

    if jobs[at].kind != "stock":
        return jobs[at].kind == "deepfew"
    rivals = [i for i, job in enumerate(jobs) if job.kind == "stock" and job.dtype == jobs[at].dtype]
    return at == max(rivals, key=first)


def _run(job: Job) -> dict[str, Any]:
    variables = os.environ | {"OMP_NUM_THREADS": str(job.num_threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.cpu.decode_worker", json.dumps(asdict(job))]
    done = subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _summary(job: Job, results: list[dict[str, Any]], num_experts: int) -> dict[str, Any]:
    def median(key: str) -> float | None:
        values = [result[key] for result in results if result.get(key) is not None]
        return statistics.median(values) if values else None

    keys = ("tokens_per_second", "ttft_seconds", "peak_rss_bytes", "held_bytes", "peak_device_bytes", "hit_rate")
    return {
        "label": _label(job, num_experts),
        "kind": job.kind,
        "dtype": "" if job.kind == "imports" else job.dtype,
        "implementation": job.implementation,
        "num_slots": job.num_slots,
        **{key: median(key) for key in (*keys, "fetched_bytes_per_token")},
        "same_tokens": None,
        "token_ids": results[0].get("token_ids", []),
        "runs": [result.get("tokens_per_second") for result in results],
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Say of our float32 rows whether their greedy tokens are stock's."""
    stock = next((row for row in rows if row["kind"] == "stock" and row["dtype"] == "float32"), None)
    for row in rows:
        if stock is not None and row["kind"] == "deepfew" and row["dtype"] == "float32":
            row["same_tokens"] = row["token_ids"] == stock["token_ids"]


def _label(job: Job, num_experts: int) -> str:
    if job.kind == "stock":
        return f"transformers, {job.implementation}"
    if job.kind == "imports":
        return "imports alone"
    return f"deepfew, {job.num_slots} of {num_experts} in slots"


def _cells(row: dict[str, Any], device: str) -> list[object]:
    def scaled(key: str, factor: float) -> object:
        return "" if row[key] is None else float(row[key]) * factor

    peak = "peak_device_bytes" if device.startswith("cuda") else "peak_rss_bytes"
    mib = 1 / 2**20
    return [
        row["label"],
        row["dtype"],
        scaled("tokens_per_second", 1),
        scaled("ttft_seconds", 1000),
        scaled(peak, mib),
        scaled("held_bytes", mib),
        scaled("hit_rate", 1),
        scaled("fetched_bytes_per_token", mib),
    ]


def _checkpoint_bytes(checkpoint: Path) -> tuple[int, int]:
    """(bytes of experts, bytes of all tensors), from the headers."""
    experts = total = 0
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                total += end - begin
                experts += (end - begin) * (".experts." in name)
    return experts, total


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    )
    return {key: config[key] for key in keys if key in config}


if __name__ == "__main__":
    main()
