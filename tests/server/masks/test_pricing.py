import dataclasses
from pathlib import Path

import numpy as np
import pytest

from expert_store.adapter import Adapter
from expert_store.manifest import Alignment, Manifest, read_manifest
from extractor.planning.planner import PlanRequest, make_plan
from extractor.statistics.file import write_statistics
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from router.mask import ExpertMask
from server.masks.pricing import KnownPrice, known_price, load_statistics, price_warnings, ratio_warning
from tests.extractor.selection_statistics import make_statistics


def mask(count: int) -> ExpertMask:
    return ExpertMask.same_in_every_layer(range(count), 3, 8)


@pytest.fixture
def manifest(tiny_store: Path) -> Manifest:
    return read_manifest(tiny_store)


def planned(manifest: Manifest, count: int, statistics: ExpertStatistics | None = None) -> Manifest:
    plan = make_plan(statistics or make_statistics(), PlanRequest(count=count))
    kept = {key: value for key, value in plan.alignment.items() if key != "kind"}
    return dataclasses.replace(manifest, alignment=Alignment("free", kept))


def test_a_mask_of_unknown_price_is_said_to_be_and_how_to_measure_it(manifest: Manifest) -> None:
    known = known_price(manifest, mask(2), None)
    assert known == KnownPrice(None, (), False)
    (warning,) = price_warnings(known, mask(2), 1.1)
    assert "the cost of serving 25% of the experts is unknown" in warning
    assert "deepfew calibrate" in warning


def test_statistics_say_what_a_mask_costs(manifest: Manifest) -> None:
    known = known_price(manifest, mask(1), make_statistics())
    (warning,) = price_warnings(known, mask(1), 1.1)
    assert "masked to 12% of the experts, 2 of 2 domains are expected to lose more" in warning
    assert "less is left than calibration ever measured" in warning
    assert price_warnings(known_price(manifest, mask(7), make_statistics()), mask(7), 1e9) == []
    assert known.price is not None
    assert known.price.expected_loss(0.4, "code").nats == pytest.approx(0.2)


def test_every_expert_costs_nothing_and_nothing_is_said(manifest: Manifest) -> None:
    assert price_warnings(KnownPrice(), mask(8), 1.1) == []


def test_a_store_made_from_a_plan_knows_its_price_without_statistics(manifest: Manifest) -> None:
    known = known_price(planned(manifest, 1), mask(1), None)
    assert known.is_of_mask
    (warning,) = price_warnings(known, mask(1), 1.1)
    assert "masked to 12% of the experts" in warning
    narrowed = known_price(planned(manifest, 2), mask(1), None)
    (warning,) = price_warnings(narrowed, mask(1), 1.001)
    assert "what the store was planned as (12% of the experts are served now)" in warning


def test_a_plan_without_measured_masks_leaves_the_price_unknown(manifest: Manifest) -> None:
    statistics = make_statistics()
    statistics.price = []
    known = known_price(planned(manifest, 2, statistics), mask(2), None)
    assert known.price is None
    assert "is unknown" in price_warnings(known, mask(2), 1.1)[0]


def test_statistics_of_another_checkpoint_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    write_statistics(tmp_path / "stats", make_statistics())
    with pytest.raises(StatisticsError, match="is of checkpoint sha, the store of"):
        load_statistics(tmp_path / "stats", manifest)
    assert load_statistics(None, manifest) is None


def test_a_damaged_price_in_a_store_is_unknown_and_said_to_be(manifest: Manifest) -> None:
    damaged = dataclasses.replace(manifest, alignment=Alignment("free", {"price": {"curves": {"code": [[1, np.nan]]}}}))
    known = known_price(damaged, mask(2), None)
    assert known.price is None
    assert "is unknown (the price is damaged" in price_warnings(known, mask(2), 1.1)[0]


def test_an_adapter_whose_cost_without_was_not_measured_is_told_with_its_own_alone() -> None:
    adapter = Adapter("ab" * 32, 3, 8, {}, shares=(0.1, 1.0), training={"ratios": [[1, {"0.5": 1.4, "0.25": 2.5}]]})
    (warning,) = ratio_warning("pools", adapter, mask(2), 1.1)
    assert warning.endswith("at 25% of them was × 2.500")
    assert ratio_warning("pools", adapter, mask(4), 1.5) == []
