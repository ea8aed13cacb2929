"""Predictions of `deepfew fit` beside what was measured: the table of docs/fit.md, and the recorded popularity.

What is compared, in words:
- *H100*: the steps of `decode_gpu.json`, `decode_gpu_resident.json` and `packed_gpu.json`, predicted from the rates
  that the same runs measured, their shapes, and their hit rates and distinct experts; for the recorded traces also with
  the hit rate that the popularity gives (*by popularity*), which is what `fit` has before it has seen a model's usage.
- *CPU* (`--measure-cpu`): steps of the host-driven path on the generated checkpoint, on one thread, in processor time,
  so that other processes count little; prompts of 256 tokens likewise. Each round measures this machine's rates again,
  beside its steps; figures and rates are medians over the rounds. The result file keeps those of every round.
- *popularity* (`--popularity`): shares of the tokens that choose each expert of the recorded routing, sorted by layer,
  mean over layers and tasks, and the `repeats` with which they give the hit rates of an LRU cache over it best.

    python -m benchmarks.fit [--measure-cpu] [--popularity] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import paging
from benchmarks.gpu.decode import QWEN, TRACED
from benchmarks.gpu.steps import CONTEXT
from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from benchmarks.harness.reporting import REPOSITORY, environment, finish
from expert_store.manifest import LayerSpec, TensorSpec
from expert_store.store import Store
from extractor.encoding.names import ExpertsDtype
from server.fit import demand
from server.fit.facts import ModelFacts
from server.fit.timing import Misses, captured_step, disk_seconds, host_step, prompt_seconds
from server.machine.probe import probe
from server.machine.rates import RATE_NAMES, MachineRates, known_machines
from server.model.decode_path import load_runner
from server.model.device.step.weights import DecodeShape
from server.model.runner import RowStep, RunnerOptions

PAGE = REPOSITORY / "docs" / "fit.md"
BEGIN, END = "<!-- predictions -->", "<!-- end of predictions -->"
RESULTS = REPOSITORY / "benchmarks" / "results"
DTYPES: dict[str, ExpertsDtype] = {
    "bf16": "16bit", "int4 by 64": "int4-g64", "int4 by 32": "int4", "fp8 by 128": "fp8", "mxfp4": "mxfp4",
    "nvfp4": "nvfp4", "int8 by 128": "int8",
}  # fmt: skip
SLOTS = (8, 16, 32, 48)


@dataclass(frozen=True)
class Row:
    """A prediction beside its measurement; `popular_ms` is that by popularity, None where the weights are random."""

    setting: str
    source: str
    measured_ms: float
    predicted_ms: float
    popular_ms: float | None = None

    @property
    def error(self) -> float:
        """Share by which the prediction is over the measurement."""
        return self.predicted_ms / self.measured_ms - 1.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure-cpu", action="store_true", help="measure the host-driven path on this machine")
    parser.add_argument("--work", type=Path, help="where the generated checkpoint and its stores are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--popularity", action="store_true", help="write server/fit/popularity.json")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/fit.json and the table of docs/fit.md"
    )
    arguments = parser.parse_args()
    if arguments.popularity:
        write_popularity()
    result: dict[str, Any] = {"benchmark": "fit", "environment": environment()}
    if arguments.measure_cpu:
        with tempfile.TemporaryDirectory(prefix="deepfew-bench-") as temporary:
            result["cpu"] = measure_cpu(arguments.work or Path(temporary), arguments.rounds)
    elif (RESULTS / "fit.json").is_file():
        result["cpu"] = _read("fit.json")["cpu"]
    rows = [*h100_rows(), *cpu_rows(result.get("cpu", []))]
    text = page_table(rows)
    print(text)
    if arguments.save:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])
    finish("fit", result | {"rows": [asdict(row) for row in rows]}, save=arguments.save)


def page_table(rows: list[Row]) -> str:
    """The table of the page, in Markdown."""
    lines = ["| setting | measured ms | predicted ms | error % | by popularity | from |", "|---|---|---|---|---|---|"]
    for row in rows:
        popular = "" if row.popular_ms is None else f"{row.popular_ms:.3g}"
        lines.append(
            f"| {row.setting} | {row.measured_ms:.3g} | {row.predicted_ms:.3g} | {100 * row.error:+.0f} | {popular} "
            f"| {row.source} |"
        )
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return document


# -- the H100 ----------------------------------------------------------------------------------------------------------


def h100_rows() -> Iterator[Row]:
    """A row for each step of the recorded runs."""
    plain, wide, packed = (_read(f"{name}.json") for name in ("decode_gpu", "decode_gpu_resident", "packed_gpu"))
    qwen, traced = shape_facts(QWEN), shape_facts(TRACED)
    for name, result in (("decode_gpu", plain), ("decode_gpu_resident", wide)):
        for row in result["resident"]:
            if (row["batch"] <= 8) == (result is plain):  # what is beyond was timed again in the second run
                yield _resident(f"16 bit, all in slots, {_rows(row['batch'])}", name, qwen, result, row)
    for row in packed["packed"]:
        if row["experts"] != "bf16":
            model = qwen.encoded(DTYPES[row["experts"]])
            yield _resident(f"{row['experts']}, all in slots, {_rows(row['batch'])}", "packed_gpu", model, packed, row)
    for row in plain["paging_synthetic"]:
        yield _paged("16 bit, " + row["trace"], "decode_gpu", qwen, plain, row)
    for row in packed["paging_packed"]:
        model = qwen.encoded(DTYPES[row["trace"].partition(",")[0]])
        yield _paged(row["trace"], "packed_gpu", model, packed, row)
    for row in plain["paging_recorded"]:
        yield _paged("16 bit, " + row["trace"], "decode_gpu", traced, plain, row)
    yield from _prompts(qwen, plain, packed)
    yield from _from_disk(qwen, packed)
    for row in packed["paging_recorded_packed"]:
        yield _paged("int4 by 64, " + row["trace"], "packed_gpu", traced.encoded("int4-g64"), packed, row)


def h100_rates(result: dict[str, Any]) -> MachineRates:
    """The rates of the machine of a run."""
    machine = result["machine"]
    rates = replace(known_machines()["h100"], read_rate=machine["read_rate"], copy_rate=machine["copy_rate"])
    return replace(rates, expert_rate=rates.read_rate)


def _prompts(qwen: ModelFacts, plain: dict[str, Any], packed: dict[str, Any]) -> Iterator[Row]:
    """2,048 tokens at once, a quarter of the experts in slots."""
    for name, model, result, key in (
        ("decode_gpu", qwen, plain, "prefill"), ("packed_gpu", qwen.encoded("int4-g64"), packed, "prefill_packed")
    ):  # fmt: skip
        row = result[key]
        predicted = prompt_seconds(model, h100_rates(result), model.num_experts // 4, row["tokens"], row["tokens"])
        setting = f"{'16 bit' if model is qwen else 'int4 by 64'}, prompt of {row['tokens']}, 25 % in slots"
        yield Row(setting, name, row["quarter_ms"], 1e3 * predicted)


def _from_disk(qwen: ModelFacts, packed: dict[str, Any]) -> Iterator[Row]:
    """The steps that read experts from the disk: the measured one with all in host memory, and what the reads add."""
    disk = _read("disk_gpu.json")
    rates = replace(h100_rates(packed), disk_rate=disk["rates"]["cold"])
    whole_ms = disk["shares"][0]["cold"]["token_ms"]
    for share in disk["shares"][1:]:
        row = share["cold"]
        added = disk_seconds(row["reads"], qwen.span_bytes, rates, whole_ms / 1e3)
        setting = f"16 bit, 18 layers, {100 * share['share']:g} % in host memory, the rest on a cold disk"
        yield Row(setting, "disk_gpu", row["token_ms"], whole_ms + 1e3 * added)


def _resident(setting: str, source: str, model: ModelFacts, result: dict[str, Any], row: dict[str, Any]) -> Row:
    batch = row["batch"]
    misses = Misses(row["distinct"], batch * model.top_k, 1.0, 0.0)
    step = captured_step(model, h100_rates(result), misses, batch, 8 if batch <= 8 else 32, CONTEXT)
    return Row(setting, source, row["step_ms"], step.total * 1e3)


def _paged(setting: str, source: str, model: ModelFacts, result: dict[str, Any], row: dict[str, Any]) -> Row:
    def predicted(hit_rate: float) -> float:
        misses = Misses(model.top_k, model.top_k, hit_rate, 0.0)
        return 1e3 * captured_step(model, h100_rates(result), misses, 1, 8, CONTEXT).total

    popular = None if "zipf" in row["trace"] else predicted(model.demand.hit_rate(row["slots"]))
    return Row(
        f"{setting}, {100 * row['share']:g} % in slots", source, row["step_ms"], predicted(row["hit_rate"]), popular
    )


def shape_facts(shape: DecodeShape) -> ModelFacts:
    """The facts of a shape of the GPU benchmarks, without a checkpoint."""
    hidden, inner = shape.hidden, shape.intermediate
    up = TensorSpec("gate_up_proj", "BF16", (2 * inner, hidden), 0, 4 * inner * hidden)
    down = TensorSpec("down_proj", "BF16", (hidden, inner), up.bytes, 2 * inner * hidden)
    layers = tuple(
        LayerSpec(at, at, f"layers.{at}.experts", up.bytes + down.bytes, (up, down)) for at in range(shape.num_layers)
    )
    return ModelFacts(
        name="shape", layers=layers, num_layers=shape.num_layers, num_experts=shape.num_experts,
        num_available=shape.num_experts, top_k=shape.top_k, dtype=torch.bfloat16, experts_dtype="16bit", skeleton=None,
        eight_bits={}, trunk_bytes=shape.trunk_bytes, step_bytes=shape.trunk_bytes, kv_bytes=shape.kv_token_bytes,
        max_context=shape.max_tokens, demand=demand.recorded(shape.num_layers, shape.num_experts, shape.top_k),
    )  # fmt: skip


# -- the CPU -----------------------------------------------------------------------------------------------------------


CPU_SETTINGS: tuple[tuple[ExpertsDtype, int, int], ...] = (
    ("16bit", 64, 1), ("16bit", 32, 1), ("16bit", 16, 1), ("16bit", 64, 8), ("16bit", 32, 8), ("fp8", 64, 1),
    ("fp8", 16, 1), ("int4", 64, 1), ("int4", 16, 1), ("int4", 64, 8),
)  # fmt: skip
"""Experts, slots of 64, rows."""
STEPS = 12
PROMPT = 256


def cpu_rows(measured: list[dict[str, Any]]) -> Iterator[Row]:
    """Rows for the steps and the prompts of each setting that `measure_cpu` measured: medians of its rounds, predicted
    from the medians of the rates of all rounds."""
    if not measured:
        return
    probed = [run["rates"] for setting in measured for run in setting["rounds"]]
    medians = {name: statistics.median(rates[name] for rates in probed) for name in RATE_NAMES}
    rates = MachineRates(kind="cpu", name=probed[0]["name"], **medians)
    for setting in measured:
        model, rounds, slots = generated_facts(setting["experts_dtype"]), setting["rounds"], setting["slots"]
        distinct, hit_rate = (statistics.median(run[key] for run in rounds) for key in ("distinct", "hit_rate"))
        misses = Misses(distinct, setting["rows"] * model.top_k, hit_rate, 0.0)
        name = f"CPU, {setting['experts_dtype']}, {slots} of {model.num_experts} in slots"
        step = host_step(model, rates, misses, setting["rows"], PROMPT // 4).total
        step_ms = statistics.median(run["step_ms"] for run in rounds)
        yield Row(f"{name}, {_rows(setting['rows'])}", "fit", step_ms, 1e3 * step)
        if setting["rows"] == 1:
            prompt_ms = statistics.median(run["prompt_ms"] for run in rounds)
            predicted = prompt_seconds(model, rates, slots, PROMPT, PROMPT)
            yield Row(f"{name}, prompt of {PROMPT}", "fit", prompt_ms, 1e3 * predicted)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def generated_facts(experts_dtype: ExpertsDtype) -> ModelFacts:
    """The facts of the generated checkpoint, without the checkpoint."""
    shape = Shape()
    decoded = DecodeShape(
        num_layers=shape.num_layers, hidden=shape.hidden, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, vocab=shape.vocab_size, num_experts=shape.num_experts, top_k=shape.top_k,
        intermediate=shape.intermediate, max_rows=8, max_tokens=4096,
    )  # fmt: skip
    return shape_facts(decoded).encoded(experts_dtype)


def measure_cpu(work: Path, rounds: int) -> list[dict[str, Any]]:
    """Steps of the host-driven path on one thread, in processor time, and rates measured beside them."""
    torch.set_num_threads(1)
    write_checkpoint(work / "checkpoint", Shape())
    found = []
    for experts_dtype, slots, rows in CPU_SETTINGS:
        store = work / f"store-{experts_dtype}"
        if not (store / "manifest.json").is_file():
            make_store(work / "checkpoint", store, experts_dtype=experts_dtype)
        setting: dict[str, Any] = {"experts_dtype": experts_dtype, "slots": slots, "rows": rows}
        setting["rounds"] = list(_rounds(store, slots, rows, rounds))
        found.append(setting)
        print(json.dumps(setting["rounds"][-1]), file=sys.stderr)
    return found


def _rounds(path: Path, slots: int, num_rows: int, rounds: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    options = RunnerOptions(
        torch.device("cpu"), torch.bfloat16, path="host", max_rows=num_rows + 1, max_tokens=1024, num_slots=slots
    )
    runner = load_runner(Store.open(path), options)
    rows = [runner.allocate() for _ in range(num_rows)]
    for row in rows:
        runner.prefill(row, random.integers(0, Shape().vocab_size, 64).tolist())
    for _ in range(rounds):
        prompt = random.integers(0, Shape().vocab_size, PROMPT).tolist()
        began, row = time.process_time(), runner.allocate()
        runner.prefill(row, prompt)
        prompt_seconds = time.process_time() - began
        runner.free(row)
        before, began = runner.model.cache.statistics(), time.process_time()
        for _ in range(STEPS):
            runner.decode([RowStep(row, int(random.integers(0, Shape().vocab_size))) for row in rows])
        seconds, after = (time.process_time() - began) / STEPS, runner.model.cache.statistics()
        hits, misses = int((after.hits - before.hits).sum()), int((after.misses - before.misses).sum())
        yield {
            "step_ms": 1e3 * seconds,
            "hit_rate": hits / (hits + misses),
            "prompt_ms": 1e3 * prompt_seconds,
            "distinct": (hits + misses) / STEPS / Shape().num_layers,
            "rates": asdict(probe(torch.device("cpu"), [], time.process_time)),
        }
    runner.model.close()


# -- popularity --------------------------------------------------------------------------------------------------------


def write_popularity() -> None:
    """Measure the popularity on the recorded routing and write the package's file."""
    traces = {task: paging.recorded(task) for task in ("intent", "summary")}
    profile = np.mean([np.sort(shares(trace), axis=1)[:, ::-1].mean(axis=0) for trace in traces.values()], axis=0)
    record = {
        "source": "routing of DeepSeek-V2-Lite on two tasks (640 tokens each), by rank",
        "made_by": "python -m benchmarks.fit --popularity, from benchmarks/data/routing-deepseek-v2-lite.npz",
        "repeats": 0.0,
        "popularity": [round(float(share), 5) for share in profile],
    }
    path = REPOSITORY / "server" / "fit" / "popularity.json"
    measured = {(task, num): lru_hit_rate(trace, num) for task, trace in traces.items() for num in SLOTS}
    own = {task: demand.Demand(shares(trace), 0.0, task) for task, trace in traces.items()}
    lacks = [1.0 - own[task].hit_rate(num) for task, num in measured]
    gains = [hits - own[task].hit_rate(num) for (task, num), hits in measured.items()]
    record["repeats"] = round(float(np.dot(lacks, gains) / np.dot(lacks, lacks)), 3)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path}: repeats {record['repeats']}")


def shares(trace: paging.Trace) -> demand.Shares:
    """[L, E], shares of the tokens that choose each expert."""
    num = int(trace.max()) + 1
    return np.stack([np.bincount(trace[:, layer].ravel(), minlength=num) for layer in range(trace.shape[1])]) / len(
        trace
    )


def lru_hit_rate(trace: paging.Trace, num_slots: int, first: int = 80) -> float:
    """Hit rate from token `first` on of an LRU cache of so many slots in each layer."""
    hits = wanted = 0
    for layer in range(trace.shape[1]):
        slots: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        for at, row in enumerate(trace[:, layer]):
            experts = [int(expert) for expert in row]
            if at >= first:
                wanted += len(experts)
                hits += sum(expert in slots for expert in experts)
            for expert in experts:
                slots.pop(expert, None)
            slots.update(dict.fromkeys(experts))
            while len(slots) > num_slots:
                slots.popitem(last=False)
    return hits / wanted


if __name__ == "__main__":
    main()
