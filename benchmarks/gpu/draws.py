"""The cost of choosing tokens on the device, beside the captured step that makes the logits.

What is measured, in words:
- *step*: wall-clock time of one decode step with every expert in a slot, KV memory 1,024 tokens deep: its graph, the
  graph that chooses the tokens, what the host does for both, and the wait for the result. Median of the steps.
- *added*: the step less that of the kind *greedy*, whose token the step's own graph finds.
- *drawn*: a temperature. *narrowed*: top-k 50 and top-p 0.9 beside. *adjusted*: a bias of 1,000 tokens and both
  penalties. *constrained*: greedy among the tokens that a JSON Schema allows, computed anew for each token while the
  step runs. *all* of them together.
- *mask*: the host's time for the allowed tokens of one row, median; it is hidden where the step takes longer.

The shape is Qwen3-30B-A3B's, bf16, random weights. The vocabulary is the bundled tokenizer's, grown to 151,936 tokens
by joining random pairs of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.decode import QWEN
from benchmarks.gpu.steps import CONTEXT, full_pages, random_trunk
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from server.constraints.compiler import CompiledConstraint, ConstraintCompiler
from server.constraints.grammar import Json
from server.engine.request import SamplingParams
from server.engine.sampling import Sampler
from server.model.device.step.graphs import StepGraphs
from server.model.device.step.state import RowState
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape
from server.model.runner import RowStep

WARMUP = 5
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "user", "guest"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age", "role", "tags"],
    "additionalProperties": False,
}
DRAWN = SamplingParams(temperature=0.8, seed=1)
NARROWED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)
BIAS = dict.fromkeys(range(1000), 0.5)
ADJUSTED = SamplingParams(logit_bias=BIAS, presence_penalty=0.5, frequency_penalty=0.5)
ALL = replace(NARROWED, logit_bias=BIAS, presence_penalty=0.5, frequency_penalty=0.5)
KINDS = {
    "greedy": (SamplingParams(), False),
    "drawn": (DRAWN, False),
    "narrowed": (NARROWED, False),
    "adjusted": (ADJUSTED, False),
    "constrained": (SamplingParams(), True),
    "all": (ALL, True),
}


def grown_tokenizer(size: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """The bundled tokenizer with `size` tokens: new ones join two that it has."""
    described = json.loads((BUNDLED / "tokenizer.json").read_text())
    vocab, merges = described["model"]["vocab"], described["model"]["merges"]
    special = {token["content"] for token in described["added_tokens"]}
    pieces = [token for token in vocab if token not in special and len(token) < 8]
    rng = random.Random(seed)
    while len(vocab) < size:
        pair = rng.choice(pieces), rng.choice(pieces)
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(list(pair))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|endoftext|>"
    )


class Rows:
    """The rows of a batch, each with its sampler and its constraint."""

    def __init__(self, batch: int, params: SamplingParams, constraint: CompiledConstraint | None) -> None:
        self._samplers = [Sampler(params, (0,)) for _ in range(batch)]
        self._constraint = constraint
        self._states = [None if constraint is None else constraint.begin() for _ in range(batch)]
        self.tokens = [5 + 37 * at for at in range(batch)]
        self.mask_seconds: list[float] = []

    def steps(self) -> list[RowStep]:
        return [
            RowStep(
                at, self.tokens[at], choice=sampler.choice(), adjustment=sampler.adjustment,
                allowed=None if state is None else lambda state=state: self._timed(state),
            )
            for at, (sampler, state) in enumerate(zip(self._samplers, self._states, strict=True))
        ]  # fmt: skip

    def _timed(self, state: Any) -> Any:
        started = time.perf_counter()
        allowed = state.allowed()
        self.mask_seconds.append(time.perf_counter() - started)
        return allowed

    def take(self, tokens: list[int]) -> None:
        self.tokens = tokens
        for at, (sampler, token) in enumerate(zip(self._samplers, tokens, strict=True)):
            sampler.take(token)
            if (state := self._states[at]) is not None and self._constraint is not None:
                state.take(token)
                if state.is_complete:
                    self._states[at] = self._constraint.begin()


def measure(graphs: StepGraphs, kind: str, batch: int, compiled: Any, repeats: int) -> dict[str, Any]:
    """One kind at one batch size."""
    params, is_constrained = KINDS[kind]
    rows, times = Rows(batch, params, compiled if is_constrained else None), []
    graph = graphs.step(batch, masked=False)
    for attempt in range(repeats + WARMUP):
        steps = rows.steps()
        draw = graphs.draw(graph, steps)
        started = time.perf_counter()
        graph.enqueue(list(range(batch)), rows.tokens)
        if draw is not None:
            draw.enqueue(steps)
        report = graph.wait()
        tokens = (report.best_token if draw is None else draw.drawn[0])[:batch].long().tolist()
        if attempt >= WARMUP:
            times.append(time.perf_counter() - started)
        rows.take(tokens)
    masks = rows.mask_seconds[WARMUP * batch :]
    return {
        "batch": batch,
        "kind": kind,
        "step_ms": 1e3 * statistics.median(times),
        "mask_us": 1e6 * statistics.median(masks) if masks else None,
    }


def run(
    shape: DecodeShape, device: str, batches: tuple[int, ...], repeats: int, options: StepOptions | None = None
) -> list[dict[str, Any]]:
    """All kinds at all batch sizes."""
    trunk, pages, state = random_trunk(shape, device), full_pages(shape, device), RowState(shape, device)
    graphs = StepGraphs(shape, trunk, pages, state, options or StepOptions())
    compiled = ConstraintCompiler(grown_tokenizer(shape.vocab), shape.vocab, {0}).compile(Json(SCHEMA))
    rows: list[dict[str, Any]] = []
    for batch in batches:
        of_batch = []
        for kind in KINDS:
            state.lengths.fill_(min(CONTEXT, shape.max_tokens - repeats - WARMUP))
            of_batch.append(measure(graphs, kind, batch, compiled, repeats))
        greedy = of_batch[0]["step_ms"]
        rows += [
            {**row, "added_ms": row["step_ms"] - greedy, "added_share": row["step_ms"] / greedy - 1} for row in of_batch
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/draws_gpu.json")
    parser.add_argument("--layers", type=int, default=QWEN.num_layers, help="layers of the model")
    arguments = parser.parse_args()
    rows = run(replace(QWEN, num_layers=arguments.layers), "cuda:0", (1, 8), repeats=200)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish("draws_gpu", {"environment": environment("cuda:0"), "rows": rows}, save=arguments.save)


if __name__ == "__main__":
    main()
