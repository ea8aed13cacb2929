"""The score of each expert of a layer, from calibration statistics: the published criteria and two controls.

Invariant: a larger score means a better expert, scores are finite, and the same statistics give the same scores.
Sources: REAP (Cerebras, 2025), EASY-EP (2504.06792), AIMER (2603.18492; there a *higher* ratio is pruned first). An
audit (2606.10703) found that none of them predicts causal importance, so compare them with random and index.
`coverage` is our own: it counts the covered share of each token, so that few tokens lose much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from extractor.errors import ExtractError
from extractor.statistics.statistics import ExpertStatistics

Float = npt.NDArray[np.float64]

DEFAULT_CRITERION = "reap-sum"
SHRINKAGE_PICKS = 32.0
"""A mean per pick is mixed with this many picks of the layer's mean, since a mean over few picks is noise."""

MAX_COVERED = 1 << 26
"""Most values (token, layer, deep expert) that a choice of deep experts reads; beyond it, it reads every n-th token."""


class CriterionError(ExtractError):
    """The criterion does not exist, or its statistics are missing."""


def _mean_per_pick(total: Float, picks: Float, shrinkage: float) -> Float:
    """total / picks [L, E], mixed with `shrinkage` picks of the layer's mean."""
    layer_picks = picks.sum(axis=1, keepdims=True)
    layer_mean = np.divide(
        total.sum(axis=1, keepdims=True), layer_picks, out=np.zeros_like(layer_picks), where=layer_picks > 0
    )
    weight = picks + shrinkage
    return np.asarray(np.divide(total + shrinkage * layer_mean, weight, out=np.zeros_like(total), where=weight > 0))


_BY_SUM = {
    "reap-sum": "gate_output_norm",
    "gate-mass": "gate_mass",
    "frequency": "picks",
    "ean": "output_norm",
    "easy": "residual_change",
}
_BY_MEAN = {"reap": "gate_output_norm", "man": "output_norm"}


def _from_weights(statistics: ExpertStatistics) -> Float:
    if statistics.weight_flatness is None:
        raise CriterionError("aimer needs the experts' weights: calibrate from a checkpoint or a whole store")
    return -statistics.weight_flatness


def _random(statistics: ExpertStatistics, seed: int) -> Float:
    return np.random.default_rng(seed).random((statistics.num_layers, statistics.num_experts))


def _index(statistics: ExpertStatistics) -> Float:
    return np.tile(-np.arange(statistics.num_experts, dtype=np.float64), (statistics.num_layers, 1))


def _coverage(statistics: ExpertStatistics, domains: Sequence[str] | None) -> Float:
    """Greedy choice with the least squared missing share over the sampled tokens; earlier picks score higher."""
    experts, shares, weights = _sampled_shares(statistics, domains)
    scores = np.empty((statistics.num_layers, statistics.num_experts))
    for layer in range(statistics.num_layers):
        scores[layer] = _greedy_cover(_held(experts, shares, layer, statistics.num_experts), weights)
    return scores


def cover_deep_experts(
    statistics: ExpertStatistics, deep_experts: npt.NDArray[np.int64], domains: Sequence[str] | None = None
) -> Float:
    """The criterion `coverage` for whole deep experts, int64 [C, L]: scores [C], larger is better.

    A choice of deep experts is scored by the share that each token keeps in each layer, over all layers together.

    Raises:
        CriterionError: no tokens were sampled. StatisticsError: an unknown domain.
    """
    experts, shares, weights = _sampled_shares(statistics, domains)
    step = max(1, math.ceil(len(experts) * deep_experts.size / MAX_COVERED))
    experts, shares, weights = experts[::step], shares[::step], weights[::step]
    parts = [
        _held(experts, shares, layer, statistics.num_experts)[:, deep_experts[:, layer]]
        for layer in range(deep_experts.shape[1])
    ]
    return _greedy_cover(np.concatenate(parts), np.tile(weights, len(parts)))


