"""How fast is extraction, against `cp -r` of the same bytes?

Metrics, in words:
- `copy rate`: bytes of the checkpoint's directory ÷ seconds of `cp -r CHECKPOINT COPY` and the `sync` after it.
- `extract rate`: bytes of the finished store ÷ seconds from the first byte read to the manifest's rename and a `sync`
  of the whole system, as for the copy (the command makes every file durable by itself; the `sync` is there to be fair).
- `ratio`: extract rate ÷ copy rate, both of the same round; the median over the rounds is the result, wanted ≥ 0.8.
- `start`: seconds that the command takes before it writes: Python, transformers, headers, fingerprint, layout.
- `peak memory`: the command's largest resident set, and that minus a bare interpreter's.
- `warm`: the checkpoint's files are in the page cache when a run begins; `cold`: they were dropped from it (fadvise).
- `load`: processes that wanted a core in the minute before, from others than this benchmark; near 0 on a quiet machine.
The checkpoint is generated: a qwen3_moe config and random bytes in several safetensors files. Rounds alternate between
the two, after one uncounted round; outputs are deleted and the disk is synced before each run. The result file is
written after every counted round, so that a run that was cut off leaves its medians so far, with `is_finished` false.

    python benchmarks/cpu/extract.py [--gigabytes 2] [--rounds 3] [--directory DIR] [--result FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 2048, 768, 64, 32768
FILE_BYTES = 10**9
RANDOM_BYTES = 64 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the generated checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, warm and cold each")
    parser.add_argument("--directory", type=Path, default=None, help="where to work (default: the temporary directory)")
    parser.add_argument("--result", type=Path, default=None, help="file that also gets the JSON line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="bench-extract-") as folder:
        for result in run(Path(folder), arguments.gigabytes, arguments.rounds):
            if arguments.result is not None:
                arguments.result.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def run(folder: Path, gigabytes: float, rounds: int) -> Iterator[dict[str, object]]:
    """The figures after every counted round; the last are those of all rounds."""
    checkpoint, copy, store = folder / "checkpoint", folder / "copy", folder / "store"
    load = os.getloadavg()[0]
    size = generate(checkpoint, gigabytes)
    bare_kib = peak_kib([sys.executable, "-c", "pass"])
    print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(checkpoint.glob('*.safetensors')))} files")
    print(f"{'':<8} {'copy GB/s':>10} {'extract GB/s':>13} {'ratio':>6} {'start s':>8} {'peak MiB':>9}")
    table: dict[str, dict[str, float]] = {}
    peak = 0
    modes = ("warm", "cold")
    for mode in modes:
        rows = []
        for number in range(rounds + 1):
            copy_rate = size / timed_copy(checkpoint, copy, mode)
            extract_rate, start, kib = timed_extract(checkpoint, store, mode)
            peak = max(peak, kib)
            if not number:
                continue
            rows.append((copy_rate / 1e9, extract_rate / 1e9, extract_rate / copy_rate, start))
            print_row(mode, rows[-1], f"{kib / 1024:>9.0f}")
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            names = ("copy_gb_per_second", "extract_gb_per_second", "ratio", "start_seconds")
            table[mode] = {**dict(zip(names, medians, strict=True)), "rounds": number}
            yield {
                "benchmark": "extract",
                "is_finished": mode == modes[-1] and number == rounds,
                "checkpoint_bytes": size,
                "rounds": rounds,
                **table,
                "peak_mib": round(peak / 1024),
                "peak_above_interpreter_mib": round((peak - bare_kib) / 1024),
                "load_average_before": round(load, 1),
                "commit": commit(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
                "versions": {
                    "python": platform.python_version(),
                    **{name: version(name) for name in ("torch", "transformers")},
                },
            }
        print_row(f"{mode} med.", medians)


def print_row(name: str, row: Sequence[float], peak: str = "") -> None:
    print(f"{name:<9} {row[0]:>9.3f} {row[1]:>13.3f} {row[2]:>6.2f} {row[3]:>8.1f} {peak}", flush=True)


def generate(checkpoint: Path, gigabytes: float) -> int:
    """Write a qwen3_moe checkpoint of about that size with random bytes; returns its exact size."""
    checkpoint.mkdir()
    per_layer = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
    layers = max(1, round(gigabytes * 1e9 / per_layer))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    groups: list[list[tuple[str, list[int]]]] = [[]]
    filled = 0
    for name, shape in tensors(layers):
        if filled > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += shape[0] * (shape[1] if len(shape) > 1 else 1) * 2
    weight_map = {}
    noise = os.urandom(RANDOM_BYTES)
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        write(checkpoint / file, group, noise)
        weight_map |= dict.fromkeys((name for name, _ in group), file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in checkpoint.iterdir())


def tensors(layers: int) -> list[tuple[str, list[int]]]:
    """Names and shapes of all tensors, as a qwen3_moe checkpoint orders them."""
    found: list[tuple[str, list[int]]] = [
        ("model.embed_tokens.weight", [VOCABULARY, HIDDEN]),
        ("model.norm.weight", [HIDDEN]),
    ]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for expert in range(EXPERTS):
            at = f"{prefix}.mlp.experts.{expert}"
            found += [
                (f"{at}.down_proj.weight", [HIDDEN, INTERMEDIATE]),
                (f"{at}.gate_proj.weight", [INTERMEDIATE, HIDDEN]),
                (f"{at}.up_proj.weight", [INTERMEDIATE, HIDDEN]),
            ]
        found += [
            (f"{prefix}.mlp.gate.weight", [EXPERTS, HIDDEN]),
            (f"{prefix}.input_layernorm.weight", [HIDDEN]),
            (f"{prefix}.post_attention_layernorm.weight", [HIDDEN]),
            (f"{prefix}.self_attn.q_proj.weight", [2048, HIDDEN]),
            (f"{prefix}.self_attn.k_proj.weight", [512, HIDDEN]),
            (f"{prefix}.self_attn.v_proj.weight", [512, HIDDEN]),
            (f"{prefix}.self_attn.o_proj.weight", [HIDDEN, 2048]),
            (f"{prefix}.self_attn.q_norm.weight", [128]),
            (f"{prefix}.self_attn.k_norm.weight", [128]),
        ]
    return found


def write(path: Path, group: list[tuple[str, list[int]]], noise: bytes) -> None:
    """A safetensors file whose data is `noise`, repeated from a different place for every file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in group:
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while at > 0:
            start = at % 65521
            part = memoryview(noise)[start : start + min(at, len(noise) - start)]
            file.write(part)
            at -= len(part)


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
    command = [sys.executable, "-m", "extractor", str(checkpoint), str(store), "--json"]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root()).stdout)
    start = time.perf_counter()
    os.sync()
    seconds = done["write_seconds"] + time.perf_counter() - start
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
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


def peak_kib(command: list[str]) -> int:
    """Largest resident set of `command`."""
    pid = os.posix_spawn(command[0], command, os.environ)
    return os.wait4(pid, 0)[2].ru_maxrss


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=root(), check=False
    )
    return done.stdout.strip() or "unknown"


def root() -> Path:
    return Path(__file__).resolve().parents[2]


if __name__ == "__main__":
    main()
