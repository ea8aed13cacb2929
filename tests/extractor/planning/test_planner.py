import numpy as np
import pytest

from extractor.errors import SelectionError
from extractor.planning.expectation import expect
from extractor.planning.forming import ALIGNMENTS, groups_of_text, ranked_deep_experts, sensitivities
from extractor.planning.plan import parse_plan, plan_document
from extractor.planning.planner import PlanRequest, allowed_by, choose_per_layer, count_for, make_plan
from extractor.statistics.statistics import ExpertStatistics
from tests.extractor.selection_statistics import NUM_EXPERTS, NUM_LAYERS, expert_of, make_statistics


def deep_experts_of(plan: object) -> np.ndarray:
    return np.array([deep.experts for deep in plan.deep_experts])  # type: ignore[attr-defined]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_every_alignment_makes_a_plan_that_can_be_written(alignment: str) -> None:
    plan = make_plan(make_statistics(), PlanRequest(count=4, alignment=alignment))
    assert parse_plan(plan_document(plan)) == plan
    assert len(plan.deep_experts) == 4
    assert plan.alignment["kind"] == alignment
    scores = [deep.score for deep in plan.deep_experts]
    assert scores == sorted(scores, reverse=True)


def test_a_plan_for_one_domain_loses_nothing_by_forming_deep_experts() -> None:
    statistics = make_statistics()
    deep_experts = deep_experts_of(make_plan(statistics, PlanRequest(count=4, domains=("code",))))
    for layer in range(NUM_LAYERS):
        assert set(deep_experts[:, layer]) == {expert_of("code", layer, rank) for rank in range(4)}


def test_every_chosen_expert_is_in_exactly_one_deep_expert_when_all_are_kept() -> None:
    deep_experts = deep_experts_of(make_plan(make_statistics(), PlanRequest(count=NUM_EXPERTS)))
    for layer in range(NUM_LAYERS):
        assert sorted(deep_experts[:, layer]) == list(range(NUM_EXPERTS))


def test_deep_experts_follow_the_kind_of_text() -> None:
    statistics = make_statistics()
    deep_experts = deep_experts_of(make_plan(statistics, PlanRequest(count=NUM_EXPERTS)))
    for domain in ("code", "chat"):
        best = deep_experts[ranked_deep_experts(statistics, deep_experts, [domain])[:4]]
        (expectation,) = expect(statistics, allowed_by(best, NUM_EXPERTS), [domain])
        assert expectation.served_share > 0.9


def test_a_quota_gives_a_domain_its_share_of_the_places() -> None:
    statistics = make_statistics()
    plan = make_plan(statistics, PlanRequest(count=4, quotas={"chat": 1.0}))
    served = {item["domain"]: item["served_share"] for item in plan.extra["expected"]}
    assert served["chat"] > 0.9 > served["code"]
    shared = {"code": np.eye(2, 6), "chat": np.eye(2, 6)[:, ::-1]}
    chosen = choose_per_layer(shared, np.ones((2, 6)), {"code": 0.5, "chat": 0.25}, 4)
    assert chosen.sum(axis=1).tolist() == [4, 4]


def test_usage_of_a_server_counts_as_a_domain() -> None:
    usage = np.zeros((NUM_LAYERS, NUM_EXPERTS))
    usage[:, 7] = 1e6
    deep_experts = deep_experts_of(make_plan(make_statistics(), PlanRequest(count=2, usage=usage)))
    assert all(7 in deep_experts[:, layer] for layer in range(NUM_LAYERS))
    with pytest.raises(SelectionError, match="the usage has shape"):
        make_plan(make_statistics(), PlanRequest(count=2, usage=np.zeros((1, 1))))


def test_the_expected_cost_comes_from_the_price_of_the_domain() -> None:
    plan = make_plan(make_statistics(), PlanRequest(count=2, domains=("code", "chat")))
    expected = {item["domain"]: item for item in plan.extra["expected"]}
    assert expected["code"]["loss_change"] > 5 * expected["chat"]["loss_change"] > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest(count=0), "wanted 1 to 8"),
        (PlanRequest(count=9), "wanted 1 to 8"),
        (PlanRequest(count=2, alignment="magic"), "alignment 'magic' does not exist"),
        (PlanRequest(count=2, quotas={"poems": 0.5}), "the quota of 'poems' is for no domain"),
        (PlanRequest(count=2, quotas={"code": 0.75, "chat": 0.5}), "add up to 1.25"),
        (PlanRequest(count=2, quotas={"code": -1.0}), "wanted a share from 0 to 1"),
    ],
)
def test_an_impossible_request_says_what_is_wrong(request_: PlanRequest, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        make_plan(make_statistics(), request_)


def test_the_count_comes_from_a_number_a_share_or_bytes() -> None:
    statistics = make_statistics()
    assert count_for(statistics, 3, None, None) == 3
    assert count_for(statistics, None, 0.25, None) == 2
    assert count_for(statistics, None, None, 1000 + 3000 * 5 + 1) == 5
    assert count_for(statistics, None, None, 10**9) == NUM_EXPERTS
    with pytest.raises(SelectionError, match="--count and --keep contradict each other"):
        count_for(statistics, 3, 0.5, None)
    with pytest.raises(SelectionError, match="give exactly one of --count, --keep and --budget"):
        count_for(statistics, None, None, None)
    with pytest.raises(SelectionError, match="does not hold the trunk and one deep expert, which take 4000 bytes"):
        count_for(statistics, None, None, 1000)


def test_a_domain_weighs_what_a_missing_share_costs_it() -> None:
    statistics = make_statistics()
    code, chat = sensitivities(statistics, ["code", "chat"])
    assert code > 2 * chat
    assert (code + chat) / 2 == pytest.approx(1.0)
    _, weights = groups_of_text(statistics, ["code", "chat"])
    assert weights[0, 2] / weights[1, 2] == pytest.approx(code / chat)
    assert weights[0, 0] == weights[1, 0] == 1.0
    statistics.price = []
    assert sensitivities(statistics, ["code", "chat"]).tolist() == [1.0, 1.0]


def test_deep_experts_are_ranked_by_what_they_leave_of_tokens_and_without_tokens_by_mass() -> None:
    statistics = make_statistics()
    deep_experts = deep_experts_of(make_plan(statistics, PlanRequest(count=NUM_EXPERTS, alignment="rank")))
    with_tokens = ranked_deep_experts(statistics, deep_experts, ["chat"])
    statistics.tokens = ExpertStatistics("sha", NUM_LAYERS, NUM_EXPERTS, 2).tokens
    without = ranked_deep_experts(statistics, deep_experts, ["chat"])
    assert set(with_tokens[:4]) == set(without[:4])
    assert sorted(with_tokens) == sorted(without) == list(range(NUM_EXPERTS))


def test_a_plan_of_fixed_deep_experts_by_coverage_takes_the_best_ranked() -> None:
    statistics = make_statistics()
    aligned = deep_experts_of(
        make_plan(statistics, PlanRequest(count=NUM_EXPERTS, criterion="coverage", alignment="rank"))
    )
    chosen = deep_experts_of(make_plan(statistics, PlanRequest(count=3, criterion="coverage", alignment="rank")))
    best = aligned[ranked_deep_experts(statistics, aligned, ["code", "chat"])[:3]]
    assert {tuple(deep_expert) for deep_expert in chosen} == {tuple(deep_expert) for deep_expert in best}
