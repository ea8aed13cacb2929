"""Adapters in captured steps on a GPU: whether they are right, and the time that they add to a step.

In words:
- *distance*: logits of the bundled checkpoint's captured steps, teacher-forced, from those of the host-driven path in
  float32 on the CPU, relative to their norm: of rows with an adapter, of masked rows without one, and how far an
  adapter moves them at all.
- *bits*: rows without an adapter beside rows that have one, compared with the same rows in a store without adapters.
- *step*: one decode step of a model of Qwen3-30B-A3B's shape with every expert in a slot, bf16, random weights, KV
  memory 1,024 tokens deep: without masks; masked; in graphs that carry adapters of a rank on every linear layer of
  attention, whole changes of the routers, factors of norms and experts, and maybe one more expert in each layer; of
  which no, one, or every row has one.

Run `python -m benchmarks.gpu.adapters [--save]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.decode import QWEN
from benchmarks.gpu.steps import CONTEXT, full_pages, random_trunk
from benchmarks.gpu.timing import median_ms
from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, environment, finish, table
from expert_store.adapter import Adapter, attach
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.parameters import make_parameters
from server.model.device.running.assembly import load_device_runner
from server.model.device.step.graphs import StepGraph, in_parallel
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions, pow2
from server.model.device.step.weights import DecodeShape, LayerChanges, LowRank, TrunkWeights
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, Runner, RunnerOptions

DEVICE = torch.device("cuda:0")
RANK, SHARED_WIDTH = 16, 64
NUM_STEPS = 6
CONTEXT_ROWS = 8
ADAPTERS: tuple[str | None, ...] = ("first", None, "second", None, "first", "second", None, "first")
"""Of the rows of a batch, all of which are masked to half of the experts."""


def random_adapter(store: Path, seed: int) -> Adapter:
    """An adapter for pools of any size, with every change that one may have, at random."""
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=1, adapters=False)
    model = load_model(Store.open(store), options)
    generator = torch.Generator().manual_seed(seed)
    changes = {
        name: {part: torch.randn(one.shape, generator=generator) * 0.05 for part, one in parts.items()}
        for name, parts in make_parameters(model, RANK, seed, SHARED_WIDTH).items()
    }
    manifest = model.store.manifest
    model.close()
    spec = manifest.model
    return Adapter(manifest.source.fingerprint, spec.num_layers, spec.num_experts, changes, shares=(0.1, 1.0))


def forced(runner: Runner, mask: ExpertMask, adapters: tuple[str | None, ...]) -> Tensor:
    """Logits [steps, B, V] of the same tokens in every runner, in float64."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 4000, (NUM_STEPS, len(ADAPTERS)), generator=generator).tolist()
    rows = [runner.allocate() for _ in adapters]
    for row, adapter in zip(rows, adapters, strict=True):
        runner.prefill(row, [7, 8, 9], mask=mask, adapter=adapter)
    logits = []
    for now in tokens:
        steps = [
            RowStep(row, token, mask=mask, adapter=adapter)
            for row, token, adapter in zip(rows, now, adapters, strict=False)
        ]
        logits.append(runner.decode(steps).logits.double().cpu().clone())
    for row in rows:
        runner.free(row)
    return torch.stack(logits)