def _sampled_shares(
    statistics: ExpertStatistics, domains: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], Float, Float]:
    """Experts [N, L, K] of the sampled tokens, their shares of the token's contributions [N, L, K], weights [N]."""
    sample = statistics.tokens
    chosen = sample.of(statistics.indices(domains))
    if not chosen.any():
        raise CriterionError("coverage needs sampled tokens: calibrate on text of the domains named")
    count = np.bincount(sample.domains[chosen], minlength=len(statistics.domains))
    weights = 1.0 / count[sample.domains[chosen]]  # every domain counts the same
    parts = sample.arrays["contributions"][chosen].astype(np.float64)
    sums = parts.sum(axis=2, keepdims=True)
    shares = np.divide(parts, sums, out=np.zeros_like(parts), where=sums > 0)
    return sample.arrays["experts"][chosen].astype(np.int64), shares, weights


def _held(experts: npt.NDArray[np.int64], shares: Float, layer: int, num_experts: int) -> Float:
    """Shares of one layer by expert, float64 [N, E]; sentinel ids are dropped."""
    held = np.zeros((len(experts), num_experts + 1))
    np.put_along_axis(held, np.minimum(experts[:, layer], num_experts), shares[:, layer], axis=1)
    return held[:, :num_experts]


def _greedy_cover(held: Float, weights: Float) -> Float:
    """Scores [M] from the tokens' shares [N, M], M for the first pick; each pick minimises Σ w (1 − covered)²."""
    own = weights @ np.square(held)
    missing = np.ones(len(held))
    scores = np.zeros(held.shape[1])
    open_ = np.ones(held.shape[1], dtype=np.bool_)
    for value in range(held.shape[1], 0, -1):
        gains = np.where(open_, 2.0 * ((weights * missing) @ held) - own, -np.inf)
        best = int(np.argmax(gains))
        scores[best], open_[best] = value, False
        missing -= held[:, best]
    return scores


_WITHOUT_TEXT: dict[str, Callable[[ExpertStatistics, int], Float]] = {
    "aimer": lambda statistics, seed: _from_weights(statistics),
    "random": _random,
    "index": lambda statistics, seed: _index(statistics),
}
CRITERIA: tuple[str, ...] = (*_BY_SUM, *_BY_MEAN, "coverage", *_WITHOUT_TEXT)
"""Names that `score` takes. reap-sum, gate-mass, frequency, ean and easy are sums; reap and man are means per pick."""


def score(
    statistics: ExpertStatistics,
    criterion: str = DEFAULT_CRITERION,
    domains: Sequence[str] | None = None,
    *,
    shrinkage: float = SHRINKAGE_PICKS,
    seed: int = 0,
) -> Float:
    """Scores of all experts on the given domains (all by default), float64 [L, E]; larger is better.

    Args:
        shrinkage: for the means per pick, the number of picks of the layer's mean to mix in; 0 takes the plain mean.
        seed: of the criterion "random".

    Raises:
        CriterionError: an unknown criterion, or "aimer" without `weight_flatness`.
        StatisticsError: an unknown domain.
    """
    statistics.indices(domains)
    if criterion in _BY_SUM:
        return statistics.total(_BY_SUM[criterion], domains)
    if criterion in _BY_MEAN:
        return _mean_per_pick(
            statistics.total(_BY_MEAN[criterion], domains), statistics.total("picks", domains), shrinkage
        )
    if criterion == "coverage":
        return _coverage(statistics, domains)
    if criterion in _WITHOUT_TEXT:
        return _WITHOUT_TEXT[criterion](statistics, seed)
    raise CriterionError(f"criterion {criterion!r} does not exist: take one of {', '.join(CRITERIA)}")


def normalised(scores: Float) -> Float:
    """Scores [L, E] as shares of their layer, so that layers and domains can be added up.

    A criterion with negative scores is shifted to start at 0 in each layer; a layer of equal scores becomes uniform.
    """
    shifted = scores - np.minimum(scores.min(axis=1, keepdims=True), 0.0)
    sums = shifted.sum(axis=1, keepdims=True)
    uniform = np.full_like(shifted, 1.0 / shifted.shape[1])
    return np.asarray(np.divide(shifted, sums, out=uniform, where=sums > 0))


def ranking(scores: Float) -> npt.NDArray[np.int64]:
    """Expert ids of each layer, best first, int64 [L, E]; equal scores are in the order of the ids."""
    return np.argsort(-scores, axis=1, kind="stable").astype(np.int64)
