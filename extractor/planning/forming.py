"""Forms deep experts from statistics: the alignments, the groups of text that weigh in them, and the ranking.

Invariant: the result depends on the statistics alone, so the same file gives the same deep experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from extractor.errors import SelectionError
from extractor.planning.alignment import (
    DeepExperts,
    chain_alignment,
    coverage_alignment,
    deep_expert_mass,
    index_alignment,
    profile_alignment,
    rank_alignment,
    restarted_coverage_alignment,
    tiered_alignment,
)
from extractor.planning.criteria import cover_deep_experts, ranking
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics

Float = npt.NDArray[np.float64]

ALIGNMENTS = ("free", "index", "rank", "chain", "profile", "tiers", "coverage")
"""The ways to form deep experts; "free" chooses per layer first."""
MAX_GROUP_WINDOWS = 512
START_EXPERTS, MANY_EXPERTS = 24 * 64, 160
"""The coverage alignment has START_EXPERTS ÷ E starts, and one start if E is above MANY_EXPERTS."""
SHARE_WEIGHTS = (1.0, 2.0, 2.0)
"""The weights of `COVERAGE_SHARES`."""
SENSITIVITY_RANGE = (0.1, 10.0)
"""Least and most weight of a domain, relative to the mean domain."""


def form_deep_experts(
    statistics: ExpertStatistics, chosen: npt.NDArray[np.bool_], together: Float, domains: Sequence[str]
) -> DeepExperts:
    """Deep experts, int64 [C, L], made of all chosen experts [L, E]: experts that serve the same text are grouped."""
    count = int(chosen.sum(axis=1)[0])
    ranked = ranking(np.where(chosen, together, -np.inf))[:, :count]
    groups, weights = groups_of_text(statistics, domains)
    deep_experts = np.ascontiguousarray(ranked.T)
    if len(groups) == 0 or count == 1:
        return deep_experts
    return coverage_alignment(profile_alignment(deep_experts, groups), groups, weights)


def align(statistics: ExpertStatistics, kind: str, saliency: Float, domains: Sequence[str]) -> DeepExperts:
    """Deep experts of all experts, int64 [E, L], by one of `ALIGNMENTS` other than "free"; saliency [L, E].

    Raises:
        SelectionError: the kind does not exist, or needs windows, and the statistics have none.
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
        groups, weights = groups_of_text(statistics, domains)
        fits = statistics.num_experts <= MANY_EXPERTS
        num_starts = max(1, START_EXPERTS // statistics.num_experts) if fits else 1
        return restarted_coverage_alignment(saliency, windows, groups, weights, num_starts)
    raise SelectionError(f"alignment {kind!r} does not exist: take one of {', '.join(ALIGNMENTS)}")


def sensitivities(statistics: ExpertStatistics, domains: Sequence[str]) -> Float:
    """The cost of a deficit for each domain, relative to the mean domain, float64 [D], with a quarter of experts kept.

    All ones if calibration measured no price.
    """
    price = Price.of(statistics.price)
    if price is None:
        return np.ones(len(domains))
    slopes = np.zeros(len(domains))
    for at, name in enumerate(domains):
        shares = np.sort(statistics.demand_shares(name), axis=1)[:, ::-1]
        deficit = 1.0 - float(shares[:, : max(1, statistics.num_experts // 4)].sum(axis=1).mean())
        slopes[at] = price.expected_loss(deficit, name).nats / max(deficit, 1e-6)
    return np.clip(slopes / slopes.mean(), *SENSITIVITY_RANGE) if slopes.any() else np.ones(len(domains))


def ranked_deep_experts(
    statistics: ExpertStatistics, deep_experts: DeepExperts, domains: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """The order of deep experts [C, L] for the domains, best first, int64 [C]: by coverage of tokens, else by mass."""
    if statistics.tokens.of(statistics.indices(domains)).any():
        return np.argsort(-cover_deep_experts(statistics, deep_experts, domains), kind="stable").astype(np.int64)
    mass = deep_expert_mass(deep_experts, statistics.total("demand_mass", domains))
    return np.argsort(-mass, kind="stable").astype(np.int64)


def groups_of_text(statistics: ExpertStatistics, domains: Sequence[str]) -> tuple[Float, Float]:
    """The groups of text for `coverage_alignment`, mass [G, L, E], and weights [G, S] at `COVERAGE_SHARES`.

    Each domain weighs 1; at the largest share this is multiplied by its sensitivity, since most domains lose almost
    nothing there. The windows represent kinds of text without a name: together they weigh 8 ÷ D, so less if more
    domains are named. The whole text weighs a quarter of that.
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
    table = np.outer(np.concatenate(weights), SHARE_WEIGHTS)
    table[: len(shares), -1] *= sensitivities(statistics, domains)
    return np.concatenate(groups), table
