"""Draws docs/figures/selection.png from benchmarks/results/selection.json: what is left of quality, and the price.

python -m benchmarks.choosing.selection_figure
"""

from __future__ import annotations

import json
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.reporting import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results" / "selection.json"
FIGURE = REPOSITORY / "docs" / "figures" / "selection.png"
CRITERIA = ("coverage", "reap-sum", "frequency", "reap", "man", "aimer", "index", "together")
ALIGNMENTS = ("plan", "coverage", "profile", "chain", "tiers", "rank", "index")


def main() -> None:
    """Draw the figure."""
    checkpoints = json.loads(RESULTS.read_text(encoding="utf-8"))["checkpoints"]
    figure = Figure(figsize=(15, 4.4 * len(checkpoints)), layout="constrained")
    rows = figure.subplots(len(checkpoints), 3, squeeze=False)
    for axes, (name, found) in zip(rows, checkpoints.items(), strict=True):
        _draw_ratios(axes[0], found["criteria"], CRITERIA, f"{name}: chosen for each kind of text, by criterion")
        _draw_spread(axes[0], found["criteria"])
        _draw_ratios(axes[1], found["columns"], ALIGNMENTS, f"{name}: whole deep experts, by alignment")
        _draw_price(axes[2], found["price"], name)
        for one in axes[:2]:
            one.legend(fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=90)


def _draw_ratios(axes: Any, sweeps: list[dict[str, Any]], names: tuple[str, ...], title: str) -> None:
    for name in names:
        points = sorted((one["kept"], one["mean_ratio"]) for one in sweeps if one["name"] == name)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="experts kept of 64 in every layer", ylabel="perplexity ÷ unmasked", title=title, yscale="log")
    axes.set_xticks([8, 16, 32])
    axes.grid(alpha=0.3)


def _draw_spread(axes: Any, sweeps: list[dict[str, Any]]) -> None:
    found: dict[int, list[float]] = {}
    for one in sweeps:
        if one["name"].startswith("random"):
            found.setdefault(one["kept"], []).append(one["mean_ratio"])
    kept = sorted(found)
    axes.fill_between(
        kept, [min(found[at]) for at in kept], [max(found[at]) for at in kept], alpha=0.25, color="grey", label="random"
    )


def _draw_price(axes: Any, price: dict[str, Any], name: str) -> None:
    for kept in sorted({point["kept"] for point in price["points"]}):
        own = [point for point in price["points"] if point["kept"] == kept]
        axes.scatter([p["expected"] for p in own], [p["actual"] for p in own], s=12, label=f"{kept} kept")
    end = max(max(point["expected"], point["actual"]) for point in price["points"])
    axes.plot([0, end], [0, end], color="black", linewidth=0.8)
    axes.set(
        xlabel="expected change of loss, nats a token",
        ylabel="measured on other text",
        title=f"{name}: price of a deficit, R² {price['r_squared']:.3f}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
