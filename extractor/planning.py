"""Plans: which experts a store should have, decided from calibration, and what they are expected to serve.

A plan chooses freely in every layer and forms its deep experts from what it chose, so nothing is lost by every shard
being all layers deep. Invariant: the same number of experts is chosen in every layer, and each is in exactly one deep
expert. The other alignments fix the columns first and choose whole columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.alignment import (
    Columns,
    chain_alignment,
    check_columns,
    column_mass,
    coverage_alignment,
    index_alignment,
    profile_alignment,
    rank_alignment,
    restarted_coverage_alignment,
    tiered_alignment,
)
from extractor.criteria import DEFAULT_CRITERION, normalised, ranking, score
from extractor.errors import SelectionError
from extractor.plan import Plan, PlannedExpert
from extractor.planning_expectation import Expectation, expect
from extractor.price import Price
from extractor.statistics import ExpertStatistics

Float = npt.NDArray[np.float64]

ALIGNMENTS = ("free", "index", "rank", "chain", "profile", "tiers", "coverage")
"""How deep experts are formed; "free" chooses per layer first."""
MAX_GROUP_WINDOWS = 512
NUM_STARTS, MANY_EXPERTS = 8, 160
"""Starts of the coverage alignment, where a layer has no more experts than that; else one."""


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is for.

    Attributes:
        count: deep experts to choose.
        criterion, seed: see `extractor.criteria.score`.
        alignment: one of `ALIGNMENTS`.
        domains: that the plan serves; None is all of the statistics.
        quotas: domain → share of the places that is chosen for it alone; what is left is chosen for all together.
        usage: demanded mass [L, E] of a served model, added as a domain of its own.
    """

    count: int
    criterion: str = DEFAULT_CRITERION
    alignment: str = "free"
    domains: tuple[str, ...] | None = None
    quotas: Mapping[str, float] = field(default_factory=dict)
    usage: Float | None = None
    seed: int = 0


def make_plan(statistics: ExpertStatistics, request: PlanRequest) -> Plan:
    """Choose deep experts, best first.

    Raises:
        SelectionError: a count, alignment or quota that cannot be.
        CriterionError, StatisticsError: see there.
    """
    _check(statistics, request)
    names = list(request.domains or statistics.domains)
    scores = {name: normalised(score(statistics, request.criterion, [name], seed=request.seed)) for name in names}
    if request.usage is not None:
        scores["usage"] = normalised(np.asarray(request.usage, dtype=np.float64))
    together: Float = np.mean(list(scores.values()), axis=0)
    if request.alignment == "free":
        chosen = choose_per_layer(scores, together, request.quotas, request.count)
        columns = form_columns(statistics, chosen, together, names)
    else:
        aligned = align(statistics, request.alignment, together, names)
        columns = _choose_columns(aligned, scores, together, request.quotas, request.count)
    check_columns(columns, statistics.num_layers, statistics.num_experts)
    value = column_mass(columns, together) / statistics.num_layers
    order = np.argsort(-value, kind="stable")
    expectations = expect(statistics, allowed_by(columns, statistics.num_experts), names)
    return Plan(
        num_layers=statistics.num_layers,
        num_experts=statistics.num_experts,
        alignment=_alignment(statistics, request, names, expectations),
        deep_experts=tuple(
            PlannedExpert(tuple(int(expert) for expert in columns[at]), round(float(value[at]), 6)) for at in order
        ),
        extra=_description(statistics, request, expectations),
    )


def choose_per_layer(
    scores: Mapping[str, Float], together: Float, quotas: Mapping[str, float], count: int
) -> npt.NDArray[np.bool_]:
    """Which experts to take, bool [L, E] with `count` in every layer.

    Domains with a quota take turns, each its best expert that is not taken yet, until the quotas are used up; the rest
    are the best for all domains together.
    """
    num_layers, num_experts = together.shape
    chosen = np.zeros((num_layers, num_experts), dtype=np.bool_)
    turns = _turns(quotas, count)
    ranked = {name: ranking(scores[name]) for name in set(turns) if name is not None}
    ranked_together = ranking(together)
    for layer in range(num_layers):
        for name in turns:
            order = ranked_together[layer] if name is None else ranked[name][layer]
            chosen[layer, next(expert for expert in order if not chosen[layer, expert])] = True
    return chosen


