"""Everything that `deepfew evaluate` measures, as one report: texts, questions, criteria over kept shares, the price.

Invariant: figures are compared only on the same tokens of the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extractor.planning.plan import read_plan
from extractor.statistics.file import read_statistics
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from router.mask import ExpertMask
from server.masks.profiles import mask_of_plan
from server.model.host.assembly import HostModel
from server.model.host.runner import HostRunner
from server.quality.calibrate import CalibrateOptions
from server.quality.efficiency import configuration_entropy, efficiency, parameters
from server.quality.evaluate import TextResult, evaluate_text, geometric_mean, tokenised
from server.quality.questions import answered, read_questions
from server.quality.sweep import PriceCheck, SweepResult, check_price, sweep_criteria
from server.quality.texts import Domain

Say = Callable[[str, int, int | None], None]
MAX_QUESTION_TOKENS = 4096
QUESTION_ROWS = 16
FIGURES = ("activation_ratio", "p3", "p2f", "mer", "r3", "saa")


@dataclass(frozen=True)
class Evaluation:
    """What to measure; see the options of `deepfew evaluate`."""

    domains: Sequence[Domain]
    questions: Sequence[Path]
    options: CalibrateOptions
    plan: Path | None = None
    statistics: Path | None = None
    shares: Sequence[float] = ()
    criteria: Sequence[str] = ()
    seeds: Sequence[int] = ()
    prefix: str = ""


@dataclass
class Report:
    """What was measured.

    Attributes:
        texts: of each domain; reference: the same of the whole model, empty without one.
        expected: change of loss that calibration expects at each domain's deficit.
        questions: name, accuracy, reference accuracy and efficiency metrics of each set.
        entropy: CES of each layer, from the statistics.
        sweeps: criteria over kept shares; not_compared: why there are none, where statistics were given.
        price: how well the expected loss held over them.
        num_experts: E.
    """

    num_experts: int
    texts: dict[str, TextResult] = field(default_factory=dict)
    reference: dict[str, TextResult] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    sweeps: list[SweepResult] = field(default_factory=list)
    price: PriceCheck | None = None
    not_compared: str | None = None

    def ratio(self, domain: str) -> float:
        """Perplexity ÷ the reference's."""
        return math.exp(self.texts[domain].loss - self.reference[domain].loss)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        texts: dict[str, Any] = {}
        for name, one in self.texts.items():
            texts[name] = {
                "perplexity": one.perplexity,
                "loss": one.loss,
                "num_tokens": one.num_tokens,
                "deficit": one.deficit,
                "deficit_per_layer": list(one.deficit_per_layer),
                "top1_missing": one.top1_missing,
                "expected_loss_change": self.expected.get(name),
                "ratio": self.ratio(name) if name in self.reference else None,
            }
        ratios = [self.ratio(name) for name in self.texts if name in self.reference]
        return {
            "texts": texts,
            "mean_ratio": geometric_mean(ratios) if ratios else None,
            "questions": self.questions,
            "ces": self.entropy,
            "sweeps": [sweep.to_json() for sweep in self.sweeps],
            "sweeps_left_out": self.not_compared,
            "price": None if self.price is None else self.price.to_json(),
        }

    def to_text(self) -> str:
        """As tables for a terminal."""
        lines: list[str] = []
        if self.texts:
            lines.append(f"{'text':20} {'perplexity':>10} {'ratio':>8} {'deficit':>8} {'expected':>9}")
        for name, one in self.texts.items():
            ratio = f"{self.ratio(name):8.4f}" if name in self.reference else f"{'–':>8}"
            expected = f"×{math.exp(self.expected[name]):8.4f}" if name in self.expected else f"{'–':>9}"
            lines.append(f"{name:20} {one.perplexity:10.4f} {ratio} {one.deficit:8.4f} {expected}")
        if self.reference and self.texts:
            mean = geometric_mean([self.ratio(name) for name in self.texts])
            lines.append(f"{'geometric mean':20} {'':10} {mean:8.4f}")
        for asked in self.questions:
            figures = ", ".join(f"{key} {asked[key]:.4g}" for key in FIGURES)
            lines.append(f"questions {asked['name']}: {asked['accuracy']:.1%} answered; {figures}")
        if self.entropy:
            lines.append("CES per layer: " + " ".join(f"{value:.3f}" for value in self.entropy))
        for sweep in self.sweeps:
            share = sweep.kept / self.num_experts
            lines.append(f"keep {share:6.1%} by {sweep.name:12} mean ratio {sweep.mean_ratio:.4f}")
        if self.not_compared is not None:
            lines.append(self.not_compared)
        if self.price is not None and self.price.points:
            lines.append(
                f"expected against actual loss: R² {self.price.r_squared:.3f}, "
                f"{self.price.r_squared_by_routing:.3f} where the kind of text is told by its routing alone, "
                f"{self.price.r_squared_of_unknown_kind:.3f} by nothing"
            )
        return "\n".join(lines)


