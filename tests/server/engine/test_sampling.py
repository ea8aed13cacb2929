import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from server.engine.request import SamplingParams
from server.engine.sampling import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(params: SamplingParams, count: int, prompt: tuple[int, ...] = (0,)) -> list[int]:
    sampler = Sampler(params, prompt)
    return [sampler.choose(LOGITS) for _ in range(count)]


def test_greedy_takes_the_most_likely_and_has_no_seed() -> None:
    assert draws(SamplingParams(), 3) == [4, 4, 4]
    assert Sampler(SamplingParams(), (0,)).seed is None


def test_temperature_one_alone_is_greedy_unless_sampling_is_asked_for() -> None:
    assert SamplingParams(temperature=1.0).is_greedy
    assert not SamplingParams(temperature=1.0, do_sample=True).is_greedy


@given(st.integers(0, 2**64 - 1))
def test_the_same_seed_draws_the_same_tokens(seed: int) -> None:
    params = SamplingParams(do_sample=True, seed=seed)
    assert draws(params, 8) == draws(params, 8)


def test_without_a_seed_each_request_gets_its_own() -> None:
    samplers = [Sampler(SamplingParams(do_sample=True), (0,)) for _ in range(2)]
    assert samplers[0].seed is not None
    assert samplers[0].seed != samplers[1].seed


def test_frequencies_follow_the_probabilities() -> None:
    counts = torch.bincount(torch.tensor(draws(SamplingParams(do_sample=True, seed=1), 4000)), minlength=5) / 4000
    assert torch.allclose(counts, torch.softmax(LOGITS, -1), atol=0.03)


def test_top_k_and_top_p_leave_only_the_most_likely() -> None:
    assert set(draws(SamplingParams(top_k=2, seed=3), 200)) == {4, 0}
    assert set(draws(SamplingParams(top_p=0.6, seed=3), 200)) == {4}


def test_a_low_temperature_sharpens() -> None:
    assert set(draws(SamplingParams(temperature=0.05, seed=3), 100)) == {4}


def test_repetition_penalty_counts_prompt_and_output() -> None:
    assert draws(SamplingParams(repetition_penalty=10.0), 3, prompt=(4,)) == [0, 1, 4]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.sampled_from([0.5, 1.3, 10.0]))
def test_the_penalty_is_transformers_over_the_whole_sequence(prompt: list[int], penalty: float) -> None:
    sampler, ids = Sampler(SamplingParams(repetition_penalty=penalty), prompt), list(prompt)
    stock = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    for _ in range(8):
        ids.append(int(stock(torch.tensor([ids]), LOGITS[None].clone())[0].argmax()))
        assert sampler.choose(LOGITS) == ids[-1]


def test_the_logits_are_not_changed() -> None:
    before = LOGITS.clone()
    draws(SamplingParams(temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=2.0, seed=1), 3)
    assert torch.equal(before, LOGITS)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_whole_range_of_seeds_is_taken(seed: int) -> None:
    assert Sampler(SamplingParams(do_sample=True, seed=seed), (0,)).seed == seed
