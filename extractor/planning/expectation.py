"""The demand that a choice of experts is expected to serve, and its cost, in each domain of the statistics.

The served share is measured on the calibration text; the cost follows from the price curves, if calibration measured
masks. Commands warn of a cost above the user's limit, since paging then serves better than masking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from extractor.statistics.price import WARN_PERPLEXITY_RATIO, Price
from extractor.statistics.statistics import ExpertStatistics, StatisticsError

ADVICE = "keep more experts, or serve a whole store with experts paged in, which is exact"


@dataclass(frozen=True)
class Expectation:
    """The share of one domain that a choice of experts should serve.

    Attributes:
        domain: name.
        served_share: of the router mass, 0 to 1; 1 minus it is the expected deficit.
        loss_change: expected nats a token, of mask and encoding; None if calibration measured no masks.
        is_measured: whether calibration measured deficits this large; if not, the cost is a guess, mostly too low.
    """

    domain: str
    served_share: float
    loss_change: float | None
    is_measured: bool = True

    @property
    def ratio(self) -> float | None:
        """Expected perplexity ÷ unmasked perplexity."""
        return None if self.loss_change is None else math.exp(self.loss_change)

    def in_encoding(self, loss_change: float) -> Expectation:
        """The same for experts in an encoding that costs so many nats a token: the two losses nearly add up.

        An encoding that seems to gain costs nothing: the text is too short to tell.
        """
        own = None if self.loss_change is None else self.loss_change + max(0.0, loss_change)
        return replace(self, loss_change=own)

    def describe(self) -> str:
        """The expectation as one line of text."""
        text = f"{self.domain}: {self.served_share:.1%} of router mass served"
        if self.loss_change is None:
            return text + ", cost unknown (calibrate with --price)"
        text += f", expected loss {self.loss_change:+.3f} (perplexity × {self.ratio:.3f})"
        return text if self.is_measured else text + " or more: calibration measured no mask that leaves so little"

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, rounded."""
        loss = None if self.loss_change is None else round(self.loss_change, 6)
        return {
            "domain": self.domain,
            "served_share": round(self.served_share, 6),
            "loss_change": loss,
            "is_measured": self.is_measured,
        }

    @classmethod
    def from_json(cls, item: Any) -> Expectation:
        """Read the output of `to_json`. Raises `StatisticsError` for anything else."""
        try:
            loss = item["loss_change"]
            measured = bool(item.get("is_measured", True))
            return cls(
                str(item["domain"]), float(item["served_share"]), None if loss is None else float(loss), measured
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StatisticsError(f"the expectation {item!r} is damaged ({error!r}): plan again") from error


def expect(
    statistics: ExpertStatistics, allowed: npt.NDArray[np.bool_], domains: Sequence[str] | None = None
) -> list[Expectation]:
    """The share of each domain (all by default) that the experts `allowed` [L, E] are expected to serve."""
    price = Price.of(statistics.price)
    expectations = []
    for name in domains or statistics.domains:
        shares = statistics.demand_shares(name)
        share = float(shares[allowed].sum()) / max(float(shares.sum()), np.finfo(np.float64).tiny)
        if price is None:
            expectations.append(Expectation(name, share, None))
            continue
        loss = price.expected_loss(1.0 - share, name)
        expectations.append(Expectation(name, share, loss.nats, loss.is_measured))
    return expectations


def costly(expectations: Sequence[Expectation], warn_ratio: float = WARN_PERPLEXITY_RATIO) -> list[Expectation]:
    """The expectations whose perplexity may grow by more than `warn_ratio` times, the most expensive first.

    This includes every expectation with a deficit larger than calibration measured.
    """
    found = [one for one in expectations if one.ratio is not None and (one.ratio > warn_ratio or not one.is_measured)]
    return sorted(found, key=lambda one: one.ratio or 0.0, reverse=True)


def cost_warning(expectations: Sequence[Expectation], warn_ratio: float, masked_to: str) -> str | None:
    """The warning for serving with the mask that `masked_to` names; None if no domain costs much."""
    bad = costly(expectations, warn_ratio)
    if not bad:
        return None
    worst = bad[0]
    assert worst.loss_change is not None
    assert worst.ratio is not None
    guessed = sum(not one.is_measured for one in bad)
    blind = f"; of {guessed} less is left than calibration ever measured" if guessed else ""
    return (
        f"masked to {masked_to}, {len(bad)} of {len(expectations)} domains are expected to lose more than perplexity × "
        f"{warn_ratio:g}, {worst.domain} the most ({worst.loss_change:+.2f} nats a token, perplexity × "
        f"{worst.ratio:.2f}{blind}): {ADVICE}"
    )
