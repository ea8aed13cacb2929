"""Draws docs/figures/adapters.png from benchmarks/results/adapt.json.

python -m benchmarks.choosing.adapters_figure
"""

from __future__ import annotations

import json
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.reporting import REPOSITORY, RESULTS

COLOURS = {"0.5": "tab:green", "0.25": "tab:blue", "0.125": "tab:red"}
TARGETS = {"0.5": 1.20, "0.25": 1.55, "0.125": 2.4}


def main() -> None:
    """Draw loss and ratios of the pools' trainings against tokens, and the ratios before and after."""
    result = json.loads((RESULTS / "adapt.json").read_text())
    trained = [one for one in result["results"] if one["part"] == "pools" and one["curve"]]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    losses, ratios, kinds = figure.subplots(1, 3)
    _losses(losses, trained)
    _ratios(ratios, trained)
    _kinds(kinds, trained[0])
    figure.savefig(REPOSITORY / "docs" / "figures" / "adapters.png", dpi=110)


def _losses(axes: Axes, trained: list[dict[str, Any]]) -> None:
    for one in trained:
        points = [(point["tokens"] / 1e6, point["loss"]) for point in one["curve"]]
        axes.plot(*zip(*points, strict=True), marker=".", label=one["name"])
    axes.set(
        xlabel="million tokens trained",
        ylabel="KL, nats a token",
        xscale="log",
        title="loss, mean since the point before",
    )
    axes.legend(fontsize=8)


def _ratios(axes: Axes, trained: list[dict[str, Any]]) -> None:
    for one in trained:
        for share, colour in COLOURS.items():
            points = [(point["tokens"] / 1e6, point["ratios"][share]) for point in one["curve"]]
            axes.plot(*zip(*points, strict=True), marker=".", color=colour, alpha=0.7)
    for share, colour in COLOURS.items():
        axes.axhline(TARGETS[share], color=colour, linestyle=":", label=f"{float(share):.4g} kept (dotted: wanted)")
    axes.set(
        xlabel="million tokens trained", ylabel="perplexity ÷ whole", xscale="log", yscale="log", title="held-out text"
    )
    axes.legend(fontsize=8)


def _kinds(axes: Axes, one: dict[str, Any]) -> None:
    cases = {(case["part"], str(case["share"])): case["ratios"] for case in one["cases"]}
    names = sorted(cases["none", "0.25"], key=lambda kind: -cases["none", "0.25"][kind])
    for share, colour in COLOURS.items():
        for part, marker in (("none", "x"), ("pools", "o")):
            values = [cases[part, share][kind] for kind in names]
            axes.plot(values, range(len(names)), marker, color=colour, markersize=5)
    axes.set(xscale="log", xlabel="perplexity ÷ whole; x without, o with the adapter", title="by kind")
    axes.set_yticks(range(len(names)), names, fontsize=8)


if __name__ == "__main__":
    main()
