"""Calibration: runs named groups of texts through a model with its experts paged, and collects what they did.

Because experts are paged, the checkpoint may be larger than memory. Invariant: whatever was interrupted continues after
the last saved sequence and ends with the statistics of an uninterrupted run. A second pass measures the price, the loss
that a deficit brings: each domain's first sequences again, masked to its own best experts, and to fewer of those.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expert_store.files import replacing
from extractor.planning.criteria import DEFAULT_CRITERION, ranking, score
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import ExpertStatistics, PricePoint, StatisticsError
from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.collect import SequenceRun, add_run, observe, weight_flatness
from server.quality.run import batches, encoder, losses, run_batch
from server.quality.texts import (
    MIN_SEQUENCE_TOKENS,
    Domain,
    TextsError,
    documents,
    sequence_key,
    sequences,
    texts_key,
)

PRICE_SHARES = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)
"""Shares of the experts at which the price is measured."""
PRICE_CRITERIA = (DEFAULT_CRITERION, "coverage")
"""Two ways to choose, so that the curves do not depend on one."""
WRONG_SHARES = (0.5, 1.0)
"""Shares of the smallest mask that are exchanged at random, to measure it there too: text served under a mask made
for another kind misses more than its own best experts ever do."""
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class CalibrateOptions:
    """What to run.

    Attributes:
        context: tokens of a sequence.
        max_tokens: most tokens of a domain.
        price_tokens: of a domain, measured again under each mask; 0 measures no price.
        half: which documents to take: all, even or odd.
        with_weights: read all weights once for the criterion aimer.
    """

    context: int = 512
    max_tokens: int = 65536
    price_tokens: int = 16384
    half: str = "all"
    with_weights: bool = True


class Progress:
    """Told of what is being done; replaced by the command's progress bar."""

    def __call__(self, doing: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: unknown) in the step called `doing`."""


def empty_statistics(model: SelectiveModel) -> ExpertStatistics:
    """Statistics of the model's checkpoint with no text in them."""
    manifest = model.store.manifest
    return ExpertStatistics(
        fingerprint=manifest.source.fingerprint,
        num_layers=manifest.model.num_layers,
        num_experts=manifest.model.num_experts,
        top_k=manifest.model.top_k,
        expert_bytes=sum(spec.span_bytes for spec in manifest.layers),
        trunk_bytes=sum(file.bytes for file in manifest.trunk),
    )


def calibrate(
    model: SelectiveModel,
    domains: Sequence[Domain],
    options: CalibrateOptions,
    resume_at: Path | None = None,
    progress: Progress | None = None,
) -> ExpertStatistics:
    """Statistics of `domains`.

    Args:
        resume_at: folder for what is done so far; continued if it holds the same work, removed at the end.

    Raises:
        TextsError: texts that cannot be read. StoreError: experts that cannot be fetched.
    """
    say = progress or Progress()
    checkpoint = _Checkpoint.open(resume_at, model, domains, options)
    statistics = checkpoint.statistics
    with observe(model) as outputs:
        for domain in domains:
            found = domain_sequences(model, domain, options)
            if not found:
                raise TextsError(f"domain {domain.name} has fewer than {MIN_SEQUENCE_TOKENS} tokens: give it more text")
            left = [at for at in range(len(found)) if (domain.name, at) not in checkpoint.done]
            for batch in batches(model, [found[at] for at in left]):
                output = run_batch(model, batch)
                norms, changes = outputs.take()
                for at, tokens in enumerate(batch):
                    part = slice(at * len(tokens), (at + 1) * len(tokens))
                    key = sequence_key(tokens)
                    run = SequenceRun(key, output.record_of(at), norms[:, part], changes[:, part])
                    add_run(statistics, domain.name, run)
                    checkpoint.note(domain.name, left.pop(0))
                checkpoint.save_now_and_then()
                say(f"running {domain.name}", len(found) - len(left), len(found))
    if options.with_weights:
        say("reading weights", 0, None)
        statistics.weight_flatness = weight_flatness(model.store)
    if options.price_tokens:
        for domain in domains:
            if not any(point.domain == domain.name for point in statistics.price):
                say(f"pricing {domain.name}", 0, None)
                statistics.price += measure_price(model, statistics, domain, options)
                checkpoint.save()
    checkpoint.remove()
    return statistics


def domain_sequences(model: SelectiveModel, domain: Domain, options: CalibrateOptions) -> list[list[int]]:
    """A domain's packed token sequences, at most `options.max_tokens` tokens."""
    taken: list[list[int]] = []
    texts = documents(domain, options.half)
    for tokens in sequences(texts, encoder(model), model.tokenizer.eos_token_id, options.context):
        taken.append(tokens)
        if len(taken) * options.context >= options.max_tokens:
            break
    return taken


def best_experts(
    statistics: ExpertStatistics, domain: str, count: int, criterion: str = DEFAULT_CRITERION
) -> ExpertMask:
    """The mask of a domain's best `count` experts of every layer, chosen freely."""
    allowed = np.zeros((statistics.num_layers, statistics.num_experts), dtype=np.bool_)
    np.put_along_axis(allowed, ranking(score(statistics, criterion, [domain]))[:, :count], True, axis=1)
    return ExpertMask(allowed)


