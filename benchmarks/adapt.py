"""Adapters: how much of the loss under masks they repair, on held-out text and questions, and what else costs as much.

What is measured, in words:
- *ratio*: perplexity under a mask ÷ perplexity of the whole, unadapted checkpoint on the same held-out tokens,
  geometric mean over the kinds of text (*worst*: the kind that loses most). Even documents of every file train and
  choose experts, odd ones are measured, packed into sequences.
- *pools*: every kind masked to its own best experts at each of three sizes; one adapter for pools of 12.5 to 100 %.
- *plan*: one kind masked to its best experts, at one size; an adapter for this mask, trained on text of the kind.
- *together*: one mask for all kinds, and an adapter for it.
- *none*: the same masks without an adapter, beside every other figure, and alone where nothing is trained.
- *choice*: the experts that a mask keeps: the most wanted ones (gate mass, as adapters are trained for), or the best by
  a criterion of `deepfew plan`, such as `reap`, from the first 4,096 tokens of every kind.
- *encoding*: all experts in 4 bits, say; *bytes*: those of the kept experts ÷ those of all experts in 16 bits, without
  the padding of rows, which is large in narrow matrices.
- *experts*: the plan's experts are trained too, as by `deepfew adapt --experts`.
- *curve*: while it trains, tokens, seconds, loss (KL divergence, nats a token, mean since the point before) and the
  same ratios.
- *questions*: share answered exactly, greedily, in float32 on the CPU, under the mask of the kind of the same name; at
  share 1: by the whole model.

A file of jobs says what is run, the most valuable first; `benchmarks/data/adapt/` has those of the published figures.
The whole model first writes the text that all trainings read beside the even documents, once, into `--work`. Every
result is added to the run of its name and checkpoint in `--results` as it comes, also each point of a curve. So a run
that was cut loses little, and the same command continues with the jobs that are not complete there.

    python -m benchmarks.adapt [--jobs FILE] [--checkpoint DIR...] [--texts PATH...] [--questions FILE...]
                               [--device cuda] [--processes N] [--work DIR] [--results FILE]
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import json
import math
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.choosing.encodings import SIXTEEN, bits_of
from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, RESULTS, environment, table
from expert_store.adapter import Adapter, Changes
from expert_store.files import replacing
from expert_store.store import Store
from extractor.planning.criteria import score
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.adapting.corpus import DEMAND_TOKENS, Corpus
from server.adapting.measuring import evaluate_kinds
from server.adapting.parameters import expert_parameters, make_parameters
from server.adapting.run import AdaptRequest, make_corpus
from server.adapting.target import Target, most_wanted
from server.adapting.training import TRAINED, Trained, Training, TrainingOptions
from server.masks.masking import FixedMasking
from server.model.host.assembly import HostModel, load_model, resolve_device
from server.model.host.runner import HostRunner
from server.model.runner import RunnerOptions
from server.model.seam.batched import batched_experts
from server.model.seam.changed import Kept, changed_experts
from server.quality.batches import Tokens, token_sequences
from server.quality.calibration import CalibrationOptions, calibrate
from server.quality.questions import read_questions, share_answered
from server.quality.text_loss import geometric_mean
from server.quality.texts import TextOptions, find_domains

DATA = REPOSITORY / "benchmarks" / "data"
SHARES = (0.5, 0.25, 0.125)
POOLS = (0.125, 1.0)
DEMAND = "gate-mass"
Masks = Mapping[str, ExpertMask]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training with its measurements, or measurements alone.

    Attributes:
        name: of its result.
        checkpoint: name of its directory.
        part: the masks: pools, plan or together.
        kind, share: of a plan; together has a share.
        choice, encoding: see above; None: the experts as they are.
        tokens: to train on; 0 trains nothing.
        experts: whether the experts of the mask are trained too.
        generated: whether the training reads the text that the model wrote.
        late, skew: see `Target`.
        points: of the curve.
        asks: whether questions are asked.
        keep: whether the adapter is written to the file `checkpoint`-`name`.safetensors in `--work`.
    """

    name: str
    checkpoint: str
    part: str
    kind: str | None = None
    share: float | None = None
    choice: str = DEMAND
    encoding: str | None = None
    seed: int = 0
    tokens: int = 6_000_000
    batch_tokens: int = 16384
    rate: float = 3e-3
    rank: int = 32
    shared_width: int = 64
    experts: bool = False
    late: float = Target.late
    skew: float = Target.skew
    generated: bool = True
    points: int = 8
    asks: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        wanted = {"pools": (False, False), "plan": (True, True), "together": (False, True)}.get(self.part)
        if wanted != (self.kind is not None, self.share is not None):
            raise ValueError(
                f"job {self.name}: a plan has a kind and a share, together a share, pools neither; got part "
                f"{self.part}, kind {self.kind}, share {self.share}"
            )
        if self.encoding is not None and (self.tokens or self.asks):
            raise ValueError(f"job {self.name}: encoded experts are measured on text alone: set tokens 0, no questions")
        if self.experts and self.part == "pools":
            raise ValueError(f"job {self.name}: experts are trained for one mask: set part plan or together")


