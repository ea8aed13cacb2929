"""Plans: the experts that a store should have, chosen by calibration, and the demand that they are expected to serve.

The alignment "free" chooses the best experts of every layer and forms deep experts from them, so whole deep experts
cost no quality. The other alignments form deep experts first and choose among those. Invariant: the same number of
experts is chosen in every layer, and each is in exactly one deep expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.encoding.names import ExpertsDtype
from extractor.errors import SelectionError
from extractor.planning.alignment import DeepExperts, check_deep_experts, deep_expert_mass
from extractor.planning.criteria import DEFAULT_CRITERION, normalised, ranking, score
from extractor.planning.expectation import Expectation, expect
from extractor.planning.forming import ALIGNMENTS, align, form_deep_experts, ranked_deep_experts
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.selection import count_within
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlanRequest:
    """The parameters of a plan.

    Attributes:
        count: deep experts to choose.
        criterion, seed: see `extractor.planning.criteria.score`.
        alignment: one of `ALIGNMENTS`.
        domains: domains that the plan serves; None is all domains of the statistics.
        quotas: domain → share of the deep experts that is chosen for it alone; the rest is chosen for all domains.
        usage: demanded mass [L, E] of a served model, added as a domain of its own.
        experts_dtype: encoding of the experts, measured in every domain; None is as calibrated.
    """

    count: int
    criterion: str = DEFAULT_CRITERION
    alignment: str = "free"
    domains: tuple[str, ...] | None = None
    quotas: Mapping[str, float] = field(default_factory=dict)
    usage: Float | None = None
    seed: int = 0
    experts_dtype: ExpertsDtype | None = None


def make_plan(statistics: ExpertStatistics, request: PlanRequest) -> Plan:
    """Choose deep experts, best first.

    Raises:
        SelectionError: the count, alignment or quota is not possible.
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
        deep_experts = form_deep_experts(statistics, chosen, together, names)
    else:
        aligned = align(statistics, request.alignment, together, names)
        orders = {name: _order(statistics, request, aligned, own, [name]) for name, own in scores.items()}
        order_together = _order(statistics, request, aligned, together, names)
        deep_experts = aligned[_choose_deep_experts(orders, order_together, request.quotas, request.count)]
    check_deep_experts(deep_experts, statistics.num_layers, statistics.num_experts)
    value = deep_expert_mass(deep_experts, together) / statistics.num_layers
    order = np.argsort(-value, kind="stable")
    expectations = expect(statistics, allowed_by(deep_experts, statistics.num_experts), names)
    if request.experts_dtype is not None:
        costs = encoding_costs(statistics, request.experts_dtype)
        expectations = [one.in_encoding(costs[one.domain]) for one in expectations]
    return Plan(
        num_layers=statistics.num_layers,
        num_experts=statistics.num_experts,
        alignment=_alignment(statistics, request, names, expectations),
        deep_experts=tuple(
            PlannedExpert(tuple(int(expert) for expert in deep_experts[at]), round(float(value[at]), 6)) for at in order
        ),
        extra=_description(statistics, request, expectations),
    )


