"""`deepfew adapt` from texts to an adapter: the text, the training, and the price of a deficit with the adapter.

Invariant: everything that a killed run had finished is read from its folder, so the same command ends with the adapter
of a run that was never interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save

from expert_store.adapter import Adapter, Changes
from expert_store.errors import AdapterError
from expert_store.files import replacing
from extractor.statistics.price import Price
from server.adapting.corpus import Corpus, read_corpus
from server.adapting.generation import write_texts
from server.adapting.parameters import expert_parameters, make_parameters
from server.adapting.target import Target
from server.adapting.training import TRAINED, Trained, Training, TrainingOptions
from server.model.host.assembly import HostModel
from server.model.host.kv_budget import free_bytes
from server.model.seam.batched import batched_experts
from server.model.seam.changed import Kept, changed_experts
from server.quality.batches import Progress, token_sequences
from server.quality.price import price_points
from server.quality.texts import Domain, TextOptions, texts_key

BEGINNING_TOKENS = 16
"""Text is written from so many tokens of given text."""
GIVEN_SHARE = 0.25
"""Share of the training that is given text, where the model writes text too; both are read again when they end."""
HELD_OUT_TOKENS = 512
"""Held-out tokens of a domain that measure meanwhile."""


@dataclass(frozen=True)
class AdaptRequest:
    """The work of one run.

    Attributes:
        domains: the texts; empty with `generated_tokens` alone.
        text: the part of each domain's text to take.
        target: the masks to train for.
        rank: of the changes of linear layers; 0 changes whole matrices.
        generated_tokens: tokens of text that the whole model writes too, as continuations of pieces of the texts.
        shared_width: intermediate columns of an expert that each layer gets for every token; 0: none.
        experts: whether the experts of the target's mask are trained too.
    """

    domains: Sequence[Domain]
    text: TextOptions
    target: Target
    training: TrainingOptions
    rank: int
    generated_tokens: int = 0
    shared_width: int = 0
    experts: bool = False

    @property
    def kept(self) -> Kept:
        """The experts of each layer that are trained."""
        if not self.experts:
            return []
        kept = self.target.kept
        assert kept is not None, "the experts of pools are not trained"
        return kept

    def work(self, model: HostModel) -> dict[str, Any]:
        """All that the result depends on, as JSON. Raises OSError."""
        return {
            "fingerprint": model.store.manifest.source.fingerprint,
            "texts": [[domain.name, texts_key(domain)] for domain in self.domains],
            "text": asdict(self.text),
            "mask": self.target.kept,
            "pools": [self.target.shares, self.target.late, self.target.skew],
            "training": asdict(self.training),
            "rank": self.rank,
            "generated_tokens": self.generated_tokens,
            "shared_width": self.shared_width,
            "experts": self.experts,
            "dtype": str(model.dtype),
        }


def adapt(
    model: HostModel,
    request: AdaptRequest,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    notify: Progress = lambda doing, done, total: None,
) -> tuple[Adapter, Changes]:
    """Train an adapter for a model that has all experts, and the changes of experts if they are requested.

    Args:
        folder: of the interrupted run, to continue; the caller deletes it after the adapter is written.
        say: receives lines for the user: the forecast, and the figures on held-out text.
        notify: called after each step.

    Returns:
        The adapter, and the changes of the experts as `TrainedStore.write` takes them (none if they are not requested).

    Raises:
        TextsError: texts that cannot be read, or too little of them. AdapterError: a folder of other work.
        StoreError: experts that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with batched_experts(model.model, model.cache) if model.device.type == "cuda" else nullcontext(False) as batched:
        if model.device.type == "cuda" and not batched:
            say(
                "experts are fetched or encoded, so every step waits for them: more slots, or plain experts, are faster"
            )
        corpus = make_corpus(model, request, folder, notify)
        parameters = make_parameters(model, request.rank, request.training.seed, request.shared_width)
        experts = expert_parameters(model, request.kept, request.rank, request.training.seed) if request.experts else {}
        work = request.work(model)
        with changed_experts(model, request.kept, experts):
            everything = parameters | experts
            training = Training(model, request.target, corpus, everything, request.training, work, graph=batched)
            adapter = _trained(model, request, training, folder / "state.safetensors", say, notify)
        changes = {name: parts for name, parts in adapter.changes.items() if name in parameters}
        return replace(adapter, changes=changes), {name: adapter.changes[name] for name in experts}


