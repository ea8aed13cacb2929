"""What a server knows of the price of its mask: from a statistics file, or from the plan that its store was made of.

Invariant: a store that lacks experts, or a server that hides some, is never served in silence: either the expected cost
is compared with what the user bears, or the log says that it is unknown and how to measure it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """What is known before a request came.

    Attributes:
        price: of a deficit; None where nothing was calibrated.
        expectations: what the mask is expected to serve and to cost of each domain; empty where that is unknown.
        is_of_mask: whether the expectations are of exactly this mask, or of the plan that the store began as.
        problem: why what the store carries could not be read.
    """

    price: Price | None = None
    expectations: tuple[Expectation, ...] = ()
    is_of_mask: bool = True
    problem: str = ""


def load_statistics(path: Path | None, manifest: Manifest) -> ExpertStatistics | None:
    """The statistics file of a server, if there is one. Raises `StatisticsError`, OSError."""
    if path is None:
        return None
    statistics = read_statistics(path)
    if statistics.fingerprint != manifest.source.fingerprint:
        raise StatisticsError(
            f"{path} is of checkpoint {statistics.fingerprint}, the store of {manifest.source.fingerprint}: calibrate "
            "on this one"
        )
    return statistics


def known_price(manifest: Manifest, mask: ExpertMask, statistics: ExpertStatistics | None) -> KnownPrice:
    """What masking to `mask` is expected to cost. What cannot be read is unknown: a store is served without it."""
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


def price_warnings(known: KnownPrice, mask: ExpertMask, warn_ratio: float) -> list[str]:
    """What a user must know before serving under `mask`; nothing where every expert is there."""
    if mask.is_full:
        return []
    share = f"{float(mask.num_allowed.mean() / mask.allowed.shape[1]):.0%} of the experts"
    if known.price is None:
        why = f" ({known.problem})" if known.problem else ""
        return [f"what serving {share} costs is unknown{why}: {MEASURE}"]
    if not known.expectations:
        return [f"how much of the calibrated text {share} serve is unknown: {MEASURE}"]
    what = share if known.is_of_mask else f"what the store was planned as ({share} are served now)"
    warning = cost_warning(known.expectations, warn_ratio, what)
    return [] if warning is None else [warning]