def evaluate_all(model: HostModel, whole: HostModel | None, asked: Evaluation, say: Say) -> Report:
    """Measure everything that was asked for.

    Raises:
        TextsError, StatisticsError, SelectionError, ProfileError, StoreError: see there.
    """
    manifest = model.store.manifest
    report = Report(manifest.model.num_experts)
    statistics = None if asked.statistics is None else _statistics(asked.statistics, model)
    mask: ExpertMask | None = None
    if asked.plan is not None:
        plan = read_plan(asked.plan)
        mask = mask_of_plan(plan, manifest.model.num_layers, manifest.model.num_experts) & model.routing.mask
    if whole is None and (mask is not None or statistics is not None) and model.routing.mask.is_full:
        whole = model  # a whole store is its own reference
    texts = tokenised(model, asked.domains, asked.options)
    for number, (name, tokens) in enumerate(texts.items()):
        say(f"reading {name}", number, len(texts))
        report.texts[name] = evaluate_text(model, tokens, mask)
        if whole is not None:
            report.reference[name] = evaluate_text(whole, tokens)
        price = None if statistics is None else Price.of(statistics.price)
        if price is not None:
            report.expected[name] = price.expected_loss(report.texts[name].deficit, name).nats
    _ask(report, model, asked, mask, say)
    served_mask = mask or model.routing.mask
    if statistics is not None and report.reference and not served_mask.is_full:
        kept = round(float(served_mask.num_allowed.mean()))
        served = SweepResult("served", kept, report.texts, {name: report.ratio(name) for name in report.texts})
        report.price = check_price(statistics, [served], report.reference)
    if statistics is not None:
        report.entropy = [float(value) for value in configuration_entropy(statistics.total("picks"))]
        _sweep(report, model, statistics, texts, asked, say)
    return report


def _statistics(path: Path, model: HostModel) -> ExpertStatistics:
    statistics = read_statistics(path)
    fingerprint = model.store.manifest.source.fingerprint
    if statistics.fingerprint != fingerprint:
        raise StatisticsError(
            f"{path} is of checkpoint {statistics.fingerprint}, the store of {fingerprint}: calibrate on this one"
        )
    return statistics


def _ask(report: Report, model: HostModel, asked: Evaluation, mask: ExpertMask | None, say: Say) -> None:
    runner = HostRunner(model, max_rows=QUESTION_ROWS, max_tokens=min(model.context_tokens, MAX_QUESTION_TOKENS))
    for path in asked.questions:
        found = read_questions(path)
        say(f"asking {found.name}", 0, None)
        accuracy = answered(runner, found.questions, mask, prefix=asked.prefix)
        metrics = efficiency(accuracy, found.chance, parameters(model, mask)).to_json()
        head = {"name": found.name, "num_questions": len(found.questions), "prefix": asked.prefix}
        report.questions.append({**head, **metrics})


def _sweep(
    report: Report,
    model: HostModel,
    statistics: ExpertStatistics,
    texts: Mapping[str, Sequence[Sequence[int]]],
    asked: Evaluation,
    say: Say,
) -> None:
    if not texts or not model.routing.mask.is_full:
        lack = "no --texts were given" if not texts else "this store holds only a part of the experts"
        remedy = "give some" if not texts else "name the checkpoint, or a store of all of it"
        report.not_compared = f"criteria were not compared at {len(asked.shares)} sizes, as {lack}: {remedy}"
        return
    statistics.indices(list(texts))
    counts = [max(1, round(share * statistics.num_experts)) for share in asked.shares]
    report.sweeps = sweep_criteria(
        model,
        statistics,
        texts,
        report.reference,
        asked.criteria,
        counts,
        asked.seeds,
        lambda text: say(text, 0, None),
    )
    chosen = [sweep for sweep in report.sweeps if sweep.name in asked.criteria]
    check = check_price(statistics, chosen, report.reference)
    report.price = PriceCheck.of([*check.points, *(report.price.points if report.price is not None else ())])
