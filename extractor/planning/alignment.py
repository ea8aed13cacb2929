"""Alignments: tables with the expert of each layer that belongs to deep expert c, and the quality of such a table.

An expert's index means nothing across layers, so a deep expert is made of experts that serve the same text.
Invariant: a table of deep experts, int64 [C, L], holds distinct expert ids in each layer. Each step is an assignment
problem (`scipy.optimize.linear_sum_assignment`) of one layer, with the other layers fixed. `profile` matches experts by
their use in windows of text; `tiers` first divides each layer by saliency; `coverage` improves either table by the mass
that each kind of text keeps with its own best deep experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from extractor.errors import ExtractError

Float = npt.NDArray[np.float64]
DeepExperts = npt.NDArray[np.int64]

ROUNDS = 10
"""Most sweeps over the layers; a sweep that changes nothing is the last."""
NUM_TIERS = 4
COVERAGE_SHARES = (0.125, 0.25, 0.5)
"""Shares of the deep experts at which `coverage` measures the kept mass."""


class AlignmentError(ExtractError):
    """The deep experts cannot form a store, or the inputs do not fit together."""


def index_alignment(num_layers: int, num_experts: int) -> DeepExperts:
    """The same expert id in every layer, int64 [E, L]: it needs no calibration, and the grouping is arbitrary."""
    return np.tile(np.arange(num_experts, dtype=np.int64)[:, None], (1, num_layers))


def rank_alignment(saliency: Float) -> DeepExperts:
    """The c-th best expert of each layer by saliency [L, E] forms deep expert c, int64 [E, L]."""
    return np.argsort(-saliency, axis=1, kind="stable").T.astype(np.int64)


def chain_alignment(saliency: Float, coactivation: Float) -> DeepExperts:
    """Match each layer to the one before by co-activation [L-1, E, E], from layer 0 by saliency; int64 [E, L]."""
    deep_experts = rank_alignment(saliency)
    for layer in range(1, deep_experts.shape[1]):
        _, follower = linear_sum_assignment(coactivation[layer - 1][deep_experts[:, layer - 1]], maximize=True)
        deep_experts[:, layer] = follower
    return deep_experts


def profile_alignment(
    deep_experts: DeepExperts, windows: npt.NDArray[np.floating], rounds: int = ROUNDS
) -> DeepExperts:
    """Deep experts whose experts are used in the same windows, int64 [C, L]; starts from a table, which is not changed.

    Repeat: for each layer, match its experts to the summed profiles of the deep experts' other layers.

    Args:
        deep_experts: int64 [C, L], the experts to align, in a first order (for instance `rank_alignment`).
        windows: usage [W, L, E] of windows of text (gate mass).
    """
    deep_experts = deep_experts.copy()
    profiles = np.sqrt(windows.astype(np.float64))
    length = np.sqrt(np.square(profiles).sum(axis=0, keepdims=True))
    profiles = np.divide(profiles, length, out=np.zeros_like(profiles), where=length > 0)
    num_layers = deep_experts.shape[1]
    summed = sum((profiles[:, layer, deep_experts[:, layer]] for layer in range(num_layers)), np.zeros(()))  # [W, C]
    for _ in range(rounds):
        before = deep_experts.copy()
        for layer in range(num_layers):
            own = profiles[:, layer, deep_experts[:, layer]]  # [W, C]
            _, chosen = linear_sum_assignment((summed - own).T @ own, maximize=True)
            deep_experts[:, layer] = deep_experts[chosen, layer]
            summed = summed - own + own[:, chosen]
        if np.array_equal(before, deep_experts):
            break
    return deep_experts


def tiered_alignment(
    saliency: Float, windows: npt.NDArray[np.floating], num_tiers: int = NUM_TIERS, rounds: int = ROUNDS
) -> DeepExperts:
    """Divide the layers into tiers of saliency [L, E] and align each by profile; best tier first, int64 [E, L]."""
    ranked = rank_alignment(saliency)
    bounds = np.linspace(0, len(ranked), num_tiers + 1).astype(int)
    parts = [profile_alignment(ranked[low:high], windows, rounds) for low, high in pairwise(bounds) if high > low]
    return np.concatenate(parts)


def coverage_alignment(
    deep_experts: DeepExperts,
    groups: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    shares: Sequence[float] = COVERAGE_SHARES,
    rounds: int = 2 * ROUNDS,
) -> DeepExperts:
    """Improve deep experts by the mass that each group of text keeps with its own best deep experts, int64 [C, L].

    Coordinate ascent of Σ_groups Σ_shares weight × (mass of the group in its own best share of the deep experts):
    with the groups' choices of deep experts fixed, placing the experts of one layer is an assignment problem.

    Args:
        deep_experts: int64 [C, L], the experts to align and the start of the ascent; not changed.
        groups: mass [G, L, E] of each group of text (domains, windows, all of it).
        weights: [G, S], of each group at each of the S shares.
        shares: of the deep experts, rising.
    """
    deep_experts = deep_experts.copy()
    groups = groups / np.maximum(groups.sum(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
    num_deep_experts, num_layers = deep_experts.shape
    keeps = [max(1, round(share * num_deep_experts)) for share in shares]
    mass = deep_expert_mass(deep_experts, groups)  # [G, C]
    for _ in range(rounds):
        before = deep_experts.copy()
        for layer in range(num_layers):
            place = np.argsort(np.argsort(-mass, axis=1, kind="stable"), axis=1)  # rank of each in its group
            chosen_at = [(place < keep) * weights[:, at, None] for at, keep in enumerate(keeps)]
            wanted = sum(chosen_at, np.zeros(()))  # [G, C]
            own = groups[:, layer, deep_experts[:, layer]]  # [G, C]
            _, chosen = linear_sum_assignment(wanted.T @ own, maximize=True)
            deep_experts[:, layer] = deep_experts[chosen, layer]
            mass = mass - own + own[:, chosen]
        if np.array_equal(before, deep_experts):
            break
    return deep_experts


def restarted_coverage_alignment(
    saliency: Float,
    windows: npt.NDArray[np.floating],
    groups: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    num_starts: int,
    shares: Sequence[float] = COVERAGE_SHARES,
) -> DeepExperts:
    """The best of `num_starts` coverage alignments of all experts, int64 [E, L]; the starts are always the same ones.

    The first start is the profile alignment of the ranks, the others are those of shuffled layers. Each ascent ends in
    a local optimum; the one with the largest objective is returned.
    """
    rng = np.random.default_rng(0)
    ranked = rank_alignment(saliency)
    best, best_value = ranked, -np.inf
    for number in range(num_starts):
        start = ranked if number == 0 else rng.permuted(ranked, axis=0)
        deep_experts = coverage_alignment(profile_alignment(start, windows), groups, weights, shares)
        value = _kept_mass(deep_experts, groups, weights, shares)
        if value > best_value:
            best, best_value = deep_experts, value
    return best


def _kept_mass(
    deep_experts: DeepExperts,
    groups: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    shares: Sequence[float],
) -> float:
    """The objective that `coverage_alignment` maximises."""
    mass = deep_expert_mass(deep_experts, groups / np.maximum(groups.sum(axis=(1, 2), keepdims=True), 1e-300))
    ranked = np.sort(mass, axis=1)[:, ::-1]
    kept = [ranked[:, : max(1, round(share * len(deep_experts)))].sum(axis=1) for share in shares]
    return float((weights * np.stack(kept, axis=1)).sum())


def deep_expert_mass(deep_experts: DeepExperts, mass: npt.NDArray[np.floating]) -> Float:
    """Mass of each deep expert, float64 [..., C], from mass of the experts [..., L, E]."""
    layers = np.arange(deep_experts.shape[1])
    return np.asarray(mass[..., layers[None, :], deep_experts].sum(axis=-1), dtype=np.float64)


def served_share(deep_experts: DeepExperts, mass: npt.NDArray[np.floating]) -> float:
    """The share of the mass [L, E] that belongs to the deep experts."""
    total = float(mass.sum())
    return float(deep_expert_mass(deep_experts, mass).sum()) / total if total > 0 else 0.0


def check_deep_experts(deep_experts: DeepExperts, num_layers: int, num_experts: int) -> None:
    """Raise `AlignmentError` unless the deep experts are distinct existing experts in every layer."""
    if deep_experts.ndim != 2 or deep_experts.shape[1] != num_layers:
        raise AlignmentError(f"deep experts have shape {deep_experts.shape}, wanted [C, {num_layers}]")
    if deep_experts.size and not 0 <= int(deep_experts.min()) <= int(deep_experts.max()) < num_experts:
        raise AlignmentError(f"a deep expert names an expert outside 0 to {num_experts - 1}")
    for layer in range(num_layers):
        ids, counts = np.unique(deep_experts[:, layer], return_counts=True)
        if counts.size and counts.max() > 1:
            raise AlignmentError(f"expert {ids[counts.argmax()]} of layer {layer} stands in two deep experts")