@dataclass(frozen=True)
class Run:
    """A file of jobs.

    Attributes:
        name: of the run in the results.
        generated_tokens: tokens that the model writes.
        held_out_tokens: of a kind that are measured.
        context: tokens of a sequence.
        prefix: text before every question.
        note: for who reads the results.
    """

    name: str
    jobs: tuple[Job, ...]
    generated_tokens: int = 0
    held_out_tokens: int = 4096
    context: int = 512
    prefix: str = "<|endoftext|>"
    note: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        """The run in a file: its fields, with `jobs` as a list of objects with the fields of `Job`.

        A field with a list of values stands for a job with each of them, whose name ends with the value (but for the
        checkpoint, which has results of its own).
        """
        about = json.loads(path.read_text())
        jobs = []
        for one in about.pop("jobs"):
            several = {field: values for field, values in one.items() if isinstance(values, list)}
            for values in product(*several.values()):
                own = dict(zip(several, values, strict=True))
                name = "-".join([one["name"], *(str(value) for field, value in own.items() if field != "checkpoint")])
                jobs.append(Job(**one | own | {"name": name}))
        return cls(**about, jobs=tuple(jobs))


class Results:
    """A file of runs, which several processes may add to: every change is made under a lock, and replaces the file."""

    def __init__(self, path: Path, run: Run, environment: Row) -> None:
        self._path, self._run, self._environment = path, run, environment

    def complete(self, job: Job) -> bool:
        """Whether the job has a result that lacks nothing."""
        rows = [row for run in self._runs() if self._is_own(run, job.checkpoint) for row in run["results"]]
        return any(row.get("complete") and row | asdict(job) == row for row in rows)

    def note(self, row: Row, num_held_out_tokens: int) -> None:
        """Add a job's result, in place of the one that it had."""
        with self._locked():
            runs = self._runs()
            own = [run for run in runs if self._is_own(run, row["checkpoint"])]
            for run in own:
                run["results"] = [one for one in run["results"] if one["name"] != row["name"]]
            fitting = [run for run in own if run["environment"] == self._environment]
            about = {
                "name": self._run.name,
                "environment": self._environment,
                "checkpoint": row["checkpoint"],
                "num_held_out_tokens": num_held_out_tokens,
                "generated_tokens": self._run.generated_tokens,
                "prefix": self._run.prefix,
                "note": self._run.note,
            }
            run = fitting[0] if fitting else {**about, "results": []}
            run["results"] = sorted([*run["results"], row], key=lambda one: str(one["name"]))
            runs = [one for one in runs if one["results"] and one is not run] + [run]
            with replacing(self._path) as file:
                file.write((json.dumps({"runs": runs}, indent=1) + "\n").encode())

    def _runs(self) -> list[Row]:
        return list(json.loads(self._path.read_text())["runs"]) if self._path.exists() else []

    def _is_own(self, run: Row, checkpoint: str) -> bool:
        return bool(run["name"] == self._run.name and run["checkpoint"] == checkpoint)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Bench:
    """A model, its texts, and the losses of the whole model on the held-out ones."""

    def __init__(self, checkpoint: Path, run: Run, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self._checkpoint, self._run, self._arguments, self._stack = checkpoint, run, arguments, stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepfew-adapt-")))
        device = torch.device(resolve_device(arguments.device))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._options = RunnerOptions(device=device, dtype=dtype, batch_invariant=False)
        self._encoded: dict[str, HostModel] = {}
        self.model = self._load(None, self._options)
        self.batched = device.type == "cuda" and stack.enter_context(
            batched_experts(self.model.model, self.model.cache)
        )
        self._domains = find_domains(arguments.texts)

    def _load(self, encoding: Any, options: RunnerOptions) -> HostModel:
        store = self._folder / (encoding or SIXTEEN)
        if not store.exists():
            make_store(self._checkpoint, store, experts_dtype=encoding)
        model = load_model(Store.open(store), options)
        self._stack.callback(model.close)
        return model

    def encoded(self, encoding: str) -> HostModel:
        """The model with all experts in an encoding."""
        if encoding not in self._encoded:
            self._encoded[encoding] = self._load(encoding, self._options)
        return self._encoded[encoding]

    @cached_property
    def on_cpu(self) -> HostModel:
        """The model in float32 on the CPU, which answers questions and calibrates."""
        return self._load(None, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))

    @cached_property
    def held_out(self) -> Mapping[str, Sequence[Tokens]]:
        """Sequences of each kind that are measured."""
        odd = TextOptions(self._run.context, self._run.held_out_tokens, "odd")
        return {domain.name: token_sequences(self.model, domain, odd) for domain in self._domains}

    @property
    def num_held_out_tokens(self) -> int:
        """Of all kinds."""
        return sum(len(tokens) for part in self.held_out.values() for tokens in part)

    @cached_property
    def unmasked(self) -> Mapping[str, float]:
        """Loss of the whole model on each kind, nats a token."""
        return evaluate_kinds(self.model, self.held_out, None, None)

    @cached_property
    def given(self) -> Corpus:
        """The even documents."""
        return self._corpus(0)

    @cached_property
    def corpus(self) -> Corpus:
        """The even documents, and the text that the model wrote once for all processes."""
        return self._corpus(self._run.generated_tokens) if self._run.generated_tokens else self.given

    def _corpus(self, generated: int) -> Corpus:
        text = TextOptions(self._run.context, 1 << 20, "even")
        request = AdaptRequest(self._domains, text, Target(shares=POOLS), TrainingOptions(1), 0, generated)
        folder = self._arguments.work / f"{self._checkpoint.name}-{generated}-{self.model.device.type}"
        folder.mkdir(parents=True, exist_ok=True)
        return make_corpus(self.model, request, folder, lambda doing, done, total: None)

    @cached_property
    def statistics(self) -> ExpertStatistics:
        """Of the even documents' beginnings, for criteria."""
        text = TextOptions(self._run.context, DEMAND_TOKENS, "even")
        return calibrate(self.on_cpu, self._domains, CalibrationOptions(text, price_tokens=0, with_weights=False))

    def _best(self, choice: str, kinds: Sequence[str], share: float) -> ExpertMask:
        """The share of every layer's experts that is best for some kinds of text together."""
        if choice == DEMAND:
            demands = [self.given.demand[kind] for kind in kinds]
            scores: npt.NDArray[np.float64] = np.sum([demand / demand.sum() for demand in demands], axis=0)
        else:
            scores = score(self.statistics, choice, kinds)
        return most_wanted(scores, share)

    def cases(self, job: Job) -> dict[float, Masks]:
        """Share → the mask of each kind that the job measures."""
        if job.part == "together":
            assert job.share is not None
            return {job.share: dict.fromkeys(self.held_out, self._best(job.choice, list(self.held_out), job.share))}
        if job.part == "plan":
            assert job.share is not None
            assert job.kind is not None
            return {job.share: {job.kind: self._best(job.choice, [job.kind], job.share)}}
        shares = SHARES if job.encoding is None else (1.0, *SHARES)
        return {share: {kind: self._best(job.choice, [kind], share) for kind in self.held_out} for share in shares}

    def ratios(self, masks: Masks, adapter: str | None, encoding: str | None = None) -> dict[str, float]:
        """Perplexity of each kind's held-out text under its mask ÷ that of the whole model."""
        model = self.model if encoding is None else self.encoded(encoding)
        losses = evaluate_kinds(model, {kind: self.held_out[kind] for kind in masks}, masks, adapter)
        return {kind: round(math.exp(loss - self.unmasked[kind]), 4) for kind, loss in losses.items()}

    def answered(self, masks: Masks, adapter: str | None) -> dict[str, float]:
        """Share of the questions of each kind that are answered under its mask."""
        runner, found = HostRunner(self.on_cpu, max_rows=16, max_tokens=512), {}
        for path in self._arguments.questions:
            asked = read_questions(path)
            if asked.name in masks:
                mask = masks[asked.name]
                masking = None if mask.is_full else (lambda num_prompt_tokens, mask=mask: FixedMasking(mask))
                accuracy = share_answered(runner, asked.questions, masking, self._run.prefix, adapter)
                found[asked.name] = round(accuracy, 4)
        return found


