"""Adapters: how much of the loss under masks they repair, on held-out text and questions.

What is measured, in words:
- *ratio*: perplexity under a mask ÷ perplexity of the whole, unadapted checkpoint on the same held-out tokens,
  geometric mean over the kinds of text (*worst*: the kind that loses most). Even documents of every file train and
  choose experts, odd ones are measured, packed into 512 tokens.
- *none*: every kind masked to its most wanted experts, without an adapter.
- *pools*: the same masks, with one adapter that was trained for pools of 12.5 to 100 %.
- *plan*: the same masks, with an adapter for each of them, trained on the text of its kind.
- *together*: one mask of a quarter for all kinds, without and with an adapter for it.
- *curve*: while it trains, tokens, seconds, loss (KL divergence, nats a token, mean since the point before) and the
  same ratios.
- *questions*: share answered exactly, greedily, in float32 on the CPU, under the mask of the kind of the same name;
  `whole`: all experts.

The whole model first writes `--generated` tokens, which all trainings read beside the even documents. Every job runs in
one of `--processes` processes; `OUT/NAME.jsonl` gets a line at each point of a curve and at the end of each job, so a
run that is cut loses nothing: the last line of a job holds.

    python -m benchmarks.adapt [--checkpoint DIR] [--texts PATH...] [--questions FILE...] [--device cuda]
                               [--parts PART... [--seeds N] | --jobs FILE] [--processes N] [--out OUT] [--name NAME]
                               [--save NAME]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from expert_store.adapter import Adapter
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.corpus import Corpus
from server.adapting.measuring import evaluate_kinds
from server.adapting.parameters import make_parameters
from server.adapting.run import AdaptRequest, make_corpus
from server.adapting.target import Target, most_wanted
from server.adapting.training import TRAINED, Trained, Training, TrainingOptions
from server.masks.masking import FixedMasking
from server.model.host.assembly import HostModel, load_model, resolve_device
from server.model.host.runner import HostRunner
from server.model.runner import RunnerOptions
from server.model.seam.batched import batched_experts
from server.quality.batches import token_sequences
from server.quality.questions import read_questions, share_answered
from server.quality.text_loss import geometric_mean
from server.quality.texts import TextOptions, find_domains

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
SHARES = (0.5, 0.25, 0.125)
TOGETHER = 0.25
PARTS = ("none", "pools", "plan", "together")
TIMED_STEPS = (60, 100)
"""Steps between which a training that has `seconds` measures its speed."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training and its measurements.

    Attributes:
        kind, share: of a plan.
        tokens: to train on; with `seconds`, as many as fit into that time instead.
        generated: whether it reads the text that the model wrote.
        late, skew: see `Target`.
        questions: whether they are asked.
        keep: whether the adapter is written to the file `name`.safetensors in `--out`.
    """

    name: str
    part: str
    kind: str | None = None
    share: float | None = None
    seed: int = 0
    tokens: int = 6_000_000
    seconds: float | None = None
    batch_tokens: int = 16384
    rate: float = 3e-3
    rank: int = 32
    shared_width: int = 64
    late: float = Target.late
    skew: float = Target.skew
    generated: bool = True
    points: int = 8
    questions: bool = False
    keep: bool = False

    @property
    def plan(self) -> tuple[float, str]:
        """Share and kind of the part `plan`."""
        if self.share is None or self.kind is None:
            raise ValueError(f"job {self.name}: a plan has a share and a kind, got {self.share} and {self.kind}")
        return self.share, self.kind


class Bench:
    """A model, its texts, and the losses of the whole model on the held-out ones."""

    def __init__(self, store: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self.arguments, self.store = arguments, store
        device = torch.device(resolve_device(arguments.device))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        options = RunnerOptions(device=device, dtype=dtype, batch_invariant=False)
        self.model = load_model(Store.open(store), options)
        stack.callback(self.model.close)
        self.batched = device.type == "cuda" and stack.enter_context(
            batched_experts(self.model.model, self.model.cache)
        )
        self.domains = find_domains(arguments.texts)
        odd = TextOptions(512, arguments.held_out_tokens, "odd")
        self.held_out = {domain.name: token_sequences(self.model, domain, odd) for domain in self.domains}
        self.unmasked = evaluate_kinds(self.model, self.held_out, None, None)
        self.given, self.corpus = self._corpus(0), self._corpus(arguments.generated)

    def _corpus(self, generated: int) -> Corpus:
        """The even documents, and the text that the model wrote once for all processes."""
        text = TextOptions(self.arguments.context, 1 << 20, "even")
        training = TrainingOptions(1, seed=self.arguments.text_seed)
        request = AdaptRequest(self.domains, text, Target(shares=(0.125, 1.0)), training, 0, generated)
        return make_corpus(self.model, request, self.store.parent, lambda doing, done, total: None)

    def masks(self, share: float) -> dict[str, ExpertMask]:
        """Every kind's most wanted experts."""
        return {kind: most_wanted(self.corpus.demand[kind], share) for kind in self.held_out}

    def together(self) -> ExpertMask:
        """The experts that all kinds together want most."""
        everything = sum(demand / demand.sum() for demand in self.corpus.demand.values())
        return most_wanted(np.asarray(everything), TOGETHER)

    def ratios(self, masks: Mapping[str, ExpertMask], adapter: str | None) -> dict[str, float]:
        """Perplexity of each kind's held-out text under its mask ÷ that of the whole model."""
        losses = evaluate_kinds(self.model, {kind: self.held_out[kind] for kind in masks}, masks, adapter)
        return {kind: round(math.exp(loss - self.unmasked[kind]), 4) for kind, loss in losses.items()}

    def cases(self, job: Job) -> dict[float, dict[str, ExpertMask]]:
        """Share → the mask of each kind that the job measures."""
        if job.part == "together":
            return {TOGETHER: dict.fromkeys(self.held_out, self.together())}
        if job.part == "plan":
            return {share: {kind: self.masks(share)[kind]} for share, kind in [job.plan]}
        return {share: self.masks(share) for share in SHARES}

    @cached_property
    def on_cpu(self) -> HostModel:
        """The model in float32 on the CPU, which answers questions."""
        options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)
        return load_model(Store.open(self.store), options)

    def answered(self, masks: Mapping[str, ExpertMask], adapter: Adapter | None) -> dict[str, float]:
        """Share of the questions of each kind that are answered under its mask."""
        model, found = self.on_cpu, {}
        if adapter is not None:
            model.routing.install_adapters(model.model, adapter.changes)
            model.routing.adapters.add("measured", adapter.changes, model.device, model.dtype)
        runner = HostRunner(model, max_rows=16, max_tokens=512)
        for path in self.arguments.questions:
            asked = read_questions(path)
            if asked.name not in masks:
                continue
            mask = masks[asked.name]
            masking = None if mask.is_full else (lambda num_prompt_tokens, mask=mask: FixedMasking(mask))
            name = None if adapter is None else "measured"
            accuracy = share_answered(runner, asked.questions, masking, self.arguments.prefix, name)
            found[asked.name] = round(accuracy, 4)
        return found


