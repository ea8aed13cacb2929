"""Plans within a budget of bytes: how many experts, and in how many bits each.

Every encoding that calibration measured gives as many experts as fit. The losses of a mask and of an encoding nearly
add up (docs/selection.md has the figures), so the sum of both decides. Invariant: no alternative takes more than the
budget, and all experts of a plan have one encoding, because mixes by expert did not pay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from extractor.encoding.names import MADE, ExpertsDtype
from extractor.errors import SelectionError
from extractor.planning.expectation import Expectation
from extractor.planning.plan import Plan
from extractor.planning.planner import PlanRequest, count_for, encoding_costs, make_plan
from extractor.planning.sizes import format_size
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics

LEAST_DIFFERENCE = 0.002
"""Nats a token: smaller differences between mean losses say nothing."""


@dataclass(frozen=True)
class Alternative:
    """A plan within the budget, and the bytes of its store.

    Attributes:
        loss_change: mean over the plan's domains, nats a token; None if calibration measured no masks.
        is_measured: whether calibration measured masks that leave so little.
    """

    plan: Plan
    num_bytes: int
    loss_change: float | None
    is_measured: bool

    @classmethod
    def of(cls, plan: Plan, num_bytes: int) -> Alternative:
        """With the mean of what the plan expects."""
        expected = [Expectation.from_json(item) for item in plan.extra["expected"]]
        losses = [one.loss_change for one in expected if one.loss_change is not None]
        mean = sum(losses) / len(losses) if losses else None
        return cls(plan, num_bytes, mean, all(one.is_measured for one in expected))

    @property
    def name(self) -> str:
        """The encoding, or `shipped` for the experts as they were calibrated."""
        return self.plan.experts_dtype or "shipped"

    def describe(self) -> str:
        """As one line of text."""
        head = (
            f"{self.name}: {len(self.plan.deep_experts)} of {self.plan.num_experts} deep experts, "
            f"{format_size(self.num_bytes)}"
        )
        if self.loss_change is None:
            return f"{head}, cost unknown"
        return f"{head}, perplexity × {math.exp(self.loss_change):.3f}{'' if self.is_measured else ' or more'}"

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, for the plan file."""
        loss = None if self.loss_change is None else round(self.loss_change, 6)
        count = len(self.plan.deep_experts)
        return {"experts_dtype": self.name, "num_deep_experts": count, "bytes": self.num_bytes, "loss_change": loss}


def plans_within(statistics: ExpertStatistics, request: PlanRequest, budget_bytes: int) -> list[Alternative]:
    """A plan for each encoding in which experts fit, best first; the count of `request` is ignored.

    Encodings are left out if calibration did not measure them in every domain, or measured no price of masks. Raises
    SelectionError if nothing fits, and see `make_plan`.
    """
    names: list[ExpertsDtype | None] = [None]
    domains = set(request.domains or statistics.domains)
    if statistics.price:
        names += [cast("ExpertsDtype", name) for name in MADE if domains <= encoding_costs(statistics, name).keys()]
    found: list[Alternative] = []
    for name in names:
        sizes = [one.expert_bytes for one in statistics.encodings if one.experts_dtype == name]
        expert_bytes = max(sizes, default=statistics.expert_bytes)
        try:
            count = count_for(statistics, None, None, budget_bytes, expert_bytes)
        except SelectionError:
            if name == names[-1] and not found:
                raise
            continue
        made = make_plan(statistics, replace(request, count=count, experts_dtype=name))
        found.append(Alternative.of(made, statistics.trunk_bytes + count * expert_bytes))
    return sorted(found, key=_rank(found, Price.of(statistics.price)))


def _rank(found: Sequence[Alternative], price: Price | None) -> Callable[[Alternative], tuple[float, ...]]:
    """The order of alternatives: by expected loss; of those that nobody can tell apart the one with most experts first.

    That one serves other text too. Losses cannot be told apart within the price's error on text that it was not fitted
    on. Losses that are only known to be larger than measured ones come last.
    """
    error = LEAST_DIFFERENCE
    if price is not None and price.fit is not None:
        error = max(error, price.fit.mean_error)
    least = min((one.loss_change or 0.0 for one in found if one.is_measured), default=-math.inf)

    def rank(one: Alternative) -> tuple[float, ...]:
        loss = one.loss_change or 0.0
        if one.is_measured and loss <= least + error:
            return 0, -len(one.plan.deep_experts), -one.num_bytes
        return (1 if one.is_measured else 2), loss, -one.num_bytes

    return rank
