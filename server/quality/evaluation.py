"""Evaluation: measures texts, questions, criteria over kept shares and the price, and fills one report.

Invariant: figures are compared only on the same tokens of the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_store.adapter import made_for
from expert_store.errors import AdapterError
from extractor.planning.plan import read_plan
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask
from server.masks.masking import FixedMasking
from server.masks.pricing import load_statistics
from server.masks.profiles import mask_of_plan
from server.model.host.assembly import HostModel
from server.model.host.runner import HostRunner
from server.quality.batches import Progress, token_sequences
from server.quality.comparison import Comparison
from server.quality.efficiency_metrics import Parameters, configuration_entropy
from server.quality.price import PriceCheck, check_price
from server.quality.questions import read_questions, share_answered
from server.quality.report import Report
from server.quality.text_loss import evaluate_text
from server.quality.texts import Domain, TextOptions

MAX_QUESTION_TOKENS = 4096
QUESTION_ROWS = 16


@dataclass(frozen=True)
class EvaluationRequest:
    """The work of one evaluation; see the options of `deepfew evaluate`. `adapter` is as in a request to the engine."""

    domains: Sequence[Domain]
    questions: Sequence[Path]
    text: TextOptions
    plan: Path | None = None
    statistics: Path | None = None
    shares: Sequence[float] = ()
    criteria: Sequence[str] = ()
    seeds: Sequence[int] = ()
    prefix: str = ""
    adapter: str = "auto"


def evaluate(model: HostModel, whole: HostModel | None, request: EvaluationRequest, notify: Progress) -> Report:
    """Measure everything that is requested.

    Args:
        whole: the reference; None takes `model` itself if it has all experts.
        notify: called before each step.

    Raises:
        TextsError: texts or questions that cannot be read.
        StatisticsError: statistics of another checkpoint.
        SelectionError, ProfileError: a plan that cannot be read, or of another shape.
        StoreError: experts that cannot be read.
    """
    manifest = model.store.manifest
    report = Report(manifest.model.num_experts)
    statistics = load_statistics(request.statistics, manifest)
    price = None if statistics is None else Price.of(statistics.price)
    mask: ExpertMask | None = None
    if request.plan is not None:
        plan = read_plan(request.plan)
        mask = mask_of_plan(plan, manifest.model.num_layers, manifest.model.num_experts) & model.routing.mask
    if whole is None and (mask is not None or statistics is not None) and model.routing.mask.is_full:
        whole = model
    adapter = report.adapter = _adapter(model, request, mask)
    if adapter is not None:
        price = Price.from_json(model.adapters[adapter].price) if model.adapters[adapter].price else None
    texts = {domain.name: token_sequences(model, domain, request.text) for domain in request.domains}
    for number, (name, tokens) in enumerate(texts.items()):
        notify(f"reading {name}", number, len(texts))
        report.texts[name] = evaluate_text(model, tokens, mask, adapter)
        if whole is not None:
            report.reference[name] = evaluate_text(whole, tokens)
        if price is not None:
            report.expected[name] = price.expected_loss(report.texts[name].deficit, name).nats
    _ask(report, model, request, mask, adapter, notify)
    if statistics is not None:
        comparison = Comparison(model, texts, report.reference)
        served_mask = mask or model.routing.mask
        if report.reference and not served_mask.is_full and adapter is None:
            served = comparison.relate("served", round(float(served_mask.num_allowed.mean())), report.texts)
            report.price = check_price(statistics, [served], report.reference)
        report.entropy = [float(value) for value in configuration_entropy(statistics.total("picks"))]
        _compare(report, comparison, statistics, request, notify)
    return report


def _adapter(model: HostModel, request: EvaluationRequest, mask: ExpertMask | None) -> str | None:
    """The adapter that the masked text has. Raises AdapterError: the store has none of the name that is asked for."""
    used = mask or model.routing.mask
    if request.adapter == "none" or (used.is_full and request.adapter == "auto"):
        return None
    if request.adapter == "auto":
        return made_for(model.adapters, used.allowed)
    if request.adapter not in model.adapters or used.is_full:
        have = ", ".join(sorted(model.adapters)) or "none"
        reason = "no mask is measured, give --plan" if used.is_full else f"this store has {have}"
        raise AdapterError(f"adapter {request.adapter!r} cannot be measured: {reason}")
    return request.adapter


def _ask(
    report: Report,
    model: HostModel,
    request: EvaluationRequest,
    mask: ExpertMask | None,
    adapter: str | None,
    notify: Progress,
) -> None:
    runner = HostRunner(model, max_rows=QUESTION_ROWS, max_tokens=min(model.context_tokens, MAX_QUESTION_TOKENS))
    make_masking = None if mask is None else lambda num_prompt_tokens: FixedMasking(mask)
    for path in request.questions:
        found = read_questions(path)
        notify(f"asking {found.name}", 0, None)
        accuracy = share_answered(runner, found.questions, make_masking, request.prefix, adapter)
        metrics = Parameters.of(model, mask).efficiency(accuracy, found.chance)
        head = {"name": found.name, "num_questions": len(found.questions), "prefix": request.prefix}
        report.questions.append({**head, **metrics})


def _compare(
    report: Report,
    comparison: Comparison,
    statistics: ExpertStatistics,
    request: EvaluationRequest,
    notify: Progress,
) -> None:
    if not comparison.texts or not comparison.model.routing.mask.is_full:
        lack = "no --texts were given" if not comparison.texts else "this store holds only a part of the experts"
        remedy = "give some" if not comparison.texts else "name the checkpoint, or a store of all of it"
        report.not_compared = f"criteria were not compared at {len(request.shares)} sizes, as {lack}: {remedy}"
        return
    statistics.indices(list(comparison.texts))
    counts = [max(1, round(share * statistics.num_experts)) for share in request.shares]
    report.compared = comparison.compare_criteria(
        statistics, request.criteria, counts, request.seeds, lambda text: notify(text, 0, None)
    )
    chosen = [mask for mask in report.compared if mask.name in request.criteria]
    check = check_price(statistics, chosen, report.reference)
    report.price = PriceCheck.of([*check.points, *(report.price.points if report.price is not None else ())])