_bench: Bench
_stack = ExitStack()


def _open(store: Path, arguments: argparse.Namespace) -> None:
    """Make the process's own bench."""
    global _bench
    torch.set_num_threads(arguments.threads)
    _bench = Bench(store, arguments, _stack)


def run_job(job: Job) -> Row:
    """Train and measure; errors are part of the result, so that one job does not end the others."""
    result: Row = {**asdict(job), "curve": [], "cases": []}
    try:
        _measure(_bench, job, result)
    except Exception:
        result["error"] = traceback.format_exc()
    _note(_bench, result)
    gc.collect()  # a training and its graphs refer to one another, and keep their memory until then
    if _bench.model.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _measure(bench: Bench, job: Job, result: Row) -> None:
    cases = bench.cases(job)
    result["cases"] += [_case("none", share, bench.ratios(masks, None)) for share, masks in cases.items()]
    adapter: Adapter | None = None
    if job.part != "none":
        adapter = _train(bench, job, result)
        result["cases"] += [_case(job.part, share, bench.ratios(masks, TRAINED)) for share, masks in cases.items()]
        if job.keep:
            adapter.write(bench.arguments.out / f"{job.name}.safetensors")
    _note(bench, result)
    if job.questions:
        if job.part == "none":
            full = dict.fromkeys(bench.held_out, most_wanted(next(iter(bench.corpus.demand.values())), 1.0))
            cases = {1.0: full, **cases}
        result["questions"] = {str(share): bench.answered(masks, adapter) for share, masks in cases.items()}


