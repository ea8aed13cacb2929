"""What a choice of experts is expected to serve, and to cost, in each domain of the statistics.

The served share is measured on the calibration text; the cost follows from the price curves, where calibration measured
masks. An expected cost above `BAD_LOSS_CHANGE` must be said loudly: there, paging serves better than masking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from extractor.alignment import Columns, served_share
from extractor.statistics import ExpertStatistics
from extractor.statistics_price import price_curve

BAD_LOSS_CHANGE = 0.1
"""Expected nats a token from which a plan is called costly (perplexity × 1.105)."""


@dataclass(frozen=True)
class Expectation:
    """What a plan should serve of one domain.

    Attributes:
        domain: name.
        served_share: of the router mass, 0 to 1; 1 minus it is the expected deficit.
        loss_change: expected nats a token; None where calibration measured no masks.
    """

    domain: str
    served_share: float
    loss_change: float | None

    @property
    def is_bad(self) -> bool:
        """Whether serving this domain from the plan is expected to cost a lot."""
        return self.loss_change is not None and self.loss_change > BAD_LOSS_CHANGE

    def describe(self) -> str:
        """One line of text."""
        text = f"{self.domain}: {self.served_share:.1%} of router mass served"
        if self.loss_change is None:
            return text + ", cost unknown (calibrate with --price)"
        return text + f", expected loss {self.loss_change:+.3f} (perplexity × {math.exp(self.loss_change):.3f})"


def expect(statistics: ExpertStatistics, columns: Columns, domains: Sequence[str]) -> list[Expectation]:
    """What columns [C, L] are expected to serve of each domain."""
    expectations = []
    for name in domains:
        share = served_share(columns, statistics.demand_shares(name))
        curve = price_curve(statistics.price, name) or price_curve(statistics.price)
        expectations.append(Expectation(name, share, None if curve is None else curve(1.0 - share)))
    return expectations