def agreement(folder: Path) -> list[dict[str, Any]]:
    """Distances and equality of bits in float32 and bf16."""
    plain = make_store(BUNDLED, folder / "plain")
    adapted = make_store(BUNDLED, folder / "adapted")
    for seed, name in enumerate(("first", "second")):
        attach(adapted, name, random_adapter(adapted, seed))
    with Store.open(plain) as store:
        layers, experts = store.available.shape
    mask = ExpertMask.same_in_every_layer(range(0, experts, 2), layers, experts)
    nobody = (None,) * len(ADAPTERS)
    has = torch.tensor([name is not None for name in ADAPTERS])
    reference = HostRunner(
        load_model(Store.open(adapted), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)),
        max_rows=len(ADAPTERS), max_tokens=64,
    )  # fmt: skip
    wanted, unchanged = forced(reference, mask, ADAPTERS), forced(reference, mask, nobody)
    reference.close()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        found = {}
        for name, path in (("adapted", adapted), ("plain", plain)):
            options = RunnerOptions(device=DEVICE, dtype=dtype, max_rows=len(ADAPTERS), max_tokens=64)
            runner = load_device_runner(Store.open(path), options)
            found[name] = forced(runner, mask, ADAPTERS if name == "adapted" else nobody)
            if name == "adapted":
                found["in adapted graphs, alone"] = forced(runner, mask, (ADAPTERS[0],))
            runner.close()
        got = found["adapted"]
        rows.append({
            "dtype": str(dtype).removeprefix("torch."),
            "with an adapter": _distance(got[:, has], wanted[:, has]),
            "without": _distance(got[:, ~has], unchanged[:, ~has]),
            "moved by the adapter": _distance(unchanged[:, has], wanted[:, has]),
            "bits of rows without": torch.equal(got[:, ~has], found["plain"][:, ~has]),
            "bits of a row alone": torch.equal(got[:, :1], found["in adapted graphs, alone"]),
        })  # fmt: skip
    return rows


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def with_adapters(trunk: TrunkWeights, shape: DecodeShape, width: int) -> TrunkWeights:
    """The trunk with one random adapter of `RANK`, which adds an expert of `width` columns to each layer (0: none), as
    `capture.adapters` packs it."""
    generator = torch.Generator(device=DEVICE).manual_seed(1)

    def matrix(*size: int) -> Tensor:
        values = torch.empty(size, dtype=shape.dtype, device=DEVICE)
        return values.normal_(0.0, 0.02, generator=generator)

    def norm(weight: Tensor) -> Tensor:
        return torch.stack([weight, weight + matrix(*weight.shape)])

    joined, heads = pow2(3 * RANK), shape.num_heads * shape.head_dim
    layers = tuple(
        replace(
            layer,
            input_norm=norm(layer.input_norm),
            post_norm=norm(layer.post_norm),
            q_norm=norm(layer.q_norm),
            k_norm=norm(layer.k_norm),
            changes=LayerChanges(
                qkv=LowRank(matrix(1, joined, shape.hidden), matrix(1, shape.qkv, joined)),
                output=LowRank(matrix(1, RANK, heads), matrix(1, shape.hidden, RANK)),
                expert=LowRank(matrix(1, 2 * width, shape.hidden), matrix(1, shape.hidden, width)) if width else None,
                delta=matrix(1, shape.num_experts, shape.hidden),
                gains=torch.ones(2, shape.num_experts, device=DEVICE),
            ),
        )
        for layer in trunk.layers
    )
    return replace(trunk, layers=layers, norm=norm(trunk.norm))


def cost(shape: DecodeShape) -> list[dict[str, Any]]:
    """Milliseconds of steps of one and of eight rows."""
    trunk, pages, state = random_trunk(shape, DEVICE), full_pages(shape, DEVICE), RowState(shape, DEVICE)
    adapted = {
        name: with_adapters(trunk, shape, width)
        for name, width in (("adapted", 0), (f"adapted, {SHARED_WIDTH} columns more", SHARED_WIDTH))
    }
    steps: dict[tuple[int, str], DecodeStep] = {}
    for batch in (1, CONTEXT_ROWS):
        pdl = batch == 1
        steps[batch, "unmasked"] = DecodeStep(shape, trunk, pages, state, batch, StepOptions(pdl=pdl))
        steps[batch, "masked"] = DecodeStep(shape, trunk, pages, state, batch, StepOptions(pdl=pdl, masked=True))
        options = StepOptions(pdl=pdl, masked=True, adapted=True)
        for name, weights in adapted.items():
            steps[batch, name] = DecodeStep(shape, weights, pages, state, batch, options)
    with in_parallel():
        for step in steps.values():
            step.compile()
    rows = []
    for (batch, kind), step in steps.items():
        graph = StepGraph(step)
        graph.capture()
        for num_adapted in sorted({0, 1, batch}) if kind in adapted else [0]:
            state.lengths.fill_(CONTEXT)
            given = [1] * num_adapted + [0] * (batch - num_adapted)
            tokens = [5 + 37 * at for at in range(batch)]
            milliseconds = median_ms(lambda: graph.enqueue(list(range(batch)), tokens, given))  # noqa: B023
            rows.append({"batch": batch, "graph": kind, "rows with an adapter": num_adapted, "step_ms": milliseconds})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/adapters_gpu.json")
    parser.add_argument("--layers", type=int, default=QWEN.num_layers, help="of the model whose steps are timed")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment("cuda:0"), "rank": RANK, "layers": arguments.layers}
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (
            ("agreement", lambda: agreement(Path(folder))),
            ("cost", lambda: cost(replace(QWEN, num_layers=arguments.layers))),
        ):
            try:
                result[name] = part()
                columns = list(result[name][0])
                print(table(columns, [[row[key] for key in columns] for row in result[name]]), flush=True)
            except Exception as error:
                traceback.print_exc()
                failed[name] = repr(error)[:300]
            torch.cuda.empty_cache()
    finish("adapters_gpu", {**result, "failed": failed}, save=arguments.save)


if __name__ == "__main__":
    main()