def form_columns(
    statistics: ExpertStatistics, chosen: npt.NDArray[np.bool_], together: Float, domains: Sequence[str]
) -> Columns:
    """Deep experts, int64 [C, L], of every chosen expert [L, E]: those that serve the same text stand together."""
    count = int(chosen.sum(axis=1)[0])
    ranked = ranking(np.where(chosen, together, -np.inf))[:, :count]
    groups, weights = _groups(statistics, domains)
    columns = np.ascontiguousarray(ranked.T)
    if len(groups) == 0 or count == 1:
        return columns
    return coverage_alignment(profile_alignment(columns, groups), groups, weights)


def align(statistics: ExpertStatistics, kind: str, saliency: Float, domains: Sequence[str]) -> Columns:
    """Columns of all experts, int64 [E, L], by one of `ALIGNMENTS` other than "free"; saliency [L, E].

    Raises:
        SelectionError: the kind does not exist, or needs windows that the statistics do not have.
    """
    if kind == "index":
        return index_alignment(*saliency.shape)
    if kind == "rank":
        return rank_alignment(saliency)
    if kind == "chain":
        return chain_alignment(saliency, statistics.coactivation)
    sample = statistics.windows
    windows = sample.arrays["mass"][sample.of(statistics.indices(domains))].astype(np.float64)
    if len(windows) == 0:
        raise SelectionError(
            f"alignment {kind} needs windows of text, the statistics have none: calibrate on more text"
        )
    if kind == "profile":
        return profile_alignment(rank_alignment(saliency), windows)
    if kind == "tiers":
        return tiered_alignment(saliency, windows)
    if kind == "coverage":
        groups, weights = _groups(statistics, domains)
        num_starts = NUM_STARTS if statistics.num_experts <= MANY_EXPERTS else 1
        return restarted_coverage_alignment(saliency, windows, groups, weights, num_starts)
    raise SelectionError(f"alignment {kind!r} does not exist: take one of {', '.join(ALIGNMENTS)}")


def best_columns(columns: Columns, mass: Float, count: int) -> Columns:
    """The `count` columns with the most of mass [L, E], best first."""
    return columns[np.argsort(-column_mass(columns, mass), kind="stable")[:count]]


