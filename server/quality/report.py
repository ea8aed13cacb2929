"""The report of an evaluation: as JSON, as tables for a terminal, and as a picture.

Invariant: the three show the same figures. The picture is drawn with matplotlib's Agg canvas, without a display and
without global state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_store.files import replacing
from server.quality.comparison import MaskResult
from server.quality.price import PriceCheck
from server.quality.text_loss import TextResult, geometric_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAMED = 16
FIGURES = ("activation_ratio", "p3", "p2f", "mer", "r3", "saa")


@dataclass
class Report:
    """The results of an evaluation.

    Attributes:
        num_experts: E.
        texts: of each domain.
        reference: the same of the whole model; empty without one.
        expected: change of loss that calibration expects at each domain's deficit.
        questions: name, accuracy and efficiency metrics of each set.
        entropy: CES of each layer, from the statistics.
        compared: criteria over kept shares.
        adapter: that the texts and questions under the mask had; None: none.
        not_compared: the reason why there are none although statistics were given.
        price: how well the expected loss predicted the measured one.
    """

    num_experts: int
    texts: dict[str, TextResult] = field(default_factory=dict)
    reference: dict[str, TextResult] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    compared: list[MaskResult] = field(default_factory=list)
    price: PriceCheck | None = None
    not_compared: str | None = None
    adapter: str | None = None

    def ratio(self, domain: str) -> float:
        """Perplexity ÷ the reference's."""
        return math.exp(self.texts[domain].loss - self.reference[domain].loss)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        texts: dict[str, Any] = {}
        for name, one in self.texts.items():
            texts[name] = {
                "perplexity": one.perplexity,
                "loss": one.loss,
                "num_tokens": one.num_tokens,
                "deficit": one.deficit,
                "deficit_per_layer": list(one.deficit_per_layer),
                "top1_missing": one.top1_missing,
                "expected_loss_change": self.expected.get(name),
                "ratio": self.ratio(name) if name in self.reference else None,
            }
        ratios = [self.ratio(name) for name in self.texts if name in self.reference]
        return {
            "texts": texts,
            "mean_ratio": geometric_mean(ratios) if ratios else None,
            "adapter": self.adapter,
            "questions": self.questions,
            "ces": self.entropy,
            "sweeps": [one.to_json() for one in self.compared],
            "sweeps_left_out": self.not_compared,
            "price": None if self.price is None else self.price.to_json(),
        }

    def to_text(self) -> str:
        """As tables for a terminal."""
        lines: list[str] = []
        if self.texts:
            lines.append(f"{'text':20} {'perplexity':>10} {'ratio':>8} {'deficit':>8} {'expected':>9}")
        for name, one in self.texts.items():
            ratio = f"{self.ratio(name):8.4f}" if name in self.reference else f"{'–':>8}"
            expected = f"×{math.exp(self.expected[name]):8.4f}" if name in self.expected else f"{'–':>9}"
            lines.append(f"{name:20} {one.perplexity:10.4f} {ratio} {one.deficit:8.4f} {expected}")
        if self.reference and self.texts:
            mean = geometric_mean([self.ratio(name) for name in self.texts])
            lines.append(f"{'geometric mean':20} {'':10} {mean:8.4f}")
        if self.adapter is not None:
            lines.append(f"with the adapter {self.adapter}; expected is its price")
        for asked in self.questions:
            figures = ", ".join(f"{key} {asked[key]:.4g}" for key in FIGURES)
            lines.append(f"questions {asked['name']}: {asked['accuracy']:.1%} answered; {figures}")
        if self.entropy:
            lines.append("CES per layer: " + " ".join(f"{value:.3f}" for value in self.entropy))
        for mask in self.compared:
            share = mask.kept / self.num_experts
            lines.append(f"keep {share:6.1%} by {mask.name:12} mean ratio {mask.mean_ratio:.4f}")
        if self.not_compared is not None:
            lines.append(self.not_compared)
        if self.price is not None and self.price.points:
            lines.append(
                f"expected against actual loss: R² {self.price.r_squared:.3f}, "
                f"{self.price.r_squared_by_routing:.3f} where only the routing tells the kind of text, "
                f"{self.price.r_squared_of_unknown_kind:.3f} where nothing tells it"
            )
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Write a picture of the comparison and the price to `path`; the suffix chooses the format. Raises OSError."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_quality(left, self)
        _draw_price(right, self)
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=120)


def _draw_quality(axes: Axes, report: Report) -> None:
    ways: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mask in report.compared:
        name = "random" if mask.name.startswith("random") else mask.name
        ways[name][mask.kept / report.num_experts].append(mask.mean_ratio)
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
