"""Hashes of text beside what a replica's KV memory really holds: one replica, no Ray, conversations by Zipf's law.

Before each turn the replica's statistics say how many blocks of the turn's text it holds; its answer says how many
tokens of the prompt were found. KV memory has room for a part of all conversations, so their beginnings come and go.

- *said*: share of the prompts' bytes that the statistics said were held; *found*: share of their tokens that were;
- *too much*, *too little*: mean difference of the two in a turn, where the statistics said more or less than there was;
- *choice right*: turns in which both say the same of the question whether half of the prompt is held.

    python -m benchmarks.service.beginnings [--turns 200] [--kv-tokens 4096] [--save]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from server.api.replicas import PassedRequest
from server.cli.main import main as deepfew
from server.cluster.likeness import BLOCK_BYTES, likeness_of
from server.cluster.replica import Replica
from server.cluster.statistics import ReplicaStatistics
from server.settings.load import load_settings

CONVERSATIONS, TURN_BYTES, MAX_TURNS = 16, 400, 6
KV_BYTES = 2 * 8 * 2 * 64 * 4
"""Of a token of the bundled checkpoint in float32."""
HEADERS = ((b"content-type", b"application/json"), (b"host", b"localhost"))


async def ask(replica: Replica, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    request = PassedRequest("POST", "/v1/completions", b"", HEADERS, json.dumps(body).encode())
    content = b""
    async for batch in replica.serve(request, likeness_of(body)):
        content += b"".join(message.get("body", b"") for message in batch)
    found: dict[str, Any] = json.loads(content)
    return found


def said(replica: Replica, body: dict[str, Any]) -> float:
    """The share of the prompt's bytes that the statistics say is held."""
    statistics = ReplicaStatistics.from_wire(replica.statistics())
    assert statistics is not None
    held, beginning = frozenset(statistics.prefixes), likeness_of(body).beginning
    count = next((at for at, block in enumerate(beginning) if block not in held), len(beginning))
    return count * BLOCK_BYTES / len(body["prompt"].encode())


async def measure(replica: Replica, num_turns: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[turns, 2], the share that was said and the share that was found."""
    await replica.load()
    draw = random.Random(0)
    text = (REPOSITORY / "benchmarks" / "data" / "selection" / "stories_synth.txt").read_text()
    weights = [1 / (rank + 1) for rank in range(CONVERSATIONS)]
    histories = ["" for _ in weights]
    shares = []
    for _ in range(num_turns):
        at = draw.choices(range(CONVERSATIONS), weights)[0]
        start = draw.randrange(len(text) - TURN_BYTES)
        if len(histories[at]) > MAX_TURNS * TURN_BYTES:
            histories[at] = ""
        histories[at] += text[start : start + TURN_BYTES]
        body = {"model": "tiny-moe", "prompt": histories[at], "max_tokens": 8, "ignore_eos": True}
        before = said(replica, body)
        answer = await ask(replica, body)
        usage = answer["usage"]
        found = usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"]
        histories[at] += answer["choices"][0]["text"]
        shares.append((before, found))
    return np.array(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--kv-tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/beginnings.json")
    arguments = parser.parse_args()
    rows: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert deepfew(["extract", str(BUNDLED), str(folder / "store")]) == 0
        for tokens in arguments.kv_tokens:
            values = {"store": str(folder / "store"), "device": "cpu", "dtype": "float32", "slots": 24,
                      "memory_balance": "fixed", "max_context_tokens": 1024, "prefill_chunk_tokens": 32,
                      "kv_memory": str(tokens * KV_BYTES), "usage_directory": str(folder / "usage")}  # fmt: skip
            replica = Replica(load_settings(values, environ={}).settings, "0")
            shares = asyncio.run(measure(replica, arguments.turns))
            replica.close()
            more = shares[:, 0] - shares[:, 1]
            rows[tokens] = {
                "said": float(shares[:, 0].mean()), "found": float(shares[:, 1].mean()),
                "too_much": float(np.maximum(more, 0).mean()), "too_little": float(np.maximum(-more, 0).mean()),
                "choice_right": float(((shares[:, 0] > 0.5) == (shares[:, 1] > 0.5)).mean()),
            }  # fmt: skip
            print(tokens, rows[tokens], flush=True)
    names = ("said", "found", "too_much", "too_little", "choice_right")
    print(table(("KV tokens", *names), [(tokens, *(row[name] for name in names)) for tokens, row in rows.items()]))
    result = {"benchmark": "beginnings", **environment(), "turns": arguments.turns, "kv_tokens": rows}
    finish("beginnings", result, save=arguments.save)


if __name__ == "__main__":
    main()
