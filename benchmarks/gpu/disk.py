"""Disk as a tier of the captured path: the same tokens with less and less host memory behind the slots.

What is measured, in words:
- *disk rate*: bytes a second of reading the store's experts in a random order with as many threads as a step uses, each
  span once, page cache dropped before; *cached rate*: the same bytes again, from the page cache.
- *ready*: seconds from the call until the first step can run; *filled*: until host memory holds all that it has room
  for.
- *decode*: `--num-tokens` given tokens, one at a time, after as many others (drawn by Zipf's law, the same for every
  share; random weights route by the token, so some experts are wanted often). ms a token, mean; *cold*: the page cache
  is dropped before each token, outside the clock; *cached*: it is not. *runs*: captured steps a token; *reads*: experts
  read from the disk a token; *waited*: share of the time that steps waited for the disk; *bound*: the larger of the ms
  with everything in memory and the bytes read over the rate of that kind.
- *prompt*: seconds of 2,048 tokens, page cache dropped before, and the GB that it read.

Every share must give the same most likely tokens; else the benchmark fails. Run on a machine with a GPU and
room for twice the experts: python -m benchmarks.gpu.disk --directory /tmp/disk-gpu [--save]
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.serve import arguments_over_a_large_store
from benchmarks.harness.checkpoints import make_store, write_checkpoint
from benchmarks.harness.reporting import environment, finish, table
from expert_store.store import Store
from server.model.device.memory.reading import READ_THREADS
from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.runner import RowStep, RunnerOptions
from server.serving.assembly import experts_bytes

SHARES = (1.0, 0.5, 0.25)
RATE_SPANS = 512


def drop_page_cache(store: Path) -> None:
    """Drop what the operating system holds of the store's experts."""
    for shard in (store / "experts").iterdir():
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_rates(path: Path, num_spans: int = RATE_SPANS) -> dict[str, float]:
    """Bytes a second of reading experts from the disk, and again from the page cache."""
    with Store.open(path) as store:
        experts = np.random.default_rng(0).permutation(np.argwhere(store.available))[:num_spans].tolist()
        size = store.layer_spec(0).span_bytes
        memory = [memoryview(bytearray(size)) for _ in range(READ_THREADS)]

        def read(at: int) -> None:
            for layer, expert in experts[at::READ_THREADS]:
                store.read_expert(layer, expert, memory[at])

        drop_page_cache(path)
        rates = {}
        for kind in ("cold", "cached"):
            began = time.perf_counter()
            with ThreadPoolExecutor(READ_THREADS) as readers:
                list(readers.map(read, range(READ_THREADS)))
            rates[kind] = len(experts) * size / (time.perf_counter() - began)
        return rates


def zipf_tokens(count: int, vocab: int, seed: int) -> list[int]:
    """Tokens by Zipf's law over a random order of the vocabulary."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, vocab + 1)
    drawn: list[int] = (
        np.random.default_rng(0).permutation(vocab)[random.choice(vocab, count, p=weights / weights.sum())].tolist()
    )
    return drawn


def measure(path: Path, options: RunnerOptions, share: float, num_tokens: int, num_prompt: int) -> dict[str, Any]:
    """One share of the experts' bytes as host memory."""
    began = time.perf_counter()
    store = Store.open(path)
    budget = int(share * experts_bytes(store))
    runner = load_device_runner(store, replace(options, host_memory_bytes=budget), proof=False)
    ready = time.perf_counter() - began
    tier = runner.tier
    assert tier is not None
    tier.wait()
    tier.look()
    found: dict[str, Any] = {"share": share, "ready_seconds": ready, "filled_seconds": time.perf_counter() - began}
    row = runner.allocate()
    vocab = runner.shape.vocab
    runner.prefill(row, zipf_tokens(8, vocab, seed=1))
    found["tokens"] = []
    for kind in ("cold", "cached"):
        _decode(runner, row, zipf_tokens(num_tokens, vocab, seed=2), None)
        tokens = zipf_tokens(num_tokens, vocab, seed=3)
        found[kind] = _decode(runner, row, tokens, path if kind == "cold" else None)
        found["tokens"] += found[kind].pop("tokens")
    runner.free(row)
    row = runner.allocate()
    drop_page_cache(path)
    before, began = tier.statistics(), time.perf_counter()
    output = runner.prefill(row, zipf_tokens(num_prompt, vocab, seed=4))
    found["tokens"].append(int(output.logits[-1].argmax()))
    found["prompt_seconds"] = time.perf_counter() - began
    found["prompt_read_bytes"] = tier.statistics().read_bytes - before.read_bytes
    found["host_bytes"] = tier.statistics().host_bytes
    runner.close()
    return found


