"""Pictures of a plan: the chosen experts of each layer, and the kept mass over the kept bytes.

They are drawn with matplotlib's Agg canvas, which needs no display and no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from expert_store.files import replacing
from extractor.errors import TargetError
from extractor.planning.criteria import ranking
from extractor.planning.plan import Plan
from extractor.statistics.statistics import ExpertStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Float = npt.NDArray[np.float64]
MAX_CURVES = 12
FORMATS = (".png", ".svg", ".pdf")


def require_picture(path: Path) -> None:
    """Raise TargetError if the name's suffix is no known picture format."""
    if path.suffix not in FORMATS:
        raise TargetError(f"--plot {path}: wanted a name that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def kept_mass_curve(scores: Float, shares: Float) -> Float:
    """Mean share of mass [L, E] that the best n experts of each layer by scores [L, E] keep, float64 [E+1], n = 0…E."""
    ranked = np.take_along_axis(shares, ranking(scores), axis=1)
    return np.concatenate([[0.0], np.cumsum(ranked, axis=1).mean(axis=0)])


def draw_plan(path: Path, statistics: ExpertStatistics, plan: Plan, scores: Float, domains: Sequence[str]) -> None:
    """Write a picture of the plan to `path`; the suffix chooses the format (png, svg, pdf).

    Args:
        scores: float64 [L, E], the scores of the plan's criterion, over all its domains.
        domains: domains to draw curves for (the first `MAX_CURVES`).

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_experts(left, statistics, plan, domains)
    _draw_curves(right, statistics, plan, scores, domains)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)


def _draw_experts(axes: Axes, statistics: ExpertStatistics, plan: Plan, domains: Sequence[str]) -> None:
    shares = np.mean([statistics.demand_shares(name) for name in domains], axis=0) * statistics.num_experts
    image = axes.imshow(np.log2(np.maximum(shares, 1 / 16)), aspect="auto", cmap="viridis", interpolation="nearest")
    deep_experts = np.array([deep.experts for deep in plan.deep_experts])  # [C, L]
    layers = np.tile(np.arange(plan.num_layers), (len(deep_experts), 1))
    axes.scatter(deep_experts.ravel(), layers.ravel(), s=9, c="white", edgecolors="black", linewidths=0.4)
    axes.set(
        xlabel="expert", ylabel="MoE layer", title=f"{len(deep_experts)} of {plan.num_experts} deep experts (dots)"
    )
    axes.figure.colorbar(image, ax=axes, label="log2 of demanded mass ÷ an even share")


def _draw_curves(axes: Axes, statistics: ExpertStatistics, plan: Plan, scores: Float, domains: Sequence[str]) -> None:
    unit = statistics.expert_bytes / 2**20 or 1.0
    kept = np.arange(statistics.num_experts + 1) * unit
    for name in domains[:MAX_CURVES]:
        axes.plot(kept, kept_mass_curve(scores, statistics.demand_shares(name)), linewidth=1, label=name)
    axes.axvline(len(plan.deep_experts) * unit, color="black", linestyle=":", linewidth=1)
    axes.set(
        xlabel="experts kept, MiB" if statistics.expert_bytes else "deep experts kept",
        ylabel="share of router mass kept",
        ylim=(0, 1.02),
        title="kept mass over kept bytes",
    )
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
