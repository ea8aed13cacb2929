import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from extractor.planning.expectation import cost_warning, costly, expect
from extractor.planning.planner import PlanRequest, make_plan
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.price import Price, determination
from extractor.statistics.statistics import PricePoint, StatisticsError
from tests.extractor.selection_statistics import make_statistics


def priced(points: list[PricePoint] | None = None) -> Price:
    price = Price.of(make_statistics().price if points is None else points)
    assert price is not None
    return price


def test_a_curve_starts_at_nothing_never_falls_and_differs_by_domain() -> None:
    price = priced()
    assert price.expected_loss(0.0, "code").nats == 0.0
    assert price.expected_loss(0.1, "code").nats == pytest.approx(0.01)
    assert price.expected_loss(0.4, "code").nats == pytest.approx(0.2)
    assert price.expected_loss(0.4, "chat").nats == pytest.approx(0.02)
    rising = [price.expected_loss(deficit, "code").nats for deficit in np.linspace(0, 1, 50)]
    assert rising == sorted(rising)
    assert price.expected_loss(0.8, "code").nats == pytest.approx(0.2 * 8)


def test_text_of_unknown_kind_is_priced_by_all_measurements_within_the_range_of_the_kinds() -> None:
    expected = priced().expected_loss(0.4)
    assert expected.nats == pytest.approx(0.11)
    assert (expected.low, expected.high) == pytest.approx((0.02, 0.2))
    assert expected.ratio == pytest.approx(math.exp(0.11))
    assert expected == priced().expected_loss(0.4, "poems")
    assert "+0.020 to +0.200 by kind of text" in expected.describe()


def test_text_of_unknown_kind_that_routes_like_some_kinds_is_priced_as_they_are() -> None:
    price = priced()
    assert price.expected_loss(0.4, likeness={"code": 3.0, "chat": 1.0}).nats == pytest.approx(0.75 * 0.2 + 0.25 * 0.02)
    assert price.expected_loss(0.4, "chat", {"code": 1.0}).nats == pytest.approx(0.02), "a kind that is told goes first"
    assert price.expected_loss(0.4, likeness={"poems": 1.0, "code": 0.0}) == price.expected_loss(0.4)


def test_deficits_of_the_layers_count_as_their_mean() -> None:
    assert priced().expected_loss([0.2, 0.4, 0.6], "code").nats == pytest.approx(0.2)


def test_an_absurd_deficit_gives_a_finite_ratio() -> None:
    price = priced([PricePoint("code", 0.01, 5.0, 10, 0.5)])
    assert math.isfinite(price.expected_loss(1.0).ratio)


def test_the_fit_says_how_well_one_part_of_the_text_predicts_the_other() -> None:
    points = [
        PricePoint(domain, deficit, slope * deficit + noise * part, 100, 0.5, part)
        for domain, slope in (("code", 1.0), ("chat", 0.1))
        for deficit in (0.1, 0.2, 0.4)
        for part in (0, 1)
        for noise in (0.01,)
    ]
    fit = priced(points).fit
    assert fit is not None
    assert fit.num_points == len(points)
    assert 0.98 < fit.r_squared < 1.0
    assert fit.mean_error == pytest.approx(0.01, abs=0.004)
    wrong = [dataclasses.replace(point, loss_change=0.3 * point.part) for point in points]
    worse = priced(wrong).fit
    assert worse is not None
    assert worse.r_squared < 0.0


def test_without_a_second_part_the_fit_is_unknown_and_without_points_the_price() -> None:
    assert priced().fit is None
    assert Price.of([]) is None


def test_a_price_survives_json_and_a_damaged_one_is_refused() -> None:
    price = priced()
    again = Price.from_json(price.to_json())
    assert again.expected_loss(0.3, "code").nats == pytest.approx(price.expected_loss(0.3, "code").nats, abs=1e-4)
    wrong = [{"curves": {"code": points}, "overall": [[0, 0]]} for points in ([[0, 1], [1, 0]], [1])]
    for damaged in (None, {}, {"curves": {}}, {"curves": {}, "overall": [[0, 0]]}, *wrong):
        with pytest.raises(StatisticsError, match="price"):
            Price.from_json(damaged)