def _decode(runner: DeviceRunner, row: int, tokens: Sequence[int], cold: Path | None) -> dict[str, Any]:
    """Decode given tokens; with `cold`, the store whose pages are dropped before each of them."""
    assert runner.tier is not None
    before, runs, seconds = runner.tier.statistics(), int(runner.pages.step), 0.0
    best = []
    for token in tokens:
        if cold is not None:
            drop_page_cache(cold)
        began = time.perf_counter()
        chosen = runner.decode([RowStep(row, token)]).chosen
        assert chosen is not None
        best.append(int(chosen.token[0]))
        seconds += time.perf_counter() - began
    after, num = runner.tier.statistics(), len(tokens)
    return {
        "token_ms": 1e3 * seconds / num,
        "runs": (int(runner.pages.step) - runs) / num,
        "reads": (after.reads - before.reads) / num,
        "read_bytes": (after.read_bytes - before.read_bytes) / num,
        "waited": (after.wait_seconds - before.wait_seconds) / seconds,
        "tokens": best,
    }


def compare(
    path: Path, options: RunnerOptions, shares: Sequence[float] = SHARES, num_tokens: int = 64, num_prompt: int = 2048
) -> dict[str, Any]:
    """Every share in turn, all of memory first. Raises RuntimeError if one gives other tokens."""
    rates = read_rates(path)
    rows: list[dict[str, Any]] = []
    tokens: list[int] | None = None
    for share in shares:
        found = measure(path, options, share, num_tokens, num_prompt)
        if tokens is not None and found["tokens"] != tokens:
            raise RuntimeError(f"with {share:.0%} of the experts in host memory the tokens are others")
        tokens = found.pop("tokens")
        for kind, rate in rates.items():
            resident = rows[0][kind]["token_ms"] if rows else found[kind]["token_ms"]
            found[kind]["bound_ms"] = max(resident, 1e3 * found[kind]["read_bytes"] / rate)
        rows.append(found)
        gc.collect()
    return {"rates": rates, "shares": rows}


def show(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for found in result["shares"]:
        for kind in ("cold", "cached"):
            one = found[kind]
            rows.append([
                f"{found['share']:.0%}", kind, one["token_ms"], one["bound_ms"], one["runs"], one["reads"],
                one["waited"], found["ready_seconds"], found["filled_seconds"], found["prompt_seconds"],
                found["prompt_read_bytes"] / 1e9,
            ])  # fmt: skip
    columns = ["host memory", "page cache", "ms a token", "bound", "runs", "reads", "waited", "ready s", "filled s",
               "prompt s", "prompt GB"]  # fmt: skip
    rates = ", ".join(f"{kind} {rate / 1e9:.2f} GB/s" for kind, rate in result["rates"].items())
    return f"disk: {rates}\n{table(columns, rows)}"


def main() -> None:
    arguments, shape = arguments_over_a_large_store((__doc__ or "").splitlines()[0])
    path = arguments.directory / "store"
    if not (path / "manifest.json").is_file():
        write_checkpoint(arguments.directory / "checkpoint", shape, device="cuda")
        make_store(arguments.directory / "checkpoint", path)
        shutil.rmtree(arguments.directory / "checkpoint")
    options = RunnerOptions(
        torch.device("cuda:0"), torch.bfloat16, max_rows=1, max_tokens=4096, num_slots=shape.num_experts // 4
    )
    result = compare(path, options, num_tokens=arguments.num_tokens)
    print(f"{shape.experts_bytes / 1e9:.1f} GB of experts, a quarter in slots\n{show(result)}")
    finish("disk_gpu", {**environment("cuda"), "experts_bytes": shape.experts_bytes, **result}, save=arguments.save)


if __name__ == "__main__":
    main()
