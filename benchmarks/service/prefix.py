"""A growing chat on a CPU: the time to the second turn's first token, with the first turn in KV memory.

What is measured, in words, in one process, on a generated checkpoint in bf16 with every expert in a slot:
- *found*: from sending the second turn (the first turn's prompt of P tokens, its answer, and N new tokens) to its first
  token, of an engine that has the first turn's prompt in KV memory.
- *only what is new*: the same runner reads as many tokens as *found* has to (answer and new ones) into a row that holds
  the first turn's prompt, in the same chunks, without an engine. This is the floor; it is timed right before *found*.
- *read anew*: as *found*, of an engine over the same model without a prefix cache.
Each figure is the median of the rounds, every round with other texts. *ratio* is found / only what is new, of each
round. The answers with and without the cache are compared token by token.

Then, over HTTP, two servers of the bundled checkpoint in its own dtype, with and without `--prefix-cache`: chats of
several turns at once, some under a profile, a pool or a router temperature. *same*: turns with the same text and
deficit.

    python -m benchmarks.service.prefix [--prompt 4000] [--new 200] [--rounds 5] [--chats 8] [--turns 5] [--save]
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from benchmarks.harness.servers import running
from expert_store.store import Store
from server.engine.admission import EngineLimits
from server.engine.engine import Engine
from server.engine.request import Event, FinishedEvent, GenerationRequest, SamplingParams, TokenEvent
from server.model.host.assembly import HostModel, load_model
from server.model.host.runner import HostRunner
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv.rows import KvRows
from server.model.runner import RunnerOptions

SHAPE = Shape(num_layers=8, num_experts=16, hidden=512, intermediate=512, context_tokens=16384)
ANSWER_TOKENS = 16
CHUNK_TOKENS = 256
MASKINGS: tuple[dict[str, Any], ...] = (
    {},
    {"pool": 16},
    {"profile": "half"},
    {"router_temperature": 0.7},
)
WORDS = "the dog went to the harbour and saw a ship that came from a city far away with nine sailors and one cat"


def main() -> None:
    """Measure; a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = second_turns(Path(folder), asked.prompt, asked.new, asked.rounds)
        chats = chats_over_http(Path(folder), asked.chats, asked.turns)
    medians = {name: statistics.median(one[name] for one in times) for name in times[0]}
    names = ("found_seconds", "only_new_seconds", "anew_seconds", "ratio")
    print(table(["", *names], [["median", *(medians[name] for name in names)]]))
    print(f"{chats['same']} of {chats['turns']} turns the same, {chats['hit_share']:.0%} of prompt tokens found")
    result = {
        "environment": environment(),
        "prompt_tokens": asked.prompt,
        "new_tokens": asked.new,
        "rounds": times,
        "median": medians,
        "http": chats,
    }
    finish("prefix", result, save=asked.save)


# -- the second turn's first token -------------------------------------------------------------------------------------