class Work:
    """The jobs of one process: benches by checkpoint, and the results that all processes write."""

    def __init__(self, run: Run, arguments: argparse.Namespace, environment: Row) -> None:
        self._run, self._arguments = run, arguments
        self.results = Results(arguments.results, run, environment)
        self._benches: dict[str, Bench] = {}
        self._stack = ExitStack()

    def bench(self, checkpoint: str) -> Bench:
        """The bench of the checkpoint, made when it is first asked for."""
        if checkpoint not in self._benches:
            (path,) = (path for path in self._arguments.checkpoint if path.name == checkpoint)
            self._benches[checkpoint] = Bench(path, self._run, self._arguments, self._stack)
        return self._benches[checkpoint]

    def close(self) -> None:
        """Free the models."""
        self._benches.clear()
        self._stack.close()

    def do(self, job: Job) -> Row:
        """Train and measure; an error is part of the result, so that one job does not end the others."""
        row: Row = {**asdict(job), "complete": False, "curve": [], "cases": []}
        bench = self.bench(job.checkpoint)
        try:
            self._measure(bench, job, row)
            row["complete"] = True
        except Exception:
            row["error"] = traceback.format_exc()
        self.results.note(row, bench.num_held_out_tokens)
        gc.collect()  # a training and its graphs refer to one another, and keep their memory until then
        if bench.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def _measure(self, bench: Bench, job: Job, row: Row) -> None:
        cases = bench.cases(job)
        bits = bits_of(job.encoding or SIXTEEN)
        for share, masks in cases.items():
            without = bench.ratios(masks, None, job.encoding)
            row["cases"].append({**_case("none", share, without), "bytes": round(share * bits / 16, 4)})
            self.results.note(row, bench.num_held_out_tokens)
        if job.tokens:
            self._train(bench, job, cases, row)
        elif job.asks:
            whole = {kind: most_wanted(bench.given.demand[kind], 1.0) for kind in next(iter(cases.values()))}
            row["questions"] = {
                str(share): bench.answered(masks, None) for share, masks in {1.0: whole, **cases}.items()
            }

    def _train(self, bench: Bench, job: Job, cases: Mapping[float, Masks], row: Row) -> None:
        """Train the job's adapter, measure with it, and ask."""
        mask = None if job.part == "pools" else next(iter(next(iter(cases.values())).values()))
        target = Target(mask=mask, shares=POOLS if mask is None else None, late=job.late, skew=job.skew)
        kept: Kept = (target.kept or []) if job.experts else []
        parameters = make_parameters(bench.model, job.rank, job.seed, job.shared_width)
        experts = expert_parameters(bench.model, kept, job.rank, job.seed) if job.experts else {}
        with changed_experts(bench.model, kept, experts):
            training = self._training(bench, job, target, parameters | experts)
            row["num_parameters"] = sum(one.numel() for parts in training.parameters.values() for one in parts.values())
            row["text_tokens"] = len({id(tokens) for _, tokens in training.corpus.train}) * self._run.context

            def note(done: Trained) -> None:
                if len(done.losses) == len(row["curve"]):
                    return
                found = {share: bench.ratios(masks, TRAINED) for share, masks in cases.items()}
                means = {str(share): round(geometric_mean(list(ratios.values())), 4) for share, ratios in found.items()}
                step, loss = done.losses[-1]
                tokens, seconds = step * training.step_tokens, round(done.seconds, 1)
                row["curve"].append({"tokens": tokens, "seconds": seconds, "loss": loss, "ratios": means})
                self.results.note(row, bench.num_held_out_tokens)

            training.run(None, note)
            for share, masks in cases.items():
                row["cases"].append(_case(job.part, share, bench.ratios(masks, TRAINED)))
        changes = training.changes
        trunk = {name: parts for name, parts in changes.items() if name in parameters}
        if job.keep:
            self._adapter(bench, target, trunk).write(self._arguments.work / f"{job.checkpoint}-{job.name}.safetensors")
        self.results.note(row, bench.num_held_out_tokens)
        if job.asks:
            model = bench.on_cpu
            model.routing.install_adapters(model.model, trunk)
            model.routing.adapters.add(TRAINED, trunk, model.device, model.dtype)
            with changed_experts(model, kept, changes):
                row["questions"] = {str(share): bench.answered(masks, TRAINED) for share, masks in cases.items()}

    def _training(self, bench: Bench, job: Job, target: Target, parameters: Any) -> Training:
        corpus = bench.corpus if job.generated else bench.given
        if job.kind is not None:
            train = [(name, tokens) for name, tokens in corpus.train if name == job.kind]
            corpus = replace(corpus, train=train, held_out={job.kind: corpus.held_out[job.kind]})
        options = TrainingOptions(job.tokens, job.batch_tokens, job.rate, job.seed, measures=job.points)
        return Training(bench.model, target, corpus, parameters, options, {}, graph=bench.batched)

    def _adapter(self, bench: Bench, target: Target, changes: Changes) -> Adapter:
        manifest = bench.model.store.manifest
        mask = None if target.mask is None else target.mask.allowed
        fingerprint, spec = manifest.source.fingerprint, manifest.model
        return Adapter(fingerprint, spec.num_layers, spec.num_experts, changes, mask, target.shares)


