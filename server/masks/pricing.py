"""The expected price of a server's mask: from a statistics file, or from the plan that its store was made of.

Invariant: a store that lacks experts, or a server that masks some, is never served without a word. Either the expected
cost is compared with the user's bound, or a warning says that it is unknown and how to measure it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expert_store.adapter import Adapter
from expert_store.manifest import Manifest
from extractor.planning.expectation import Expectation, cost_warning, expect
from extractor.statistics.file import read_statistics
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from router.mask import ExpertMask

MEASURE = (
    "measure it with `deepfew calibrate CHECKPOINT TEXT... --out stats.safetensors` and serve with "
    "`--statistics stats.safetensors`"
)


@dataclass(frozen=True)
class KnownPrice:
    """The price that is known when the server starts.

    Attributes:
        price: of a deficit; None without a calibration.
        expectations: share served and cost of each domain under the mask; empty if they are unknown.
        is_of_mask: whether the expectations are of exactly this mask; else they are of the plan that the store was
            made of.
        problem: the reason why the store's own price could not be read.
    """

    price: Price | None = None
    expectations: tuple[Expectation, ...] = ()
    is_of_mask: bool = True
    problem: str = ""


def load_statistics(path: Path | None, manifest: Manifest) -> ExpertStatistics | None:
    """Read the statistics of a store's checkpoint; None without a path.

    Raises:
        StatisticsError: no statistics, or those of another checkpoint.
        OSError: the file cannot be read.
    """
    if path is None:
        return None
    statistics = read_statistics(path)
    if statistics.fingerprint != manifest.source.fingerprint:
        raise StatisticsError(
            f"{path} is of checkpoint {statistics.fingerprint}, the store of {manifest.source.fingerprint}: calibrate "
            "this store or its checkpoint"
        )
    return statistics


def known_price(manifest: Manifest, mask: ExpertMask, statistics: ExpertStatistics | None) -> KnownPrice:
    """The expected price of `mask`. If the store's own price cannot be read, it is unknown, and the store is served."""
    if statistics is not None:
        return KnownPrice(Price.of(statistics.price), tuple(expect(statistics, mask.allowed)))
    planned = manifest.alignment.statistics
    try:
        price = Price.from_json(planned["price"]) if "price" in planned else None
        expectations = tuple(Expectation.from_json(item) for item in planned.get("expected", ()))
    except StatisticsError as error:
        return KnownPrice(problem=str(error))
    is_of_mask = bool((mask.num_allowed == planned.get("num_planned")).all())
    return KnownPrice(price, expectations, is_of_mask)


def ratio_warning(name: str, adapter: Adapter, mask: ExpertMask, warn_ratio: float) -> list[str]:
    """A warning for a user whose requests have an adapter under `mask`; none if it costs little with the adapter."""
    share = float(mask.allowed.mean())
    nearest = min(adapter.ratios, key=lambda key: abs(float(key) - share), default=None)
    if nearest is None or adapter.ratios[nearest] <= warn_ratio:
        return []
    return [
        f"{share:.0%} of the experts are served, with the adapter {name}: on held-out text perplexity at "
        f"{float(nearest):.0%} of them was {adapter.told_ratio(nearest)}"
    ]


def price_warnings(known: KnownPrice, mask: ExpertMask, warn_ratio: float) -> list[str]:
    """Warnings for a user who serves under `mask`; none if every expert is available."""
    if mask.is_full:
        return []
    share = f"{float(mask.num_allowed.mean() / mask.allowed.shape[1]):.0%} of the experts"
    if known.price is None:
        why = f" ({known.problem})" if known.problem else ""
        return [f"the cost of serving {share} is unknown{why}: {MEASURE}"]
    if not known.expectations:
        return [f"it is unknown how much of the calibrated text {share} serve: {MEASURE}"]
    what = share if known.is_of_mask else f"what the store was planned as ({share} are served now)"
    warning = cost_warning(known.expectations, warn_ratio, what)
    return [] if warning is None else [warning]