def second_turns(folder: Path, num_prompt: int, num_new: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of each round."""
    write_checkpoint(folder / "checkpoint", SHAPE)
    store = make_store(folder / "checkpoint", folder / "store")
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.bfloat16)
    model = load_model(Store.open(store), options)
    most = num_prompt + num_new + 4 * ANSWER_TOKENS
    engines = {shares: _engine(model, most, shares) for shares in (True, False)}
    floor = HostRunner(model, max_rows=1, max_tokens=most)
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(rounds + 1):
        first = torch.randint(100, 8000, (num_prompt,), generator=generator).tolist()
        new = torch.randint(100, 8000, (num_new,), generator=generator).tolist()
        one = _round(engines, floor, first, new)
        if number:  # the first round warms up
            found.append(one)
    for engine in engines.values():
        engine.stop(0)
    return found


def _engine(model: HostModel, max_tokens: int, shares: bool) -> Engine:
    kv = KvRows(max_rows=1, num_blocks=3 * num_blocks_of(max_tokens), shares=shares)
    engine = Engine(
        lambda progress: HostRunner(model, max_rows=1, max_tokens=max_tokens, kv=kv),
        EngineLimits(prefill_chunk_tokens=CHUNK_TOKENS),
    )
    engine.start()
    engine.loaded.result()
    return engine


def _round(engines: dict[bool, Engine], floor: HostRunner, first: list[int], new: list[int]) -> dict[str, Any]:
    answer, _ = _ask(engines[True], first)
    second = first + answer + new
    anew_answer, anew = _ask(engines[False], second)
    row = floor.allocate()
    unit = BLOCK_TOKENS if floor.cuts_anywhere else CHUNK_TOKENS
    start = len(first) // unit * unit
    _read(floor, row, second[:start])
    began = time.perf_counter()
    _read(floor, row, second[start:])
    only_new = time.perf_counter() - began
    floor.free(row)
    told, found = _ask(engines[True], second)
    return {
        "found_seconds": found.timing.ttft_seconds,
        "only_new_seconds": only_new,
        "anew_seconds": anew.timing.ttft_seconds,
        "ratio": found.timing.ttft_seconds / only_new,
        "cached_tokens": found.num_cached_tokens,
        "read_tokens": len(second) - start,
        "same": told == anew_answer,
    }


def _read(runner: HostRunner, row: int, tokens: list[int]) -> None:
    for start in range(0, len(tokens), CHUNK_TOKENS):
        runner.prefill(row, tokens[start : start + CHUNK_TOKENS])


def _ask(engine: Engine, prompt: list[int]) -> tuple[list[int], FinishedEvent]:
    events: queue.Queue[Event] = queue.Queue()
    sampling = SamplingParams(max_new_tokens=ANSWER_TOKENS, ignore_eos=True)
    engine.submit(GenerationRequest(str(time.monotonic_ns()), tuple(prompt), sampling), events.put)
    tokens = []
    while True:
        event = events.get(timeout=600)
        if isinstance(event, TokenEvent):
            tokens.append(event.token_id)
        elif isinstance(event, FinishedEvent):
            return tokens, event
        else:
            raise SystemExit(f"the request failed: {event.error}")


# -- chats over HTTP ---------------------------------------------------------------------------------------------------


def chats_over_http(folder: Path, num_chats: int, num_turns: int) -> dict[str, Any]:
    """Turns of chats that got the same answer from both servers, and the share of prompt tokens that was found."""
    store = make_store(BUNDLED, folder / "bundled")
    profile = folder / "half.json"
    experts = [{"experts": [expert] * 8, "score": 1.0} for expert in range(32)]
    plan = {"format": "deepfew-plan", "version": 1, "alignment": {"kind": "index"}, "num_layers": 8, "num_experts": 64}
    profile.write_text(json.dumps(plan | {"deep_experts": experts}))
    serve = (sys.executable, "-m", "server.cli", "serve", str(store), "--log-level", "warning", "--max-batch-size", "4")
    serve += ("--profiles", str(profile), "--no-collect-statistics")
    answers: dict[str, list[list[Any]]] = {}
    share = 0.0
    for flag in ("--prefix-cache", "--no-prefix-cache"):
        with running((*serve, flag)) as url, ThreadPoolExecutor(num_chats) as pool:
            answers[flag] = list(pool.map(lambda chat: _chat(url, chat, num_turns), range(num_chats)))
            counted = {
                name: float(value)
                for name, _, value in (line.rpartition(" ") for line in httpx.get(url + "/metrics").text.splitlines())
                if name in ("deepfew_prompt_tokens_total", "deepfew_cached_prompt_tokens_total")
            }
            held = httpx.get(url + "/info").json()["kv_memory"]["used_blocks"]
            if held:
                raise SystemExit(f"{held} blocks are held after the last request")
            share = max(share, counted["deepfew_cached_prompt_tokens_total"] / counted["deepfew_prompt_tokens_total"])
    pairs = [
        (one, other)
        for chat, same in zip(*answers.values(), strict=True)
        for one, other in zip(chat, same, strict=True)
    ]
    return {"turns": len(pairs), "same": sum(one == other for one, other in pairs), "hit_share": share}


def _chat(url: str, chat: int, num_turns: int) -> list[Any]:
    """(text, deficit) of each turn."""
    words = WORDS.split()
    text, told = "", []
    for turn in range(num_turns):
        text += " ".join(words[(chat // len(MASKINGS) + turn + at) % len(words)] for at in range(60)) + ". "
        body = {"prompt": text, "max_tokens": 24, "temperature": 0.8, "seed": chat, **MASKINGS[chat % len(MASKINGS)]}
        answer = httpx.post(url + "/v1/completions", json={"model": "any", **body}, timeout=600)
        if answer.status_code != 200:
            raise SystemExit(f"{answer.status_code}: {answer.text}")
        choice = answer.json()["choices"][0]
        told.append((choice["text"], choice["deficit"]))
        text += choice["text"]
    return told


if __name__ == "__main__":
    main()
