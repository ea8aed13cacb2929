"""Draws docs/figures/adapters.png and beside.png from benchmarks/results/adapt.json and adapt_standard_cpu.json.

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


BESIDE = {
    "gate mass, 16 bits": ("gate-mass", None, "o-"),
    "REAP, 16 bits": ("reap", None, "s-"),
    "gate mass, 4 bits": ("gate-mass", "int4", "^-"),
}
"""Label → choice of the experts, their encoding, and a line."""
CHECKPOINTS = {"tiny-moe-standard": "standard", "tiny-moe": "pool"}
TRAINED = {
    ("tiny-moe-standard", "pools"): ("sweep", "tiny-moe-standard", "full-s128"),
    ("tiny-moe-standard", "together"): ("sweep", "tiny-moe-standard", "t-full-s64"),
    ("tiny-moe", "pools"): ("pool checkpoint", "tiny-moe-pool", "pools-0"),
}
"""Checkpoint and masks → run, its name of the checkpoint, and job of an adapter that was trained for them."""
NUM_IN_EXPERTS = 8 * 64 * 3 * 256 * 32
"""Numbers in all experts of these checkpoints; an adapter's are counted in 16 bits, too."""
MASKS = {"pools": "a mask for each kind of text", "together": "one mask for all kinds"}


def main() -> None:
    """Draw both pictures."""
    draw_trainings()
    draw_beside()


def draw_beside() -> None:
    """Draw ratios against bytes without training, and with adapters, whose bytes are counted too."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, (checkpoint, name) in zip(panels, CHECKPOINTS.items(), strict=True):
        for axes, (part, title) in zip(row, MASKS.items(), strict=True):
            for label, (choice, encoding, line) in BESIDE.items():
                points = sorted(beside(checkpoint, part, choice, encoding).values())
                axes.plot(*zip(*points, strict=True), line, label=label)
            if (checkpoint, part) in TRAINED:
                *run, job = TRAINED[checkpoint, part]
                one = results_of(*run)[job]
                ratios = one["curve"][-1]["ratios"].items()
                points = [(float(share) + one["num_parameters"] / NUM_IN_EXPERTS, ratio) for share, ratio in ratios]
                axes.plot(*zip(*points, strict=True), "*--", label=f"gate mass, 16 bits, with the adapter {job}")
            axes.set(yscale="log", title=f"{name}: {title}")
            axes.set(xlabel="bytes of the experts ÷ all in 16 bits", ylabel="perplexity ÷ the whole model's")
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize=7)
    figure.savefig(REPOSITORY / "docs" / "figures" / "beside.png", dpi=100)


def beside(checkpoint: str, part: str, choice: str, encoding: str | None) -> dict[float, tuple[float, float]]:
    """Share of the experts → their bytes ÷ all in 16 bits, and the mean ratio, where nothing is trained."""
    rows = results_of("beside", checkpoint).values()
    own = [row for row in rows if (row["part"], row["choice"], row["encoding"]) == (part, choice, encoding)]
    return {case["share"]: (case["bytes"], case["mean_ratio"]) for row in own for case in row["cases"]}


def draw_trainings() -> None:
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
