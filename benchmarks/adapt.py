"""Adapters: how much of the loss under masks they repair, on held-out text and questions.

What is measured, in words:
- *ratio*: perplexity under a mask ÷ perplexity of the whole, unadapted checkpoint on the same held-out tokens,
  geometric mean over the kinds of text (*worst*: the kind that loses most). Even documents of every file train and
  choose experts, odd ones are measured, packed into 512 tokens.
- *none*: every kind masked to its most wanted experts, without an adapter.
- *pools*: the same masks, with one adapter that was trained for pools of 12.5 to 100 %.
- *plans*: the same masks, with an adapter for each of them, trained on the text of its kind.
- *together*: one mask of a quarter for all kinds, without and with an adapter for it.
- *questions*: share answered exactly, greedily, under the mask of the kind of the same name; `whole`: all experts.
- *trainings*: text, tokens and seconds; by step, mean loss (KL divergence, nats a token) since the entry before, and
  the ratios on text that the training held out itself.

    python -m benchmarks.adapt [--checkpoint DIR] [--texts PATH...] [--questions FILE...] [--parts PART...]
                               [--tokens N] [--seeds N] [--adapter FILE] [--save NAME]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from expert_store.adapter import Adapter
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.corpus import Corpus, read_corpus
from server.adapting.run import AdaptRequest, adapt
from server.adapting.target import Target, most_wanted
from server.adapting.training import TrainingOptions
from server.masks.masking import FixedMasking
from server.model.host.assembly import HostModel, load_model, resolve_device
from server.model.host.runner import HostRunner
from server.model.runner import RunnerOptions
from server.quality.batches import Tokens, token_sequences
from server.quality.questions import read_questions, share_answered
from server.quality.text_loss import evaluate_text, geometric_mean
from server.quality.texts import Domain, TextOptions, find_domains

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
SHARES = (0.5, 0.25, 0.125)
PARTS = ("none", "pools", "plans", "together", "questions")
NAME = "measured"
"""The name of the adapter that is measured, in the model's routing."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A model, its texts, and the losses of the whole model on the held-out ones."""

    model: HostModel
    domains: Sequence[Domain]
    corpus: Corpus
    held_out: Mapping[str, Sequence[Tokens]]
    unmasked: Mapping[str, float]
    arguments: argparse.Namespace

    def train(self, target: Target, domains: Sequence[Domain], seed: int) -> Adapter:
        """An adapter for the target, trained on the even documents of these kinds."""
        options = TextOptions(self.arguments.context, 1 << 20, "even")
        training = TrainingOptions(self.arguments.tokens, self.arguments.batch_tokens, seed=seed)
        request = AdaptRequest(domains, options, target, training, self.arguments.rank)
        with tempfile.TemporaryDirectory(prefix="deepfew-adapt-") as folder:
            return adapt(self.model, request, Path(folder), lambda line: print(line, flush=True))

    def use(self, adapter: Adapter | None) -> str | None:
        """Put the adapter into the model; returns the name that masked runs ask for."""
        if adapter is None:
            return None
        self.model.routing.install_adapters(self.model.model, adapter.changes)
        self.model.routing.adapters.add(NAME, adapter.changes, self.model.device, self.model.dtype)
        return NAME

    def ratio(self, kind: str, mask: ExpertMask, adapter: str | None) -> float:
        """Perplexity of a kind's held-out text under a mask ÷ that of the whole model."""
        return math.exp(evaluate_text(self.model, self.held_out[kind], mask, adapter).loss - self.unmasked[kind])

    def row(self, part: str, share: float, seed: int | None, ratios: Mapping[str, float]) -> Row:
        """One line of the table."""
        worst = max(ratios, key=lambda kind: ratios[kind])
        return {
            "part": part,
            "share": share,
            "seed": seed,
            "mean_ratio": round(geometric_mean(list(ratios.values())), 4),
            "worst": [worst, round(ratios[worst], 4)],
            "ratios": {kind: round(ratio, 4) for kind, ratio in ratios.items()},
        }

    def masks(self, share: float) -> dict[str, ExpertMask]:
        """Every kind's most wanted experts."""
        return {kind: most_wanted(self.corpus.demand[kind], share) for kind in self.held_out}


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="deepfew-adapt-store-") as folder:
        bench = _bench(make_store(arguments.checkpoint, Path(folder) / "store"), arguments)
        result: dict[str, Any] = {
            "environment": environment(arguments.device),
            "checkpoint": arguments.checkpoint.name,
            "num_held_out_tokens": sum(len(tokens) for part in bench.held_out.values() for tokens in part),
            "rows": [],
            "trainings": [],
            "questions": [],
        }
        pools = Adapter.read(arguments.adapter) if arguments.adapter is not None else None
        for seed in range(arguments.seeds):
            _measure(bench, result, pools, seed)
        bench.model.close()
    rows = [(row["part"], row["share"], row["seed"], row["mean_ratio"], *row["worst"]) for row in result["rows"]]
    print(table(("part", "share", "seed", "mean ratio", "worst kind", "its ratio"), rows))
    asked = [(row["name"], row["part"], row["share"], row["accuracy"]) for row in result["questions"]]
    if asked:
        print(table(("questions", "part", "share", "answered"), asked))
    finish(arguments.save or "adapt", result, save=arguments.save is not None)