def with_wrong_experts(mask: ExpertMask, share: float) -> ExpertMask:
    """The mask with a share of every layer's experts, at least one, exchanged for others at random (seeded)."""
    generator = np.random.default_rng(0)
    allowed = mask.allowed.copy()
    for layer in allowed:
        inside, outside = np.flatnonzero(layer), np.flatnonzero(~layer)
        count = min(max(1, round(share * len(inside))), len(outside))
        layer[generator.choice(inside, count, replace=False)] = False
        layer[generator.choice(outside, count, replace=False)] = True
    return ExpertMask(allowed)


def measure_price(
    model: SelectiveModel, statistics: ExpertStatistics, domain: Domain, options: CalibrateOptions
) -> list[PricePoint]:
    """What masks of several sizes cost on a domain's first sequences: its own best experts, and wrong ones among them.

    The sequences are two parts, taken in turns, so that the curves of one can be tried on the other.
    """
    chosen = domain_sequences(model, domain, options)[: max(1, options.price_tokens // options.context)]
    parts = [part for part in (chosen[::2], chosen[1::2]) if part]
    plain = [_mean_loss(model, part, None).loss for part in parts]
    points = []
    masks = [
        (share, best_experts(statistics, domain.name, max(1, round(share * statistics.num_experts)), criterion), False)
        for share in PRICE_SHARES
        for criterion in PRICE_CRITERIA
    ]
    share, smallest, _ = masks[-1]
    masks += [(share, with_wrong_experts(smallest, wrong), True) for wrong in WRONG_SHARES]
    for share, mask, is_wrong in masks:
        for number, part in enumerate(parts):
            one = _mean_loss(model, part, mask & model.routing.mask)
            change = one.loss - plain[number]
            points.append(
                PricePoint(
                    domain.name, one.deficit, change, one.num_tokens, share, number, one.per_layer, is_wrong=is_wrong
                )
            )
    return points


@dataclass(frozen=True)
class _Measured:
    """Loss in nats a token, the missing share of the router mass, and the tokens that the loss is the mean of."""

    loss: float
    deficit: float
    per_layer: tuple[float, ...]
    num_tokens: int


def _mean_loss(model: SelectiveModel, chosen: Sequence[Sequence[int]], mask: ExpertMask | None) -> _Measured:
    total, num_tokens = 0.0, 0
    demanded, missed = np.zeros(model.num_layers), np.zeros(model.num_layers)
    for batch in batches(model, chosen):
        output = run_batch(model, batch, mask)
        values = losses(output.logits, batch)
        total, num_tokens = total + float(values.sum()), num_tokens + values.size
        demanded += output.share.demanded.sum(axis=0)
        missed += output.share.missed.sum(axis=0)
    per_layer = np.divide(missed, demanded, out=np.zeros_like(missed), where=demanded > 0)
    deficit = float(missed.sum()) / max(float(demanded.sum()), np.finfo(np.float64).tiny)
    return _Measured(total / num_tokens, deficit, tuple(round(float(one), 6) for one in per_layer), num_tokens)


class _Checkpoint:
    """What is done so far, saved now and then: a statistics file, and a JSON file that names it (the commit point)."""

    def __init__(self, folder: Path | None, work: dict[str, Any], statistics: ExpertStatistics) -> None:
        self.folder, self.work, self.statistics = folder, work, statistics
        self.done: set[tuple[str, int]] = set()
        self._saved_at = time.monotonic()
        self._number = 0

    @classmethod
    def open(
        cls, folder: Path | None, model: SelectiveModel, domains: Sequence[Domain], options: CalibrateOptions
    ) -> _Checkpoint:
        """Continue in `folder` if it holds the same work, else start."""
        statistics = empty_statistics(model)
        texts = [] if folder is None else [[domain.name, texts_key(domain)] for domain in domains]
        work = {"fingerprint": statistics.fingerprint, "texts": texts, "options": asdict(options)}
        made = cls(folder, work, statistics)
        if folder is None or not (folder / "resume.json").exists():
            return made
        try:
            saved = json.loads((folder / "resume.json").read_bytes())
            if saved["work"] == json.loads(json.dumps(work)):
                made.statistics = read_statistics(folder / Path(saved["statistics"]).name)
                made.done = {(str(name), int(number)) for name, number in saved["done"]}
                made._number = int(saved["number"])
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise StatisticsError(
                f"{folder} holds what cannot be continued ({error}): delete it to start anew"
            ) from error
        return made

    def note(self, domain: str, number: int) -> None:
        """A sequence is in the statistics."""
        self.done.add((domain, number))

    def save_now_and_then(self) -> None:
        """Save when the last time is long ago."""
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save now. Raises OSError."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        old = self.folder / f"statistics-{self._number}.safetensors"
        self._number += 1
        name = f"statistics-{self._number}.safetensors"
        write_statistics(self.folder / name, self.statistics)
        document = {"work": self.work, "statistics": name, "number": self._number, "done": sorted(self.done)}
        with replacing(self.folder / "resume.json") as file:
            file.write(json.dumps(document).encode())
        old.unlink(missing_ok=True)
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Forget what was saved, at the end."""
        if self.folder is not None and self.folder.is_dir():
            for file in (*self.folder.glob("statistics-*"), *self.folder.glob("resume.json*")):
                file.unlink()
            self.folder.rmdir()
