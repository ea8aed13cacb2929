"""One process of `benchmarks.cpu.decode`: loads one side, warms up, generates once, prints its figures as JSON.

Invariant: peak memory is that of the measured side alone, so each side imports what it needs in its own function.
"""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

TEXT = "Once upon a time there was a little boy named Jack. He lived in a house by the sea with his mother. "


@dataclass(frozen=True)
class Job:
    """The work of one process."""

    kind: str  # "stock", "deepfew" or "imports"
    path: str
    device: str
    dtype: str
    num_threads: int
    prompt_tokens: int
    new_tokens: int
    warmup_tokens: int
    sample: bool
    implementation: str = ""  # stock
    num_slots: int = 0  # deepfew


def measure(job: Job) -> dict[str, Any]:
    """Run one job; peak memory is of this whole process."""
    torch.set_num_threads(job.num_threads)
    torch.manual_seed(0)
    result = {"imports": _imports, "stock": _stock, "deepfew": _deepfew}[job.kind](job)
    result["peak_rss_bytes"] = _status("VmHWM")
    if job.device.startswith("cuda"):
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


def _imports(job: Job) -> dict[str, Any]:
    """Memory of a process that has imported everything and loaded nothing."""
    import server.engine.engine
    import server.model.host.assembly  # noqa: F401

    AutoTokenizer.from_pretrained(Path(job.path) / "trunk")
    return {"held_bytes": _status("RssAnon")}


def _stock(job: Job) -> dict[str, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.path, dtype=getattr(torch, job.dtype), experts_implementation=job.implementation
    )
    model.to(job.device).eval()
    ids = _prompt(job, AutoTokenizer.from_pretrained(job.path), job.device)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, temperature=None, top_k=None, top_p=None)
    candidates = []
    for generate in (_stock_generate, _stock_loop):
        generate(model, ids, job, job.warmup_tokens)
        times, tokens = generate(model, ids, job, job.new_tokens)
        candidates.append(_rates(times, tokens) | {"by": generate.__name__.removeprefix("_stock_")})
    return max(candidates, key=lambda one: one["tokens_per_second"]) | {"held_bytes": _status("RssAnon")}


class _Clock(BaseStreamer):
    """Notes when each new token reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # first the prompt, then a token at a time

    def end(self) -> None:
        pass


def _stock_generate(model: Any, ids: torch.Tensor, job: Job, new_tokens: int) -> tuple[list[float], list[int]]:
    clock = _Clock()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=job.sample,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        streamer=clock,
    )
    return clock.times, output[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def _stock_loop(model: Any, ids: torch.Tensor, job: Job, new_tokens: int) -> tuple[list[float], list[int]]:
    times, tokens = [time.perf_counter()], []
    past, step = None, ids
    for _ in range(new_tokens):
        output = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, logits = output.past_key_values, output.logits[:, -1].float()
        step = torch.multinomial(logits.softmax(-1), 1) if job.sample else logits.argmax(-1, keepdim=True)
        tokens.append(int(step))
        times.append(time.perf_counter())
    return times, tokens


def _deepfew(job: Job) -> dict[str, Any]:
    from expert_store.residency.cache import CacheStatistics
    from expert_store.store import Store
    from server.engine.engine import Engine
    from server.engine.request import EngineStatus
    from server.model.host.assembly import load_model, resolve_device
    from server.model.host.sequence_runner import make_runner
    from server.model.runner import RunnerOptions

    store = Store.open(job.path)
    options = RunnerOptions(resolve_device(job.device), getattr(torch, job.dtype), num_slots=job.num_slots)
    model = load_model(store, options)
    runner = make_runner(model, max_rows=1, max_tokens=job.prompt_tokens + job.new_tokens)
    engine = Engine(lambda progress: runner)
    engine.start()
    status: EngineStatus = engine.status()
    while status.state == "loading":
        time.sleep(0.01)
        status = engine.status()
    prompt = _prompt(job, model.tokenizer, "cpu")[0].tolist()
    _generate(engine, prompt, job, job.warmup_tokens)
    at_tokens: list[CacheStatistics] = []
    times, tokens = _generate(engine, prompt, job, job.new_tokens, lambda: at_tokens.append(model.cache.statistics()))
    before, after = at_tokens[0], model.cache.statistics()
    held_bytes = _status("RssAnon")
    engine.stop(drain_seconds=0)
    hits, misses = int((after.hits - before.hits).sum()), int((after.misses - before.misses).sum())
    return _rates(times, tokens) | {
        "held_bytes": held_bytes,
        "hit_rate": hits / max(1, hits + misses),
        "experts_bytes": after.slot_bytes,
        "fetched_bytes_per_token": int((after.fetch_bytes - before.fetch_bytes).sum()) / (len(tokens) - 1),
    }


def _generate(
    engine: Any, prompt: list[int], job: Job, new_tokens: int, at_first_token: Callable[[], None] = lambda: None
) -> tuple[list[float], list[int]]:
    from server.engine.request import FinishedEvent, GenerationRequest, SamplingParams, TokenEvent

    sampling = SamplingParams(
        max_new_tokens=new_tokens, do_sample=job.sample, seed=1 if job.sample else None, ignore_eos=True
    )
    events: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
    times, tokens = [time.perf_counter()], []
    request = GenerationRequest(f"bench-{new_tokens}", tuple(prompt), sampling)

    def on_event(event: Any) -> None:
        if isinstance(event, TokenEvent) and event.index == 1:
            at_first_token()
        events.put((time.perf_counter(), event))

    engine.submit(request, on_event)
    while True:
        at, event = events.get(timeout=600)
        if isinstance(event, TokenEvent):
            times.append(at)
            tokens.append(event.token_id)
        elif isinstance(event, FinishedEvent):
            return times, tokens
        else:
            raise RuntimeError(f"generation failed: {event}")


def _prompt(job: Job, tokenizer: Any, device: str) -> torch.Tensor:
    """[1, prompt_tokens] ids of a text, repeated as often as it takes."""
    ids: list[int] = tokenizer(TEXT)["input_ids"]
    times = -(-job.prompt_tokens // len(ids))
    return torch.tensor([(ids * times)[: job.prompt_tokens]], device=device)


def _rates(times: list[float], tokens: list[int]) -> dict[str, Any]:
    """From the time of the hand-over followed by the time of each token."""
    return {
        "tokens_per_second": (len(times) - 2) / (times[-1] - times[1]),
        "ttft_seconds": times[1] - times[0],
        "token_ids": tokens,
    }


def _status(key: str) -> int:
    """Bytes of a memory figure in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


if __name__ == "__main__":
    print(json.dumps(measure(Job(**json.loads(sys.argv[1])))))
