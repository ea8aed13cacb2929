"""Calibration: runs named groups of texts through a model with its experts paged, and collects their statistics.

Because experts are paged, the checkpoint may be larger than memory. Invariant: an interrupted run continues after the
last saved sequence and ends with the statistics of an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expert_store.files import replacing
from extractor.encoding.names import ExpertsDtype
from extractor.statistics.channels import ChannelSquares
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import EncodingPoint, ExpertStatistics, StatisticsError
from server.engine.statistics import empty_statistics
from server.model.runner import SelectiveModel
from server.model.seam.observation import OutputObserver, observe_outputs
from server.quality.batches import Progress, Tokens, batches, run_batch, token_sequences
from server.quality.price import measure_price
from server.quality.sequence_statistics import add_sequence, weight_flatness
from server.quality.text_loss import TextResult, evaluate_text
from server.quality.texts import Domain, TextOptions, sequence_key, texts_key

SAVE_SECONDS = 30.0
OpenEncoded = Callable[[ExpertsDtype], AbstractContextManager[SelectiveModel]]


@dataclass(frozen=True)
class CalibrationOptions:
    """The work of one calibration.

    Attributes:
        text: the part of each domain's text to run.
        price_tokens: tokens of a domain to measure again under each mask; 0 measures no price.
        with_weights: read all weights once, for the criterion aimer.
        encodings: of `extractor.encoding.names.MADE`, to measure on as many tokens as the price, or all if that is 0.
    """

    text: TextOptions = field(default_factory=TextOptions)
    price_tokens: int = 16384
    with_weights: bool = True
    encodings: tuple[ExpertsDtype, ...] = ()


def calibrate(
    model: SelectiveModel,
    domains: Sequence[Domain],
    options: CalibrationOptions,
    resume_at: Path | None = None,
    notify: Progress = lambda doing, done, total: None,
    encoded: OpenEncoded | None = None,
) -> ExpertStatistics:
    """Statistics of `domains`.

    Args:
        model: whose experts are observed meanwhile.
        encoded: opens the same model with all experts in an encoding, for those of the options.
        resume_at: folder of the journal. The run continues if it holds the same work; it is removed at the end.
        notify: called after each batch.

    Raises:
        TextsError: texts that cannot be read.
        StatisticsError: a journal that cannot be continued.
        StoreError: experts that cannot be read.
    """
    journal = _Journal.open(resume_at, model, domains, options)
    statistics = journal.statistics
    with observed(model) as observer:
        observer.channels = statistics.channels = statistics.channels or ChannelSquares(
            statistics.num_layers, statistics.num_experts
        )
        for domain in domains:
            sequences = token_sequences(model, domain, options.text)
            left = [at for at in range(len(sequences)) if (domain.name, at) not in journal.done]
            for batch in batches(model, [sequences[at] for at in left]):
                output = run_batch(model, batch)
                outputs = observer.take()
                assert outputs is not None, "every layer's experts ran"
                for at, tokens in enumerate(batch):
                    own = outputs.select(range(at * len(tokens), (at + 1) * len(tokens)))
                    add_sequence(statistics, domain.name, sequence_key(tokens), output.record_of(at), own)
                    journal.done.add((domain.name, left.pop(0)))
                journal.save_if_due()
                notify(f"running {domain.name}", len(sequences) - len(left), len(sequences))
    if options.with_weights:
        notify("reading weights", 0, None)
        statistics.weight_flatness = weight_flatness(model.store)
    if options.price_tokens:
        for domain in domains:
            if not any(point.domain == domain.name for point in statistics.price):
                notify(f"pricing {domain.name}", 0, None)
                statistics.price += measure_price(model, statistics, domain.name, _priced(model, domain, options))
                journal.save()
    measured = {point.experts_dtype for point in statistics.encodings}
    if unmeasured := [name for name in options.encodings if name not in measured]:
        texts = {domain.name: _priced(model, domain, options) for domain in domains}
        whole = {name: evaluate_text(model, sequences) for name, sequences in texts.items()}
        for encoding in unmeasured:
            notify(f"measuring {encoding}", 0, None)
            assert encoded is not None, "the options ask for encodings"
            with encoded(encoding) as other:
                statistics.encodings += _measure_encoding(other, encoding, texts, whole)
            journal.save()
    journal.remove()
    return statistics


def _priced(model: SelectiveModel, domain: Domain, options: CalibrationOptions) -> Sequence[Tokens]:
    """The first sequences of a domain, on which masks and encodings are measured; all if there is no price."""
    sequences = token_sequences(model, domain, options.text)
    return sequences[: max(1, options.price_tokens // options.text.context)] if options.price_tokens else sequences


def _measure_encoding(
    other: SelectiveModel, name: str, texts: Mapping[str, Sequence[Tokens]], whole: Mapping[str, TextResult]
) -> list[EncodingPoint]:
    """The cost of the experts of `other` on each domain's text, beside the results of the experts as calibrated."""
    expert_bytes = max(deep.bytes for deep in other.store.manifest.deep_experts)
    return [
        EncodingPoint(
            domain, name, expert_bytes, evaluate_text(other, sequences).loss - whole[domain].loss,
            whole[domain].num_tokens,
        )
        for domain, sequences in texts.items()
    ]  # fmt: skip


@contextmanager
def observed(model: SelectiveModel) -> Iterator[OutputObserver]:
    """Observe the outputs of the model's experts while the context is open."""
    observer = observe_outputs(model.model, model.num_layers)
    assert observer is not None, "calibration runs models of the host-driven path, whose experts can be observed"
    observer.is_on = True
    try:
        yield observer
    finally:
        observer.is_on = False
        observer.channels = None


class _Journal:
    """The sequences that are done, saved now and then: a statistics file, and a JSON file that names it.

    The JSON file is the commit point. `folder` None keeps nothing on disk.
    """

    def __init__(self, folder: Path | None, work: dict[str, Any], statistics: ExpertStatistics) -> None:
        self.folder, self.work, self.statistics = folder, work, statistics
        self.done: set[tuple[str, int]] = set()
        self._saved_at = time.monotonic()
        self._number = 0

    @classmethod
    def open(
        cls, folder: Path | None, model: SelectiveModel, domains: Sequence[Domain], options: CalibrationOptions
    ) -> _Journal:
        """Continue in `folder` if it holds the same work, else start anew."""
        statistics = empty_statistics(model.store.manifest)
        texts = [] if folder is None else [[domain.name, texts_key(domain)] for domain in domains]
        work = {"fingerprint": statistics.fingerprint, "texts": texts, "options": asdict(options)}
        journal = cls(folder, work, statistics)
        if folder is None or not (folder / "resume.json").exists():
            return journal
        try:
            saved = json.loads((folder / "resume.json").read_bytes())
            if saved["work"] == json.loads(json.dumps(work)):
                journal.statistics = read_statistics(folder / Path(saved["statistics"]).name)
                journal.done = {(str(name), int(number)) for name, number in saved["done"]}
                journal._number = int(saved["number"])
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise StatisticsError(
                f"{folder} holds an interrupted calibration that cannot be continued ({error}): delete it to start anew"
            ) from error
        return journal

    def save_if_due(self) -> None:
        """Save if the last time is more than `SAVE_SECONDS` ago. Raises OSError."""
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
        """Delete the saved files, at the end."""
        if self.folder is not None and self.folder.is_dir():
            for file in (*self.folder.glob("statistics-*"), *self.folder.glob("resume.json*")):
                file.unlink()
            self.folder.rmdir()