def _case(part: str, share: float, ratios: Mapping[str, float]) -> Row:
    worst = max(ratios, key=lambda kind: ratios[kind])
    mean = round(geometric_mean(list(ratios.values())), 4)
    return {"part": part, "share": share, "mean_ratio": mean, "worst": [worst, ratios[worst]], "ratios": dict(ratios)}


_work: Work


def _start(run: Run, arguments: argparse.Namespace, environment: Row) -> None:
    """Make the process's own work; a process of the pool ends if the one that started it is killed."""
    global _work
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    torch.set_num_threads(arguments.threads)
    _work = Work(run, arguments, environment)


def _end_after(parent: Any) -> None:
    """End this process after its parent, whatever it is doing: it would keep its memory on the device."""
    parent.join()
    os._exit(1)


def _do(job: Job) -> Row:
    return _work.do(job)


def rows_of(run: Run, jobs: Sequence[Job], arguments: argparse.Namespace, environment: Row) -> Iterator[Row]:
    """Do the jobs, in this process or in several; their results as they come."""
    _start(run, arguments, environment)
    if arguments.processes == 1:
        yield from map(_do, jobs)
        _work.close()
        return
    for checkpoint in {job.checkpoint: None for job in jobs if job.tokens}:
        assert _work.bench(checkpoint).corpus  # writes the text, which the processes read
    _work.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    context = get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context, _start, (run, arguments, environment)) as pool:
        for future in as_completed([pool.submit(_do, job) for job in jobs]):
            yield future.result()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = _arguments(argv)
    run, where = Run.read(arguments.jobs), environment(arguments.device)
    given = {path.name for path in arguments.checkpoint} | {one.name for one in find_domains(arguments.texts)} | {None}
    wanted = [job for job in run.jobs if {job.checkpoint, job.kind} <= given]
    missing = sorted({name for job in run.jobs for name in (job.checkpoint, job.kind)} - given)
    results = Results(arguments.results, run, where)
    jobs = [job for job in wanted if not results.complete(job)]
    print(
        f"{len(jobs)} of {len(run.jobs)} jobs to do; {len(wanted) - len(jobs)} are in {arguments.results}", flush=True
    )
    if missing:
        print(f"jobs of {', '.join(missing)} are left out: no --checkpoint and no --texts have the name", flush=True)
    started, rows = time.monotonic(), []
    for row in rows_of(run, jobs, arguments, where):
        case = row["cases"][-1] if row["cases"] else {}
        told = row.get("error", "").strip().splitlines()[-1:] or [f"{case['share']:g}: {case['mean_ratio']:g}"]
        print(f"{time.monotonic() - started:6.0f} s  {row['name']}  {told[0]}  {row.get('questions', '')}", flush=True)
        rows += [(row["name"], one["part"], one["share"], one["mean_ratio"], *one["worst"]) for one in row["cases"]]
    print(table(("job", "part", "share", "mean ratio", "worst kind", "its ratio"), rows))
    print(json.dumps({"environment": where, "run": run.name, "done": [job.name for job in jobs]}))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=Path, default=DATA / "adapt" / "beside.json", help="the run")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[BUNDLED])
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in (DATA / "selection").glob("*.txt")))
    parser.add_argument("--questions", nargs="*", type=Path, default=sorted(DATA.glob("selection/questions/*.jsonl")))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "work-tmp", help="folder of texts and adapters")
    parser.add_argument("--results", type=Path, default=RESULTS / "adapt.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
