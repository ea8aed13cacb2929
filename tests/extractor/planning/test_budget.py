"""A budget of bytes is spent on more experts in fewer bits, or on fewer in more, by what calibration measured."""

import math

import pytest

from extractor.errors import SelectionError
from extractor.planning.budget import Alternative, plans_within
from extractor.planning.expectation import Expectation
from extractor.planning.planner import PlanRequest
from extractor.statistics.statistics import EncodingPoint, ExpertStatistics
from tests.extractor.selection_statistics import DOMAINS, make_statistics

REQUEST = PlanRequest(count=1)
TRUNK, SHIPPED, INT8, INT4 = 1000, 3000, 1600, 900
"""Bytes of the trunk and of a deep expert."""


def measured(int8: float = 0.0005, int4: float = 0.003, domains: tuple[str, ...] = DOMAINS) -> ExpertStatistics:
    """Statistics with the costs of two encodings, nats a token."""
    statistics = make_statistics()
    for name, size, cost in (("int8", INT8, int8), ("int4", INT4, int4)):
        statistics.encodings += [EncodingPoint(domain, name, size, cost, 256) for domain in domains]
    return statistics


def counts(found: list[Alternative]) -> list[tuple[str, int]]:
    return [(one.name, len(one.plan.deep_experts)) for one in found]


def test_most_bits_are_taken_where_all_experts_fit() -> None:
    assert counts(plans_within(measured(), REQUEST, TRUNK + 8 * SHIPPED))[0] == ("shipped", 8)
    assert counts(plans_within(measured(), REQUEST, TRUNK + 8 * INT8))[0] == ("int8", 8)


def test_fewer_bits_are_taken_where_a_mask_costs_more() -> None:
    found = plans_within(measured(), REQUEST, TRUNK + 8 * INT4)
    assert counts(found) == [("int4", 8), ("int8", 4), ("shipped", 2)]
    assert all(one.num_bytes <= TRUNK + 8 * INT4 for one in found)
    assert found[0].plan.experts_dtype == "int4"
    assert found[2].plan.experts_dtype is None
    losses = [one.loss_change for one in found]
    assert losses == sorted(losses, key=lambda loss: loss or 0.0)


def test_fewer_experts_are_taken_where_the_encoding_costs_more() -> None:
    expensive = plans_within(measured(int4=3.0), REQUEST, TRUNK + 8 * INT4)
    assert counts(expensive)[0] == ("int8", 4)


def test_expected_losses_are_those_of_mask_and_encoding_together() -> None:
    both, mask_alone = (plans_within(measured(int8=cost), REQUEST, TRUNK + 4 * INT8 + 100) for cost in (0.05, -0.01))
    expected, free = (
        [Expectation.from_json(item) for item in {one.name: one.plan for one in found}["int8"].extra["expected"]]
        for found in (both, mask_alone)
    )
    for one, other in zip(expected, free, strict=True):
        assert one.loss_change is not None
        assert other.loss_change is not None
        assert math.isclose(one.loss_change - other.loss_change, 0.05, abs_tol=1e-5)


def test_an_encoding_counts_where_it_was_measured_in_every_domain_of_the_plan() -> None:
    statistics = measured(domains=("code",))
    budget = TRUNK + 8 * INT4
    assert counts(plans_within(statistics, REQUEST, budget)) == [("shipped", 2)]
    code = PlanRequest(count=1, domains=("code",))
    assert counts(plans_within(statistics, code, budget))[0] == ("int4", 8)


def test_without_a_price_of_masks_nothing_is_compared() -> None:
    statistics = measured()
    statistics.price = []
    found = plans_within(statistics, REQUEST, TRUNK + 2 * SHIPPED)
    assert counts(found) == [("shipped", 2)]
    assert found[0].loss_change is None


def test_a_budget_in_which_nothing_fits_is_refused() -> None:
    with pytest.raises(SelectionError, match="does not hold the trunk and one deep expert, which take 1900 bytes"):
        plans_within(measured(), REQUEST, TRUNK + 899)
    assert counts(plans_within(measured(), REQUEST, TRUNK + INT4)) == [("int4", 1)]