def _train(bench: Bench, job: Job, result: Row) -> Adapter:
    corpus = bench.corpus if job.generated else bench.given
    if job.kind is not None:
        train = [(name, tokens) for name, tokens in corpus.train if name == job.kind]
        corpus = replace(corpus, train=train, held_out={job.kind: corpus.held_out[job.kind]})
    target = Target(shares=(0.125, 1.0), late=job.late, skew=job.skew)
    if job.part != "pools":
        (masks,) = bench.cases(job).values()
        target = Target(mask=next(iter(masks.values())))
    parameters = make_parameters(bench.model, job.rank, job.seed, job.shared_width)
    options = TrainingOptions(job.tokens, job.batch_tokens, job.rate, job.seed, measures=job.points)
    training = Training(bench.model, target, corpus, parameters, options, {}, graph=bench.batched)
    result["num_parameters"] = sum(one.numel() for parts in parameters.values() for one in parts.values())
    result["text_tokens"] = len({id(tokens) for _, tokens in corpus.train}) * len(corpus.train[0][1])
    if job.seconds is not None:
        _fit(training, job.seconds)
    step_tokens = training.step_tokens

    def note(done: Trained) -> None:
        if len(done.losses) == len(result["curve"]):
            return
        found = {share: bench.ratios(masks, TRAINED) for share, masks in bench.cases(job).items()}
        means = {str(share): round(geometric_mean(list(ratios.values())), 4) for share, ratios in found.items()}
        step, loss = done.losses[-1]
        tokens, seconds = step * step_tokens, round(done.seconds, 1)
        result["curve"].append({"tokens": tokens, "seconds": seconds, "loss": loss, "ratios": means})
        _note(bench, result)

    training.run(None, note)
    spec = bench.model.store.manifest.model
    fingerprint, shares = bench.model.store.manifest.source.fingerprint, target.shares
    mask = None if target.mask is None else target.mask.allowed
    return Adapter(fingerprint, spec.num_layers, spec.num_experts, training.changes, mask, shares)


def _fit(training: Training, seconds: float) -> None:
    """Give the training as many steps as fit into this time."""
    first, last = TIMED_STEPS
    training.run(None, last=first)
    started = time.monotonic()
    training.run(None, last=last)
    a_step = (time.monotonic() - started) / (last - first)
    steps = last + int(seconds / a_step)
    training.num_steps = steps + -steps % training.options.measures


def _case(part: str, share: float, ratios: Mapping[str, float]) -> Row:
    worst = max(ratios, key=lambda kind: ratios[kind])
    mean = round(geometric_mean(list(ratios.values())), 4)
    return {"part": part, "share": share, "mean_ratio": mean, "worst": [worst, ratios[worst]], "ratios": dict(ratios)}


