import numpy as np
import pytest

from server.masks.domain_prior import DomainPrior
from server.masks.pools import PoolOptions, PromptPool
from server.masks.profiles import ProfileError
from tests.extractor.selection_statistics import make_statistics
from tests.server.masks.small_masks import E, L, allowed, picks


def test_a_pool_holds_what_the_text_wanted_most() -> None:
    pool = PromptPool(2, L, E)
    pool.see(*picks(3, 3, 3, 1, 1, 5))
    assert allowed(pool.choose()) == {1, 3}


def test_what_was_wanted_lately_counts_more() -> None:
    pool = PromptPool(1, L, E, options=PoolOptions(half_life_tokens=2))
    pool.see(*picks(*[0] * 20))
    pool.see(*picks(4, 4, 4))
    assert allowed(pool.choose()) == {4}
    steady = PromptPool(1, L, E, options=PoolOptions(half_life_tokens=1e9))
    steady.see(*picks(*[0] * 20))
    steady.see(*picks(4, 4, 4))
    assert allowed(steady.choose()) == {0}


def test_seeing_tokens_one_by_one_or_together_chooses_the_same() -> None:
    together, single = PromptPool(3, L, E), PromptPool(3, L, E)
    index, weight = picks(0, 5, 2, 2, 4, 5, 1)
    together.see(index, weight)
    for at in range(index.shape[1]):
        single.see(index[:, at : at + 1], weight[:, at : at + 1])
    assert np.array_equal(together.choose().allowed, single.choose().allowed)


def test_picks_that_do_not_exist_fall_away() -> None:
    pool = PromptPool(1, L, E)
    pool.see(*picks(E, E, E, 2))
    assert allowed(pool.choose()) == {2}


def test_a_pool_of_no_or_too_many_experts_is_refused() -> None:
    for count in (0, E + 1):
        with pytest.raises(ProfileError, match="wanted 1 to 6"):
            PromptPool(count, L, E)


def test_the_prior_adds_what_the_kind_of_text_usually_wants() -> None:
    shares = np.zeros((2, L, E))
    shares[0, :, [0, 1, 2]] = 1 / 3
    shares[1, :, [3, 4, 5]] = 1 / 3
    pool = PromptPool(3, L, E, DomainPrior(shares, ["a", "b"]))
    pool.see(*picks(4, 4))
    assert allowed(pool.choose()) == {3, 4, 5}


def test_the_prior_of_statistics_recognises_its_domains() -> None:
    statistics = make_statistics()
    prior = DomainPrior.of(statistics)
    for domain in statistics.domains:
        seen = statistics.demand_shares(domain) * 50
        assert np.allclose(prior.shares(seen, 20.0), statistics.demand_shares(domain), atol=0.01)


def test_the_prior_tells_which_kind_a_text_is_like() -> None:
    statistics = make_statistics()
    prior = DomainPrior.of(statistics)
    for domain in statistics.domains:
        kinds = prior.kinds(statistics.demand_shares(domain) * 50)
        assert list(kinds) == list(statistics.domains)
        assert max(kinds, key=kinds.__getitem__) == domain
        assert sum(kinds.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="2 names for the shares of 1 domains"):
        DomainPrior(np.ones((1, L, E)), ["code", "prose"])