def _trained(
    model: HostModel,
    request: AdaptRequest,
    training: Training,
    state: Path,
    say: Callable[[str], None],
    notify: Progress,
) -> Adapter:
    """Train to the end, from `state` if there is one."""
    if state.exists():
        training.resume(state)
        say(f"continuing after step {training.done.step} of {training.num_steps}")
    else:
        seconds, num_bytes = training.forecast()
        num_parameters = sum(one.numel() for parts in training.parameters.values() for one in parts.values())
        say(
            f"{num_parameters:,} numbers to train on {training.corpus.num_tokens:,} tokens of text, "
            f"{training.num_steps} steps: about {seconds / 60:.0f} minutes, and about {num_bytes / 2**20:,.0f} MiB "
            "beside the model"
        )
        free = free_bytes(model.device)
        if free is not None and num_bytes > free:
            say(
                f"WARNING: {free / 2**20:,.0f} MiB are free, so the system may end the run: give fewer --batch-tokens, "
                "a smaller --rank, or --shared-width"
            )
    before = training.held_out(None)
    say(f"held-out perplexity ÷ the whole model's, without the adapter: {_shown(before)}")
    said = len(training.done.ratios)

    def step(done: Trained) -> None:
        nonlocal said
        if len(done.ratios) > said:
            said = len(done.ratios)
            say(f"step {done.step}: loss {done.losses[-1][1]:.4f}, held out {_shown(done.ratios[-1][1])}")
        loss = f", loss {done.recent[-1]:.3f}" if done.recent else ""
        notify(f"training{loss}", done.step, training.num_steps)

    done = training.run(state, step)
    training.save(state)
    return _adapter(model, request, training, done, before, notify)


def _shown(ratios: dict[str, float]) -> str:
    return ", ".join(f"{ratio:.3f} at {float(share):.4g}" for share, ratio in ratios.items())


def _adapter(
    model: HostModel,
    request: AdaptRequest,
    training: Training,
    done: Trained,
    before: dict[str, float],
    notify: Progress,
) -> Adapter:
    """The trained adapter with its price and figures."""
    points = []
    for number, (domain, sequences) in enumerate(training.corpus.held_out.items()):
        notify(f"pricing {domain}", number, len(training.corpus.held_out))
        masks = request.target.measured(training.corpus.demand[domain])
        points += price_points(model, domain, sequences, masks, TRAINED)
    price, spec = Price.of(points), model.store.manifest.model
    return Adapter(
        fingerprint=model.store.manifest.source.fingerprint,
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        changes=training.changes,
        mask=None if request.target.mask is None else request.target.mask.allowed,
        shares=request.target.shares,
        price={} if price is None else price.to_json(),
        training={
            "texts": [domain.name for domain in request.domains],
            "generated_tokens": request.generated_tokens,
            "text_tokens": training.corpus.num_tokens,
            "tokens": request.training.tokens,
            "batch_tokens": request.training.batch_tokens,
            "rate": request.training.rate,
            "seconds": round(done.seconds, 1),
            "seed": request.training.seed,
            "rank": request.rank,
            "shared_width": request.shared_width,
            "ratios_before": before,
            "ratios": done.ratios,
            "losses": done.losses,
        },
    )


def make_corpus(model: HostModel, request: AdaptRequest, folder: Path, notify: Progress) -> Corpus:
    """The corpus of the texts, with the text that the model wrote, which is kept in `folder`.

    Raises TextsError, or AdapterError: the text in `folder` is of other work.
    """
    context = request.text.context
    given = {domain.name: token_sequences(model, domain, request.text) for domain in request.domains}
    corpus = read_corpus(model, given, context, HELD_OUT_TOKENS, notify) if given else None
    if not request.generated_tokens:
        assert corpus is not None, "a request has texts, or has text written"
        return corpus
    path, work = folder / "text.safetensors", json.dumps(request.work(model))
    if not path.exists():
        names, written = _written(model, request, corpus, notify)
        with replacing(path) as file:
            file.write(save({"tokens": torch.from_numpy(written)}, {"domains": json.dumps(names), "work": work}))
    with safe_open(path, framework="np") as held:
        texts, about = list(held.get_tensor("tokens").astype(np.int64)), held.metadata()
    if about.get("work") != work:
        raise AdapterError(f"{folder} is of a run with other texts or options: delete it, or give it the same ones")
    if corpus is None:
        return read_corpus(model, {"generated": texts}, context, HELD_OUT_TOKENS, notify)
    times = max(1, round(GIVEN_SHARE / (1 - GIVEN_SHARE) * len(texts) / len(corpus.train)))
    return replace(corpus, train=[*list(corpus.train) * times, *zip(json.loads(about["domains"]), texts, strict=True)])


def _written(
    model: HostModel, request: AdaptRequest, corpus: Corpus | None, notify: Progress
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The domains of the texts that the model writes, and their tokens [texts, context]."""
    context, count = request.text.context, max(2, request.generated_tokens // request.text.context)
    if corpus is None:
        first = model.tokenizer.eos_token_id if model.tokenizer.bos_token_id is None else model.tokenizer.bos_token_id
        names, beginnings = ["generated"] * count, [[int(first or 0)]] * count
    else:
        random = np.random.default_rng([request.training.seed, 3])
        length = min(BEGINNING_TOKENS, context - 1)
        names, beginnings = [], []
        for at in random.integers(len(corpus.train), size=count).tolist():
            name, tokens = corpus.train[at]
            start = int(random.integers(context - length))
            names.append(name)
            beginnings.append(list(tokens[start : start + length]))
    return names, write_texts(model, beginnings, context, request.training.seed, notify)


def remove(folder: Path) -> None:
    """Delete the folder of a run that has ended."""
    shutil.rmtree(folder, ignore_errors=True)
