"""Draws docs/figures/encodings.png from benchmarks/results/encodings.json.

python -m benchmarks.choosing.encodings_figure
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.reporting import REPOSITORY, RESULTS

COLOURS = {"16bit": "tab:gray", "fp8": "tab:blue", "int4": "tab:red"}
STYLES = {"kind": "-", "all": ":"}


def main() -> None:
    """Draw both checkpoints: fewer experts or fewer bits on the left, ways to spend bits on all on the right."""
    result = json.loads((RESULTS / "encodings.json").read_text())
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    panels = figure.subplots(2, 2)
    for (left, right), (name, rows) in zip(panels, result["checkpoints"].items(), strict=True):
        draw_masks(left, rows)
        draw_bits(right, rows)
        left.set_title(f"{name}: fewer experts or fewer bits", fontsize=10)
        right.set_title(f"{name}: all experts, and where the bits go", fontsize=10)
    figure.savefig(REPOSITORY / "docs" / "figures" / "encodings.png", dpi=110)


def draw_masks(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """KL over the share of bytes, a line for each encoding and way to choose."""
    whole = {row["name"]: row for row in rows if row["part"] == "encodings"}
    for encoding, colour in COLOURS.items():
        for chosen, style in STYLES.items():
            points = [row for row in rows if row["part"] == "masks" and row["name"] == f"{encoding}, {chosen}"]
            points += [whole[encoding]] if encoding in whole else []
            points.sort(key=lambda row: row["bytes"])
            label = f"{encoding}, chosen for {'each kind' if chosen == 'kind' else 'all kinds'}"
            axes.plot(
                [row["bytes"] for row in points],
                [row["kl"] for row in points],
                style,
                marker="o",
                color=colour,
                label=label,
            )
    axes.set(xlabel="bytes of the experts ÷ all in 16 bits", ylabel="KL from the checkpoint, nats", yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def draw_bits(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """KL over bits a weight with all experts kept."""
    kinds = (("encodings", "o", "tab:red"), ("down", "s", "tab:green"), ("mixes", "^", "tab:purple"))
    labels = {"encodings": "one encoding", "down": "down_proj in another one", "mixes": "experts in two encodings"}
    for part, marker, colour in kinds:
        points = [row for row in rows if row["part"] == part and "stats" not in row["name"]]
        axes.scatter(
            [row["bits"] for row in points], [row["kl"] for row in points], marker=marker, color=colour,
            label=labels[part],
        )  # fmt: skip
        for row in points:
            text = row["name"].rpartition(": ")[2] if part == "mixes" else row["name"]
            axes.annotate(text, (row["bits"], row["kl"]), xytext=(4, 2), textcoords="offset points", fontsize=6)
    axes.set(xlabel="bits a weight", ylabel="KL from the checkpoint, nats", yscale="log")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
