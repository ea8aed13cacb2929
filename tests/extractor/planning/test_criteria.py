import numpy as np
import pytest

from extractor.planning.criteria import CRITERIA, CriterionError, normalised, ranking, score
from tests.extractor.selection_statistics import NUM_EXPERTS, NUM_LAYERS, expert_of, make_statistics


@pytest.mark.parametrize(
    "criterion", [name for name in CRITERIA if name not in ("aimer", "random", "index", "man", "reap")]
)
def test_every_sum_finds_the_four_experts_that_a_domain_uses(criterion: str) -> None:
    statistics = make_statistics()
    best = ranking(score(statistics, criterion, ["chat"]))[:, :4]
    for layer in range(NUM_LAYERS):
        assert set(best[layer]) == {expert_of("chat", layer, rank) for rank in range(4)}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_finite_and_the_same_every_time(criterion: str) -> None:
    statistics = make_statistics()
    statistics.weight_flatness = np.random.default_rng(0).random((NUM_LAYERS, NUM_EXPERTS))
    first = score(statistics, criterion, seed=3)
    assert first.shape == (NUM_LAYERS, NUM_EXPERTS)
    assert np.isfinite(first).all()
    assert np.array_equal(first, score(statistics, criterion, seed=3))


def test_random_differs_by_seed_and_index_takes_the_first_ids() -> None:
    statistics = make_statistics()
    assert not np.array_equal(score(statistics, "random", seed=1), score(statistics, "random", seed=2))
    assert np.array_equal(ranking(score(statistics, "index")), np.tile(np.arange(NUM_EXPERTS), (NUM_LAYERS, 1)))


def test_a_mean_over_few_picks_is_pulled_to_the_mean_of_its_layer() -> None:
    statistics = make_statistics()
    statistics.totals["picks"][:] = 1000.0
    statistics.totals["gate_output_norm"][:] = 1000.0
    statistics.totals["picks"][:, 0, 5] = 0.5  # one pick over two domains, of a huge output
    statistics.totals["gate_output_norm"][:, 0, 5] = 5.0
    bare, shrunk = (score(statistics, "reap", shrinkage=value)[0, 5] for value in (0.0, 32.0))
    assert bare == pytest.approx(10.0)
    assert 1.0 < shrunk < 1.4


def test_aimer_keeps_the_experts_of_the_lowest_ratio_and_needs_weights() -> None:
    statistics = make_statistics()
    with pytest.raises(CriterionError, match="aimer needs the experts' weights"):
        score(statistics, "aimer")
    statistics.weight_flatness = np.tile(np.arange(NUM_EXPERTS, dtype=float), (NUM_LAYERS, 1))
    assert ranking(score(statistics, "aimer"))[0, 0] == 0


def test_coverage_prefers_tokens_that_have_nothing_yet_over_more_mass() -> None:
    statistics = make_statistics(domains=("code",))
    tokens = statistics.tokens
    tokens.arrays["experts"][:] = [0, 1]  # most tokens share experts 0 and 1
    tokens.arrays["experts"][:90] = [2, 3]  # a third has nothing from those
    tokens.arrays["contributions"][:] = [0.5, 0.5]
    best = ranking(score(statistics, "coverage"))[0, :2]
    assert set(best) == {0, 2}
    assert set(ranking(score(statistics, "coverage"))[0, :4]) == {0, 1, 2, 3}


def test_an_unknown_criterion_is_named_with_those_that_exist() -> None:
    with pytest.raises(CriterionError, match="'magic' does not exist: take one of reap-sum"):
        score(make_statistics(), "magic")


def test_normalised_scores_are_shares_of_their_layer() -> None:
    shares = normalised(np.array([[1.0, 3.0], [-2.0, 0.0], [0.0, 0.0]]))
    assert shares.tolist() == [[0.25, 0.75], [0.0, 1.0], [0.5, 0.5]]