def _measure(bench: Bench, result: dict[str, Any], pools: Adapter | None, seed: int) -> None:
    """Every part that was asked for; those without an adapter are measured with the first seed alone."""
    parts, rows = bench.arguments.parts, result["rows"]
    if "none" in parts and seed == 0:
        rows += [bench.row("none", share, None, _ratios(bench, bench.masks(share), None)) for share in SHARES]
    if "pools" in parts:
        adapter = pools or bench.train(Target(shares=(0.125, 1.0)), bench.domains, seed)
        result["trainings"].append({"part": "pools", **adapter.training})
        name = bench.use(adapter)
        rows += [bench.row("pools", share, seed, _ratios(bench, bench.masks(share), name)) for share in SHARES]
        if "questions" in parts:
            result["questions"] += _questions(bench, "pools", name)
    if "questions" in parts and seed == 0:
        result["questions"] += _questions(bench, "none", None)
    if "plans" in parts:
        for share in bench.arguments.shares:
            ratios = {}
            for domain in bench.domains:
                mask = bench.masks(share)[domain.name]
                adapter = bench.train(Target(mask=mask), [domain], seed)
                result["trainings"].append({"part": f"plan {domain.name} {share}", **adapter.training})
                ratios[domain.name] = bench.ratio(domain.name, mask, bench.use(adapter))
            rows.append(bench.row("plans", share, seed, ratios))
    if "together" in parts:
        everything = sum(demand / demand.sum() for demand in bench.corpus.demand.values())
        mask = most_wanted(np.asarray(everything), 0.25)
        masks = dict.fromkeys(bench.held_out, mask)
        rows.append(bench.row("together without", 0.25, None, _ratios(bench, masks, None)))
        adapter = bench.train(Target(mask=mask), bench.domains, seed)
        result["trainings"].append({"part": "together", **adapter.training})
        rows.append(bench.row("together", 0.25, seed, _ratios(bench, masks, bench.use(adapter))))


def _ratios(bench: Bench, masks: Mapping[str, ExpertMask], adapter: str | None) -> dict[str, float]:
    return {kind: bench.ratio(kind, mask, adapter) for kind, mask in masks.items()}


def _questions(bench: Bench, part: str, adapter: str | None) -> list[Row]:
    runner = HostRunner(bench.model, max_rows=16, max_tokens=512)
    found: list[Row] = []
    for path in bench.arguments.questions:
        asked = read_questions(path)
        if asked.name not in bench.held_out:
            continue
        for share in SHARES if adapter is not None else (1.0, *SHARES):
            mask = bench.masks(share)[asked.name]
            masking = None if mask.is_full else (lambda num_prompt_tokens, mask=mask: FixedMasking(mask))
            accuracy = share_answered(runner, asked.questions, masking, bench.arguments.prefix, adapter)
            name = "whole" if mask.is_full else part
            found.append({"name": asked.name, "part": name, "share": share, "accuracy": round(accuracy, 4)})
    return found


def _bench(store: Path, arguments: argparse.Namespace) -> Bench:
    device = torch.device(resolve_device(arguments.device))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = load_model(Store.open(store), RunnerOptions(device=device, dtype=dtype))
    domains = find_domains(arguments.texts)
    even, odd = TextOptions(512, 1 << 20, "even"), TextOptions(512, arguments.held_out_tokens, "odd")
    corpus = read_corpus(model, {domain.name: token_sequences(model, domain, even) for domain in domains}, 512, 512)
    held_out = {domain.name: token_sequences(model, domain, odd) for domain in domains}
    unmasked = {kind: evaluate_text(model, sequences).loss for kind, sequences in held_out.items()}
    return Bench(model, domains, corpus, held_out, unmasked, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in DATA.glob("*.txt")))
    parser.add_argument("--questions", nargs="+", type=Path, default=sorted(DATA.glob("questions/*.jsonl")))
    parser.add_argument("--prefix", default="<|endoftext|>", help="text before every question")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the part plans")
    parser.add_argument("--adapter", type=Path, help="measure this adapter for pools instead of training one")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens of each training")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256, help="tokens of a training sequence")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out-tokens", type=int, default=4096, help="of a kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