def _note(bench: Bench, result: Row) -> None:
    """Add a line to the file of results, in one write."""
    line = (json.dumps(result) + "\n").encode()
    descriptor = os.open(bench.arguments.out / f"{bench.arguments.name}.jsonl", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The jobs of the file, else those of the parts."""
    if arguments.jobs is not None:
        return [Job(**one) for one in json.loads(arguments.jobs.read_text())]
    own = {name: getattr(arguments, name) for name in ("tokens", "batch_tokens", "rate", "rank", "shared_width")}
    jobs = []
    if "none" in arguments.parts:
        jobs.append(Job("none", "none", questions=True))
    for seed in range(arguments.seeds):
        for part in ("pools", "together"):
            if part in arguments.parts:
                jobs.append(Job(f"{part}-{seed}", part, seed=seed, questions=seed == 0, **own))
        for domain in find_domains(arguments.texts) if "plan" in arguments.parts else ():
            for share in SHARES:
                name = f"plan-{domain.name}-{share:g}-{seed}"
                jobs.append(Job(name, "plan", domain.name, share, seed, questions=seed == 0, **own))
    return jobs


def summary(results: Sequence[Row]) -> list[tuple[str, float, float, str, float]]:
    """Rows of the table: every part and share, plans of all kinds together."""
    rows = []
    for result in results:
        if result["part"] != "plan":
            rows += [(result["name"], *_figures(case)) for case in result["cases"] if case["part"] == result["part"]]
    for share in SHARES:
        plans = [result for result in results if result["part"] == "plan" and result["share"] == share]
        ratios = {plan["name"]: ratio for plan in plans for ratio in plan["cases"][-1]["ratios"].values()}
        if ratios:
            rows.append((f"{len(ratios)} plans", *_figures(_case("plan", share, ratios))))
    return rows


def _figures(case: Row) -> tuple[float, float, str, float]:
    return (case["share"], case["mean_ratio"], *case["worst"])


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deepfew-adapt-") as folder:
        store = make_store(arguments.checkpoint, Path(folder) / "store")
        jobs = jobs_of(arguments)
        with ExitStack() as stack:  # writes the text, which the processes read
            bench = Bench(store, arguments, stack)
            num_held_out = sum(len(tokens) for part in bench.held_out.values() for tokens in part)
            del bench
        if arguments.device != "cpu":
            torch.cuda.empty_cache()
        print(f"text is written after {time.monotonic() - started:.0f} s", flush=True)
        results = []
        with ProcessPoolExecutor(arguments.processes, get_context("spawn"), _open, (store, arguments)) as pool:
            for future in as_completed([pool.submit(run_job, job) for job in jobs]):
                results.append(future.result())
                print(results[-1]["name"], results[-1].get("error", ""), results[-1]["cases"][-1:], flush=True)
    print(table(("job", "share", "mean ratio", "worst kind", "its ratio"), summary(results)))
    result = {
        "environment": environment(arguments.device),
        "checkpoint": arguments.checkpoint.name,
        "num_held_out_tokens": num_held_out,
        "generated_tokens": arguments.generated,
        "results": sorted(results, key=lambda one: str(one["name"])),
    }
    finish(arguments.save or "adapt", result, save=arguments.save is not None)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in DATA.glob("*.txt")))
    parser.add_argument("--questions", nargs="+", type=Path, default=sorted(DATA.glob("questions/*.jsonl")))
    parser.add_argument("--prefix", default="<|endoftext|>", help="text before every question")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--jobs", type=Path, help="JSON: a list of objects with the fields of Job")
    parser.add_argument("--tokens", type=int, default=Job.tokens, help="tokens of each training")
    parser.add_argument("--batch-tokens", type=int, default=Job.batch_tokens)
    parser.add_argument("--rate", type=float, default=Job.rate)
    parser.add_argument("--rank", type=int, default=Job.rank)
    parser.add_argument("--shared-width", type=int, default=Job.shared_width)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens of a training sequence")
    parser.add_argument("--generated", type=int, default=8_000_000, help="tokens that the model writes")
    parser.add_argument("--text-seed", type=int, default=0)
    parser.add_argument("--held-out-tokens", type=int, default=4096, help="of a kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("work-tmp"), help="folder of results as they come")
    parser.add_argument("--name", default="adapt", help="of the file in it")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