def test_files_from_before_parts_and_layers_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    write_statistics(path, make_statistics())
    with safe_open(path, framework="np") as file:
        header = file.metadata()["deepfew"]
    old = header.replace(', "part": 0, "per_layer": []', "")
    assert old != header
    save_file(load_file(path), path, {"deepfew": old})
    assert read_statistics(path).price == make_statistics().price


def test_a_plan_carries_its_price_and_what_it_expects_for_the_store() -> None:
    plan = make_plan(make_statistics(), PlanRequest(count=2, domains=("code",)))
    assert Price.from_json(plan.alignment["price"]).curves.keys() == {"code"}
    assert plan.alignment["expected"] == plan.extra["expected"]
    assert plan.alignment["num_planned"] == 2


def test_only_what_costs_more_than_is_borne_is_warned_of() -> None:
    few = np.zeros((3, 8), dtype=np.bool_)
    few[:, 0] = True
    statistics = make_statistics()
    statistics.price += [
        PricePoint(domain, 0.99, 2.0 if domain == "code" else 0.2, 1, 0.1) for domain in statistics.domains
    ]
    expectations = expect(statistics, few)
    assert [one.domain for one in costly(expectations, 2.0)] == ["code"]
    assert cost_warning(expectations, 1000.0, "a store") is None
    warning = cost_warning(expectations, 2.0, "a store")
    assert warning is not None
    assert "masked to a store, 1 of 2 domains" in warning
    assert "perplexity × 2, code the most" in warning


def test_less_than_was_ever_measured_is_warned_of_however_little_it_seems_to_cost() -> None:
    few = np.zeros((3, 8), dtype=np.bool_)
    few[:, 0] = True
    statistics = make_statistics()
    statistics.price = [PricePoint(domain, 0.1, 0.0, 100, 0.5) for domain in statistics.domains]
    expectations = expect(statistics, few)
    assert [one.is_measured for one in expectations] == [False, False]
    assert "or more: calibration measured no mask that leaves so little" in expectations[0].describe()
    warning = cost_warning(expectations, 1.1, "a store")
    assert warning is not None
    assert "of 2 less is left than calibration ever measured" in warning
    every = np.ones((3, 8), dtype=np.bool_)
    assert all(one.is_measured for one in expect(statistics, every))


def test_determination_is_one_for_perfect_and_zero_for_the_mean() -> None:
    assert determination([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert determination([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0


def test_wrong_masks_say_what_deficits_cost_that_right_ones_never_have() -> None:
    right = [PricePoint("code", 0.2, 0.1, 10, 0.5), PricePoint("code", 0.4, 0.2, 10, 0.25)]
    wrong = [
        PricePoint("code", 0.3, 1.5, 10, 0.25, is_wrong=True),
        PricePoint("code", 0.6, 2.2, 10, 0.25, is_wrong=True),
        PricePoint("code", 0.8, 4.2, 10, 0.25, is_wrong=True),
    ]
    without, price = priced(right), priced([*right, *wrong])
    for deficit in (0.1, 0.3, 0.4):
        own = price.expected_loss(deficit, "code").nats
        assert own == pytest.approx(without.expected_loss(deficit, "code").nats), "right masks alone price these"
    assert price.expected_loss(0.5, "code").nats == pytest.approx(0.2 + 0.25 * 2.0), "half way, a quarter of the rise"
    assert price.expected_loss(0.7, "code").nats == pytest.approx(3.2)
    assert price.expected_loss(0.8, "code").is_measured
    assert not without.expected_loss(0.5, "code").is_measured
    assert price.fit == without.fit, "how well the curves hold is asked of right masks"
