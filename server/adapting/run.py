"""`deepfew adapt` from texts to an adapter: the text, the training, and the price of a deficit with the adapter.

Invariant: everything that a killed run had finished is read from its folder, so the same command ends with the adapter
of a run that was never interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from expert_store.adapter import Adapter
from expert_store.files import replacing
from extractor.statistics.price import Price
from server.adapting.corpus import Corpus, read_corpus
from server.adapting.generation import write_texts
from server.adapting.parameters import make_parameters
from server.adapting.target import Target
from server.adapting.training import TRAINED, Trained, Training, TrainingOptions
from server.model.host.assembly import HostModel
from server.quality.batches import Progress, Tokens, token_sequences
from server.quality.price import price_points
from server.quality.texts import Domain, TextOptions, texts_key

BEGINNING_TOKENS = 32
"""Text is written from so many tokens of given text."""
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
        generated_tokens: tokens of text that the whole model writes too, from the beginnings of the texts.
    """

    domains: Sequence[Domain]
    text: TextOptions
    target: Target
    training: TrainingOptions
    rank: int
    generated_tokens: int = 0

    def work(self, model: HostModel) -> dict[str, Any]:
        """All that the result depends on, as JSON. Raises OSError."""
        mask = self.target.mask
        return {
            "fingerprint": model.store.manifest.source.fingerprint,
            "texts": [[domain.name, texts_key(domain)] for domain in self.domains],
            "text": asdict(self.text),
            "mask": None if mask is None else [np.flatnonzero(layer).tolist() for layer in mask.allowed],
            "shares": self.target.shares,
            "training": asdict(self.training),
            "rank": self.rank,
            "generated_tokens": self.generated_tokens,
            "dtype": str(model.dtype),
        }


def adapt(
    model: HostModel,
    request: AdaptRequest,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    notify: Progress = lambda doing, done, total: None,
) -> Adapter:
    """Train an adapter for a model that has all experts.

    Args:
        folder: of the interrupted run, to continue; the caller deletes it after the adapter is written.
        say: receives lines for the user: the forecast, and the figures on held-out text.
        notify: called after each step.

    Raises:
        TextsError: texts that cannot be read, or too little of them. AdapterError: a folder of other work.
        StoreError: experts that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = _corpus(model, request, folder, notify)
    parameters = make_parameters(model, request.rank, request.training.seed)
    training = Training(model, request.target, corpus, parameters, request.training, request.work(model))
    state = folder / "state.safetensors"
    if state.exists():
        training.resume(state)
        say(f"continuing after step {training.done.step} of {training.num_steps}")
    else:
        seconds, num_bytes = training.forecast()
        num_parameters = sum(one.numel() for parts in parameters.values() for one in parts.values())
        say(
            f"{num_parameters:,} numbers to train on {corpus.num_tokens:,} tokens of text, {training.num_steps} steps: "
            f"about {seconds / 60:.0f} minutes, and about {num_bytes / 2**20:,.0f} MiB beside the model"
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
        changes={
            name: {part: one.detach().float().cpu() for part, one in parts.items()}
            for name, parts in training.parameters.items()
        },
        mask=None if request.target.mask is None else request.target.mask.allowed,
        shares=request.target.shares,
        price={} if price is None else price.to_json(),
        training={
            "texts": [domain.name for domain in request.domains],
            "generated_tokens": request.generated_tokens,
            "text_tokens": training.corpus.num_tokens,
            "tokens": request.training.tokens,
            "seconds": round(done.seconds, 1),
            "seed": request.training.seed,
            "rank": request.rank,
            "ratios_before": before,
            "ratios": done.ratios,
            "losses": done.losses,
        },
    )


def _corpus(model: HostModel, request: AdaptRequest, folder: Path, notify: Progress) -> Corpus:
    """The corpus of the texts, with the text that the model wrote, which is kept in `folder`."""
    context = request.text.context
    given = {domain.name: token_sequences(model, domain, request.text) for domain in request.domains}
    corpus = read_corpus(model, given, context, HELD_OUT_TOKENS, notify) if given else None
    if not request.generated_tokens:
        assert corpus is not None, "a request has texts, or has text written"
        return corpus
    first = model.tokenizer.eos_token_id if model.tokenizer.bos_token_id is None else model.tokenizer.bos_token_id
    starts: Sequence[tuple[str, Tokens]] = [("generated", [first or 0])] if corpus is None else corpus.train
    order = np.random.default_rng([request.training.seed, 3]).permutation(len(starts))
    chosen = [starts[int(order[at % len(order)])] for at in range(max(2, request.generated_tokens // context))]
    path = folder / "text.safetensors"
    if not path.exists():
        beginnings = [tokens[:BEGINNING_TOKENS] for _, tokens in chosen]
        texts = write_texts(model, beginnings, context, request.training.seed, notify)
        with replacing(path) as file:
            file.write(save({"tokens": torch.tensor(texts, dtype=torch.int32)}))
    written: list[list[int]] = load_file(path)["tokens"].tolist()
    if corpus is None:
        return read_corpus(model, {"generated": written}, context, HELD_OUT_TOKENS, notify)
    return replace(corpus, train=[*corpus.train, *zip([name for name, _ in chosen], written, strict=True)])


def remove(folder: Path) -> None:
    """Delete the folder of a run that has ended."""
    shutil.rmtree(folder, ignore_errors=True)