def count_for(statistics: ExpertStatistics, count: int | None, keep: float | None, budget_bytes: int | None) -> int:
    """How many deep experts were asked for: by number, share, or bytes of the whole store.

    Raises:
        SelectionError: none or several were given, or the number is outside 1 to E.
    """
    if sum(value is not None for value in (count, keep, budget_bytes)) != 1:
        raise SelectionError("give exactly one of --count, --keep and --budget")
    if keep is not None:
        count = int(keep * statistics.num_experts + 1e-9)
    elif budget_bytes is not None:
        if statistics.expert_bytes < 1:
            raise SelectionError("the statistics do not say how large an expert is: use --count or --keep")
        count = min((budget_bytes - statistics.trunk_bytes) // statistics.expert_bytes, statistics.num_experts)
    assert count is not None
    if not 1 <= count <= statistics.num_experts:
        raise SelectionError(f"that is {count} deep experts, wanted 1 to {statistics.num_experts}")
    return count


def _turns(quotas: Mapping[str, float], count: int) -> list[str | None]:
    """Whose turn each place is, `None` for all domains together, spread evenly."""
    left = {name: int(share * count + 1e-9) for name, share in quotas.items()}
    given = dict.fromkeys(left, 0)
    turns: list[str | None] = []
    while open_ := [name for name in left if given[name] < left[name]]:
        name = min(open_, key=lambda name: given[name] / left[name])
        given[name] += 1
        turns.append(name)
    return turns + [None] * (count - len(turns))


def _choose_columns(
    columns: Columns, scores: Mapping[str, Float], together: Float, quotas: Mapping[str, float], count: int
) -> Columns:
    order = {name: np.argsort(-column_mass(columns, own), kind="stable") for name, own in scores.items()}
    order_together = np.argsort(-column_mass(columns, together), kind="stable")
    taken: list[int] = []
    for name in _turns(quotas, count):
        candidates = order_together if name is None else order[name]
        taken.append(next(int(column) for column in candidates if column not in taken))
    return columns[taken]


def _groups(statistics: ExpertStatistics, domains: Sequence[str]) -> tuple[Float, Float]:
    """Groups of text that columns should suit, mass [G, L, E], and weights [G].

    Each domain weighs 1. The windows stand for kinds that have no name: together they weigh the more the fewer have one
    (8 ÷ D), and all of the text a quarter of that.
    """
    shares = np.stack([statistics.demand_shares(name) for name in domains])
    sample = statistics.windows
    chosen = np.flatnonzero(sample.of(statistics.indices(domains)))
    chosen = chosen[:: max(1, math.ceil(len(chosen) / MAX_GROUP_WINDOWS))]
    windows = sample.arrays["mass"][chosen].astype(np.float64)
    groups = [shares, windows, shares.mean(axis=0, keepdims=True)]
    unnamed = 8 / len(shares)
    weights = [
        np.full(len(shares), 1.0),
        np.full(len(windows), unnamed / max(len(windows), 1)),
        np.array([unnamed / 4]),
    ]
    return np.concatenate(groups), np.concatenate(weights)


def _check(statistics: ExpertStatistics, request: PlanRequest) -> None:
    names = request.domains or tuple(statistics.domains)
    statistics.indices(names)
    if not names:
        raise SelectionError("the statistics have no domain: calibrate on some text first")
    if not 1 <= request.count <= statistics.num_experts:
        raise SelectionError(f"a plan for {request.count} deep experts, wanted 1 to {statistics.num_experts}")
    if request.alignment not in ALIGNMENTS:
        raise SelectionError(f"alignment {request.alignment!r} does not exist: take one of {', '.join(ALIGNMENTS)}")
    for name, share in request.quotas.items():
        if name not in names:
            raise SelectionError(f"the quota of {name!r} is for no domain of the plan, which has: {', '.join(names)}")
        if not 0 <= share <= 1:
            raise SelectionError(f"the quota of {name!r} is {share}, wanted a share from 0 to 1")
    if sum(request.quotas.values()) > 1 + 1e-9:
        raise SelectionError(f"the quotas add up to {sum(request.quotas.values()):.3g}, wanted at most 1")
    if request.usage is not None and request.usage.shape != (statistics.num_layers, statistics.num_experts):
        raise SelectionError(
            f"the usage has shape {request.usage.shape}, the statistics {statistics.num_layers} layers of "
            f"{statistics.num_experts} experts: give usage of the same checkpoint"
        )


def allowed_by(columns: Columns, num_experts: int) -> npt.NDArray[np.bool_]:
    """The experts that deep experts [C, L] consist of, bool [L, E]."""
    allowed = np.zeros((columns.shape[1], num_experts), dtype=np.bool_)
    allowed[np.arange(columns.shape[1])[None, :], columns] = True
    return allowed


def _alignment(
    statistics: ExpertStatistics, request: PlanRequest, domains: Sequence[str], expectations: Sequence[Expectation]
) -> dict[str, Any]:
    """The kind, and what a store keeps of its plan so that its server knows what it costs to do without the others."""
    price = Price.of([point for point in statistics.price if point.domain in domains])
    kept = {"num_planned": request.count, "expected": [one.to_json() for one in expectations]}
    return {"kind": request.alignment} | kept | ({} if price is None else {"price": price.to_json()})


def _description(
    statistics: ExpertStatistics, request: PlanRequest, expectations: Sequence[Expectation]
) -> dict[str, Any]:
    return {
        "fingerprint": statistics.fingerprint,
        "criterion": request.criterion,
        "quotas": dict(request.quotas),
        "expected": [one.to_json() for one in expectations],
    }