def choose_per_layer(
    scores: Mapping[str, Float], together: Float, quotas: Mapping[str, float], count: int
) -> npt.NDArray[np.bool_]:
    """The chosen experts, bool [L, E] with `count` in every layer.

    The domains with a quota choose in turn, each time their best remaining expert, until the quotas are used up. The
    rest are the best experts for all domains together.
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


def count_for(
    statistics: ExpertStatistics,
    count: int | None,
    keep: float | None,
    budget_bytes: int | None,
    expert_bytes: int | None = None,
) -> int:
    """The number of deep experts within a limit: a number, a share, or bytes of the whole store.

    `expert_bytes` is the size of a deep expert, by default as calibrated.

    Raises:
        SelectionError: no limit was given, or see `count_within`.
    """
    if (count, keep, budget_bytes) == (None, None, None):
        raise SelectionError("give exactly one of --count, --keep and --budget")
    size = expert_bytes or statistics.expert_bytes
    if budget_bytes is not None and size < 1:
        raise SelectionError("the statistics do not say how large an expert is: use --count or --keep")
    return count_within(
        count,
        keep,
        budget_bytes,
        num_experts=statistics.num_experts,
        most=statistics.num_experts,
        store_bytes=lambda number: statistics.trunk_bytes + number * size,
    )


def encoding_costs(statistics: ExpertStatistics, experts_dtype: str) -> dict[str, float]:
    """The measured change of loss by domain, nats a token, of all experts in an encoding."""
    own = [point for point in statistics.encodings if point.experts_dtype == experts_dtype]
    tokens: dict[str, int] = {}
    nats: dict[str, float] = {}
    for point in own:
        tokens[point.domain] = tokens.get(point.domain, 0) + point.num_tokens
        nats[point.domain] = nats.get(point.domain, 0.0) + point.num_tokens * point.loss_change
    return {name: nats[name] / tokens[name] for name in nats}


def _turns(quotas: Mapping[str, float], count: int) -> list[str | None]:
    """The domain that chooses at each turn, spread evenly; `None`, at the end, is all domains together."""
    left = {name: int(share * count + 1e-9) for name, share in quotas.items()}
    given = dict.fromkeys(left, 0)
    turns: list[str | None] = []
    while open_ := [name for name in left if given[name] < left[name]]:
        name = min(open_, key=lambda name: given[name] / left[name])
        given[name] += 1
        turns.append(name)
    return turns + [None] * (count - len(turns))


def _order(
    statistics: ExpertStatistics, request: PlanRequest, deep_experts: DeepExperts, scores: Float, domains: Sequence[str]
) -> npt.NDArray[np.int64]:
    """The order of the deep experts, best first, [C]: by `coverage` of whole deep experts, else by summed scores."""
    if request.criterion == "coverage" and set(domains) <= set(statistics.domains) and request.usage is None:
        return ranked_deep_experts(statistics, deep_experts, domains)
    return np.argsort(-deep_expert_mass(deep_experts, scores), kind="stable")


def _choose_deep_experts(
    orders: Mapping[str, npt.NDArray[np.int64]],
    order_together: npt.NDArray[np.int64],
    quotas: Mapping[str, float],
    count: int,
) -> list[int]:
    taken: list[int] = []
    for name in _turns(quotas, count):
        candidates = order_together if name is None else orders[name]
        taken.append(next(int(deep_expert) for deep_expert in candidates if deep_expert not in taken))
    return taken


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


def allowed_by(deep_experts: DeepExperts, num_experts: int) -> npt.NDArray[np.bool_]:
    """The experts that deep experts [C, L] consist of, bool [L, E]."""
    allowed = np.zeros((deep_experts.shape[1], num_experts), dtype=np.bool_)
    allowed[np.arange(deep_experts.shape[1])[None, :], deep_experts] = True
    return allowed


def _alignment(
    statistics: ExpertStatistics, request: PlanRequest, domains: Sequence[str], expectations: Sequence[Expectation]
) -> dict[str, Any]:
    """The alignment's kind, and the price, which a store keeps so that its server knows the cost of its mask."""
    price = Price.of([point for point in statistics.price if point.domain in domains])
    kept = {"num_planned": request.count, "expected": [one.to_json() for one in expectations]}
    return {"kind": request.alignment} | kept | ({} if price is None else {"price": price.to_json()})


def _description(
    statistics: ExpertStatistics, request: PlanRequest, expectations: Sequence[Expectation]
) -> dict[str, Any]:
    chosen = {} if request.experts_dtype is None else {"experts_dtype": request.experts_dtype}
    return chosen | {
        "fingerprint": statistics.fingerprint,
        "criterion": request.criterion,
        "quotas": dict(request.quotas),
        "expected": [one.to_json() for one in expectations],
    }
