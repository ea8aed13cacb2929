"""KV memory of the captured path on a GPU: a chat's next turn, and many short requests in the memory of few long ones.

What is measured, in words, in one process, on a generated checkpoint in bf16 with a quarter of the experts in slots:
- *found*: from sending a chat's second turn (P prompt tokens, their answer, and N new tokens) to its first token, with
  the first turn in KV memory; *anew*: the same without a prefix cache. *same*: rounds in which both answers have the
  same tokens. Each round has another text; the first one warms up.
- *short*: 32 requests of 1,024 tokens (prompt and answer) sent at once to the memory that 4 requests of 8,192 take.
  *most running*: at once; *preempted*: times that one lost its rows; *like alone*: of those asked again one after the
  other, requests with the same tokens.

    python -m benchmarks.gpu.kv_memory [--prompt 4000] [--new 200] [--rounds 4] [--directory DIR] [--save]
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from benchmarks.harness.reporting import environment, finish, table
from expert_store.store import Store
from server.engine.admission import EngineLimits
from server.engine.engine import Engine
from server.engine.request import Event, FinishedEvent, GenerationRequest, SamplingParams, TokenEvent
from server.model.decode_path import load_runner
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RunnerOptions

SHAPE = Shape(
    num_layers=8, num_experts=32, hidden=1024, intermediate=512, num_heads=16, num_kv_heads=4, context_tokens=16384
)
LONG_REQUESTS, LONG_TOKENS = 4, 8192
SHORT_REQUESTS, SHORT_TOKENS = 32, 1024
"""As many as a captured batch may have."""
ANSWER_TOKENS = 48
ALONE = 4
KV_BYTES = LONG_REQUESTS * LONG_TOKENS * 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * 2


def main() -> None:
    """Measure; two tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--directory", type=Path, help="of checkpoint and store; default one that is removed")
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = _store(asked.directory or Path(folder), asked.device)
        found = {}
        for shares in (True, False):
            engine = _engine(store, asked.device, shares)
            found[shares] = [_chat(engine, seed, asked.prompt, asked.new) for seed in range(asked.rounds + 1)][1:]
            if shares:
                short = _short(engine)
            engine.stop(0)
    rounds = [
        {"found_seconds": one[1], "anew_seconds": other[1], "cached_tokens": one[2], "same": one[0] == other[0]}
        for one, other in zip(found[True], found[False], strict=True)
    ]
    medians = {name: statistics.median(one[name] for one in rounds) for name in ("found_seconds", "anew_seconds")}
    same = sum(one["same"] for one in rounds)
    print(table([*medians, "same"], [[*medians.values(), f"{same} of {len(rounds)}"]]))
    print(table(list(short), [list(short.values())]))
    result = {
        "environment": environment(asked.device),
        "prompt_tokens": asked.prompt,
        "new_tokens": asked.new,
        "kv_bytes": KV_BYTES,
        "rounds": rounds,
        "median": medians,
        "short": short,
    }
    finish("kv_gpu", result, save=asked.save)


def _store(folder: Path, device: str) -> Path:
    if not (folder / "store" / "manifest.json").is_file():
        write_checkpoint(folder / "checkpoint", SHAPE, device=device)
        make_store(folder / "checkpoint", folder / "store")
    return folder / "store"


def _engine(store: Path, device: str, shares: bool) -> Engine:
    """An engine with KV memory for a few long requests; with a cache or not, it has as many rows, since more than eight
    have other products, and so other bits."""
    options = RunnerOptions(
        device=torch.device(device),
        dtype=torch.bfloat16,
        path="auto" if device == "cpu" else "device",
        max_rows=SHORT_REQUESTS,
        max_tokens=LONG_TOKENS,
        num_slots=SHAPE.num_experts // 4,
        kv_memory_bytes=KV_BYTES,
        prefix_cache=shares,
    )
    began = time.perf_counter()
    engine = Engine(
        lambda progress: load_runner(Store.open(store), options, progress=progress),
        EngineLimits(max_waiting_tokens=SHORT_REQUESTS * SHORT_TOKENS),
    )
    engine.start()
    engine.loaded.result()
    memory = engine.status().memory
    print(f"ready after {time.perf_counter() - began:.1f} s: {memory}", flush=True)
    if memory.kv_bytes != KV_BYTES:
        raise SystemExit(f"KV memory has {memory.kv_bytes} bytes, wanted {KV_BYTES}")
    return engine


def _chat(engine: Engine, seed: int, num_prompt: int, num_new: int) -> tuple[list[int], float, int]:
    """The second turn's answer, its seconds to the first token, and the tokens that were found of it."""
    generator = torch.Generator().manual_seed(seed)
    first, new = (torch.randint(100, 8000, (count,), generator=generator).tolist() for count in (num_prompt, num_new))
    answer, _ = _Answer(engine, first, ANSWER_TOKENS).result()
    told, end = _Answer(engine, first + answer + new, ANSWER_TOKENS).result()
    return told, end.timing.ttft_seconds, end.num_cached_tokens


def _short(engine: Engine) -> dict[str, Any]:
    """Figures of many short requests at once."""
    generator = torch.Generator().manual_seed(99)
    num_prompt = SHORT_TOKENS - ANSWER_TOKENS
    prompts = [torch.randint(100, 8000, (num_prompt,), generator=generator).tolist() for _ in range(SHORT_REQUESTS)]
    began, most = time.perf_counter(), 0
    asked = [_Answer(engine, prompt, ANSWER_TOKENS) for prompt in prompts]
    while not all(one.is_ended for one in asked):
        most = max(most, engine.status().num_running)
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    answers = [one.result()[0] for one in asked]
    preempted = engine.status().totals.num_preemptions
    engine.runner.kv.check_integrity()
    alone = sum(_Answer(engine, prompts[at], ANSWER_TOKENS).result()[0] == answers[at] for at in range(ALONE))
    return {
        "requests": len(answers),
        "blocks": engine.runner.kv.pool.num_blocks,
        "blocks wanted": SHORT_REQUESTS * SHORT_TOKENS // BLOCK_TOKENS,
        "most running": most,
        "preempted": preempted,
        "seconds": seconds,
        "like alone": f"{alone} of {ALONE}",
    }


class _Answer:
    """A greedy request that was sent."""

    def __init__(self, engine: Engine, prompt: list[int], num_tokens: int) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.is_ended = False
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        engine.submit(GenerationRequest(f"{time.monotonic_ns()}-{id(self)}", tuple(prompt), sampling), self._take)

    def _take(self, event: Event) -> None:
        self._events.put(event)
        self.is_ended = not isinstance(event, TokenEvent)

    def result(self) -> tuple[list[int], FinishedEvent]:
        """Its tokens and end; ends the program where it failed."""
        tokens = []
        while isinstance(event := self._events.get(timeout=300), TokenEvent):
            tokens.append(event.token_id)
        if not isinstance(event, FinishedEvent):
            raise SystemExit(f"the request failed: {event.error}")
        return tokens, event


if __name__ == "__main__":
    main()
