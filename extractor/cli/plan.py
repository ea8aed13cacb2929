"""The command `plan`, as a function that a typer application mounts.

Invariant: standard output carries the result alone, as text or, with --json, as one JSON object; an ExtractError,
StoreError, RouterError or OSError is raised, for the application to print. A plan that is expected to cost a lot is
warned of on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from extractor.cli.options import BudgetOption, CountOption, JsonOption, KeepOption
from extractor.errors import SelectionError
from extractor.planning.budget import Alternative, plans_within
from extractor.planning.criteria import CRITERIA, DEFAULT_CRITERION, normalised, score
from extractor.planning.expectation import Expectation, cost_warning
from extractor.planning.forming import ALIGNMENTS
from extractor.planning.plan import Plan, write_plan
from extractor.planning.planner import PlanRequest, count_for, make_plan
from extractor.planning.plots import require_picture
from extractor.planning.sizes import format_size
from extractor.statistics.file import read_statistics
from extractor.statistics.price import WARN_PERPLEXITY_RATIO, Price
from extractor.statistics.statistics import ExpertStatistics, merge_all
from extractor.writing.disk import require_writable
from router.ledger import UsageLedger

CriterionOption = Annotated[
    str, typer.Option(metavar="CRITERION", help=f"Criterion that scores experts: {', '.join(CRITERIA)}.")
]
AlignmentOption = Annotated[
    str,
    typer.Option(
        metavar="ALIGNMENT",
        help=f"Way to form deep experts: {', '.join(ALIGNMENTS)}. free chooses per layer first.",
    ),
]
DomainsOption = Annotated[
    str | None, typer.Option(metavar="DOMAINS", help="Domains to serve, such as code,chat; all by default.")
]
QuotaOption = Annotated[
    list[str] | None,
    typer.Option(metavar="DOMAIN=SHARE", help="Share of the places chosen for one domain alone, such as code=0.5."),
]
WarnOption = Annotated[
    float,
    typer.Option(metavar="N", min=1.0, help="Warn of domains whose perplexity is expected to grow by more than this."),
]
StatsOption = Annotated[
    list[Path], typer.Option(metavar="FILE", help="Statistics from `deepfew calibrate`; several are added up.")
]
UsageOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="usage.json of a server, as a domain of its own.")
]


def plan(
    stats: StatsOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Plan file to write, for `deepfew extract --plan`.")] = Path(
        "plan.json"
    ),
    usage: UsageOption = None,
    count: CountOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = None,
    criterion: CriterionOption = DEFAULT_CRITERION,
    alignment: AlignmentOption = "free",
    domains: DomainsOption = None,
    quota: QuotaOption = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the criterion random.")] = 0,
    warn_perplexity_ratio: WarnOption = WARN_PERPLEXITY_RATIO,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Picture to draw (png, svg or pdf).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose which experts a store should have, from calibration statistics, and say what they will serve.

    With --budget it also chooses the encoding of the experts, if calibration measured some (--encodings).
    """
    require_writable(out, "--out")
    if plot is not None:
        require_picture(plot)
        require_writable(plot, "--plot")
    statistics = merge_all(read_statistics(path) for path in stats)
    request = PlanRequest(
        count=1,
        criterion=criterion,
        alignment=alignment,
        domains=None if domains is None else tuple(name.strip() for name in domains.split(",")),
        quotas=dict(_quota(text) for text in quota or ()),
        usage=None if usage is None else UsageLedger.load(usage).demand_mass,
        seed=seed,
    )
    alternatives: list[Alternative] = []
    if budget is not None and count is None and keep is None:
        alternatives = plans_within(statistics, request, budget)
        made = alternatives[0].plan
        made = replace(made, extra=made.extra | {"alternatives": [one.to_json() for one in alternatives]})
    else:
        made = make_plan(statistics, replace(request, count=count_for(statistics, count, keep, budget)))
    write_plan(out, made)
    if plot is not None:
        _draw(plot, statistics, made, request)
    if as_json:
        print(json.dumps({"plan": str(out), "num_deep_experts": len(made.deep_experts), **made.extra}))
    else:
        print(_text(out, statistics, made, alternatives))
    if alternatives and not statistics.encodings and len(made.deep_experts) < made.num_experts:
        print(
            "NOTE: experts as calibrated; `deepfew calibrate --encodings int4,int8` measures whether more of them in "
            "fewer bits are better",
            file=sys.stderr,
        )
    for warning in plan_warnings(made, warn_perplexity_ratio):
        print(f"WARNING: {warning}", file=sys.stderr)


def expectations(made: Plan) -> list[Expectation]:
    """The expectations that a plan file records; an empty list if it records none."""
    return [Expectation.from_json(item) for item in made.extra.get("expected", ())]


def plan_warnings(made: Plan, warn_ratio: float = WARN_PERPLEXITY_RATIO) -> list[str]:
    """The warnings that a user needs before serving from this plan."""
    expected = expectations(made)
    if expected and all(one.loss_change is None for one in expected):
        return ["what this plan costs is unknown: calibrate with --price to measure it"]
    warning = cost_warning(expected, warn_ratio, "this plan")
    return [] if warning is None else [warning]


def _draw(path: Path, statistics: ExpertStatistics, made: Plan, request: PlanRequest) -> None:
    from extractor.planning.plots import draw_plan  # matplotlib is slow to import and only pictures need it

    names = list(request.domains or statistics.domains)
    scores = np.mean(
        [normalised(score(statistics, request.criterion, [name], seed=request.seed)) for name in names], axis=0
    )
    draw_plan(path, statistics, made, scores, names)


def _quota(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name.strip(), float(share)
    except ValueError:
        raise SelectionError(f"--quota {text!r}: wanted a domain and a share, such as code=0.5") from None


def _text(out: Path, statistics: ExpertStatistics, made: Plan, alternatives: Sequence[Alternative]) -> str:
    size = ""
    if made.experts_dtype is not None:
        size = f" in {made.experts_dtype}, a store of {format_size(alternatives[0].num_bytes)}"
    elif statistics.expert_bytes:
        size = f", {format_size(len(made.deep_experts) * statistics.expert_bytes)} of experts"
    head = (
        f"{out}: {len(made.deep_experts)} of {made.num_experts} deep experts of {made.num_layers} layers{size}, "
        f"chosen by {made.extra['criterion']}, alignment {made.alignment['kind']}"
    )
    table: list[str] = []
    if len(alternatives) > 1:
        table = ["  within the budget, the first is chosen:", *(f"    {one.describe()}" for one in alternatives)]
    return "\n".join([head, *(f"  {one.describe()}" for one in expectations(made)), *_fit_line(made), *table])


def _fit_line(made: Plan) -> list[str]:
    """One line about the accuracy of the expected losses; empty if the plan has no fit."""
    fit = Price.from_json(made.alignment["price"]).fit if "price" in made.alignment else None
    if fit is None:
        return []
    if fit.r_squared < 0:  # where losses hardly differ from mask to mask, their spread explains nothing
        return [
            f"  expected losses are off by {fit.mean_error:.3f} nats on unseen text, more than losses differ by mask"
        ]
    return [f"  expected losses predict unseen text with R² {fit.r_squared:.3f}, mean error {fit.mean_error:.3f} nats"]
