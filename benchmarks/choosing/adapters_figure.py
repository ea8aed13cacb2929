"""Draws docs/figures/adapters.png from benchmarks/results/adapt.json and adapt_standard_cpu.json.

python -m benchmarks.choosing.adapters_figure
"""

from __future__ import annotations

import json
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.reporting import REPOSITORY, RESULTS

WANTED = {"0.5": 1.20, "0.25": 1.55, "0.125": 2.4}
"""Share of the experts → the ratio that was aimed at."""
LABELS = {
    "full-s128": "whole matrices, added expert of 128",
    "full-s64-hi": "… of 64, twice the rate",
    "full-s64-skew": "… of 64, more small pools",
    "full-s64": "… of 64",
    "full-s64-given": "… of 64, given text alone",
    "r32-s64": "rank 32, added expert of 64",
    "full": "whole matrices, no added expert",
}


def main() -> None:
    """Draw loss and ratios of the pools' trainings against tokens."""
    trained = results_of("sweep", "tiny-moe-standard")
    first = json.loads((RESULTS / "adapt_standard_cpu.json").read_text())
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    losses, *ratios = figure.subplots(1, 4)
    for name, label in LABELS.items():
        _draw(losses, trained[name], label, [point["loss"] for point in trained[name]["curve"]])
    tokens = first["trainings"][0]["tokens"] / first["trainings"][0]["losses"][-1][0]
    steps = [(step * tokens / 1e6, loss) for step, loss in first["trainings"][0]["losses"]]
    losses.plot(*zip(*steps, strict=True), color="gray", marker=".", label="first try: rank 32, given text, CPU")
    losses.set(xlabel="million tokens trained", xscale="log", title="loss: KL, nats a token")
    losses.legend(fontsize=7)
    for axes, (share, wanted) in zip(ratios, WANTED.items(), strict=True):
        for name, label in LABELS.items():
            _draw(axes, trained[name], label, [point["ratios"][share] for point in trained[name]["curve"]])
        axes.axhline(wanted, color="black", linestyle=":")
        axes.set(xlabel="million tokens trained", title=f"ratio, {float(share):.4g} kept (dotted: aim)")
    figure.savefig(REPOSITORY / "docs" / "figures" / "adapters.png", dpi=100)


def results_of(run: str, checkpoint: str) -> dict[str, dict[str, Any]]:
    """The results of a run of `benchmarks.adapt` on a checkpoint, by the names of their jobs."""
    runs = json.loads((RESULTS / "adapt.json").read_text())["runs"]
    own = [one for one in runs if (one["name"], one["checkpoint"]) == (run, checkpoint)]
    return {result["name"]: result for one in own for result in one["results"]}


def _draw(axes: Axes, one: dict[str, Any], label: str, values: list[float]) -> None:
    axes.plot([point["tokens"] / 1e6 for point in one["curve"]], values, marker=".", label=label)


if __name__ == "__main__":
    main()
