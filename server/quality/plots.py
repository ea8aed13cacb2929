"""Pictures of an evaluation: quality over kept share with random's spread, and expected against actual loss.

Drawn with matplotlib's Agg canvas: no display, no global state.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expert_store.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from server.quality.report import Report

MAX_NAMED = 16


def draw_report(path: Path, report: Report) -> None:
    """Write a picture of a report's sweeps to `path`; the suffix chooses the format. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_quality(left, report)
    _draw_price(right, report)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=120)


def _draw_quality(axes: Axes, report: Report) -> None:
    ways: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for sweep in report.sweeps:
        name = "random" if sweep.name.startswith("random") else sweep.name
        ways[name][sweep.kept / report.num_experts].append(sweep.mean_ratio)
    for name, points in ways.items():
        shares = sorted(points)
        middle = [float(np.median(points[share])) for share in shares]
        line = axes.plot(shares, middle, marker="o", markersize=3, label=name)[0]
        if name == "random":
            low, high = ([pick(points[share]) for share in shares] for pick in (min, max))
            axes.fill_between(shares, low, high, alpha=0.2, color=line.get_color())
    axes.set(xlabel="share of experts kept", ylabel="perplexity ÷ unmasked", title="quality over kept share")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if ways:
        axes.legend(fontsize=7)


def _draw_price(axes: Axes, report: Report) -> None:
    axes.set(xlabel="expected change of loss, nats a token", ylabel="actual change", title="price of a deficit")
    axes.grid(alpha=0.3)
    if report.price is None or not report.price.points:
        return
    ends = [1e-3]
    for name in dict.fromkeys(point["domain"] for point in report.price.points):
        own = [point for point in report.price.points if point["domain"] == name]
        expected, actual = ([point[key] for point in own] for key in ("expected", "actual"))
        axes.scatter(expected, actual, s=10, label=name)
        ends += [*expected, *actual]
    axes.plot([0, max(ends)], [0, max(ends)], color="black", linewidth=0.8)
    if len(report.texts) <= MAX_NAMED:
        axes.legend(fontsize=7)
    axes.set_title(f"price of a deficit, R² {report.price.r_squared:.3f}")
