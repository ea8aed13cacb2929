import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from server.engine.request import InvalidRequestError, SamplingParams
from server.engine.sampling import Sampler, keep_top_p
from server.model.runner import MOST_ADJUSTED

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(params: SamplingParams, count: int, prompt: tuple[int, ...] = (0,), eos: tuple[int, ...] = ()) -> list[int]:
    sampler, tokens = Sampler(params, prompt, eos), []
    for _ in range(count):
        tokens.append(sampler.choose(LOGITS, sampler.choice()))
        sampler.take(tokens[-1])
    return tokens


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


@given(st.integers(0, 99), st.floats(0.01, 0.999), st.sampled_from([3, 300, 3000]))
def test_top_p_keeps_what_transformers_keeps(seed: int, top_p: float, vocab: int) -> None:
    scores = 4 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed))
    stock = TopPLogitsWarper(top_p)(torch.zeros((1, 0), dtype=torch.long), scores)[0].isfinite()
    kept = keep_top_p(scores, top_p)[0].isfinite()
    edge = (stock != kept).nonzero()[:, 0].tolist()  # a sum in float32 may end one token away from the sum in float64
    assert len(edge) <= 1
    assert int(kept.sum()) >= 1
    assert (scores[0][kept].min() > scores[0][~kept].max()) if not kept.all() else True


def test_top_p_keeps_or_leaves_equally_likely_tokens_together() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, -torch.inf, 0.0]])
    assert keep_top_p(scores, 0.3)[0].isfinite().tolist() == [True, False, True, False, False]
    assert keep_top_p(scores, 0.8)[0].isfinite().tolist() == [True, True, True, False, True]


def test_a_low_temperature_sharpens() -> None:
    assert set(draws(SamplingParams(temperature=0.05, seed=3), 100)) == {4}


def test_repetition_penalty_counts_prompt_and_output() -> None:
    assert draws(SamplingParams(repetition_penalty=10.0), 3, prompt=(4,)) == [0, 1, 4]


NEUTRAL = {
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "temperature": 1.0,
}


def test_neutral_values_change_nothing_and_leave_the_choice_to_the_runner() -> None:
    assert SamplingParams(**NEUTRAL).is_greedy
    sampler = Sampler(SamplingParams(**NEUTRAL, do_sample=True, seed=5), (0,))
    assert sampler.leaves_choice
    assert [sampler.choose(LOGITS, sampler.choice()) for _ in range(20)] == draws(
        SamplingParams(do_sample=True, seed=5), 20
    )


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 1.2}, {"typical_p": 0.9}], ids=lambda params: next(iter(params))
)
def test_what_a_runner_does_not_know_is_not_left_to_it(params: dict) -> None:
    assert not Sampler(SamplingParams(**params), (0,), (1,)).leaves_choice


def test_what_is_added_to_logits_is_told_to_the_runner_as_it_grows() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.0, 9: 0.0}, min_tokens=2)
    sampler = Sampler(params, (0, 5), (4,))

    def told() -> dict[int, float]:
        assert sampler.leaves_choice
        adjustment = sampler.adjustment
        assert adjustment is not None
        return dict(zip(adjustment.ids.tolist(), adjustment.values.tolist(), strict=True))

    assert told() == {3: 1.0, 4: -math.inf}
    sampler.take(3)
    assert told() == {3: 0.25, 4: -math.inf}
    sampler.take(3)
    assert told() == {3: 0.0, 4: 0.0}
    for token in range(100, 140):
        sampler.take(token)
    assert told() == {3: 0.0, 4: 0.0, **dict.fromkeys(range(100, 140), -0.75)}


def test_more_adjusted_tokens_than_a_runner_has_room_for_are_not_left_to_it() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=1.0), (0,))
    for token in range(MOST_ADJUSTED):
        sampler.take(token)
    assert sampler.leaves_choice
    sampler.take(MOST_ADJUSTED)
    assert not sampler.leaves_choice


def test_an_end_that_comes_too_early_is_not_chosen() -> None:
    assert draws(SamplingParams(min_tokens=2), 3, eos=(4,)) == [0, 0, 4]


def test_min_p_keeps_what_is_likely_beside_the_most_likely() -> None:
    # shares of the most likely: e^-1 = 0.37, e^-2 = 0.14, e^-3, e^-4
    assert set(draws(SamplingParams(min_p=0.3, seed=3), 300)) == {4, 0}
    assert set(draws(SamplingParams(min_p=0.1, seed=3), 300)) == {4, 0, 1}
    assert set(draws(SamplingParams(min_p=1.0, seed=3), 100)) == {4}


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9])
def test_typical_p_keeps_what_transformers_keeps(mass: float) -> None:
    kept = TypicalLogitsWarper(mass)(torch.zeros((1, 0), dtype=torch.long), LOGITS[None])[0].isfinite()
    assert set(draws(SamplingParams(typical_p=mass, seed=3), 1000)) == set(kept.nonzero()[:, 0].tolist())
    assert not kept.all()


def test_presence_is_taken_off_once_and_frequency_for_each_time_over_generated_tokens_alone() -> None:
    assert draws(SamplingParams(presence_penalty=1.5), 6, prompt=(4, 4)) == [4, 0, 4, 4, 4, 4]
    # 4: 3, 1.5, 0, …  0: 2, 0.5, …  1: 1, …
    assert draws(SamplingParams(frequency_penalty=1.5), 6, prompt=(4, 4)) == [4, 0, 4, 1, 0, 2]
    # the most likely comes again and again where being there counts for it
    assert draws(SamplingParams(frequency_penalty=-2.0, logit_bias={0: 1.5}), 3) == [0, 0, 0]


def test_a_bias_is_added_before_all_else_and_bans_or_forces_a_token() -> None:
    assert draws(SamplingParams(logit_bias={4: -100}), 2) == [0, 0]
    assert draws(SamplingParams(logit_bias={3: 100}, do_sample=True, seed=1), 20) == [3] * 20
    assert draws(SamplingParams(logit_bias={1: 1.5, 4: -1}, repetition_penalty=1e-9), 1, prompt=(2,)) == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; at least 1"),
        ({"min_tokens": -1}, "min_tokens is -1; wanted 0 to max_new_tokens 20"),
        ({"min_tokens": 21}, "min_tokens is 21"),
        ({"temperature": 0.0}, "temperature is 0.0; wanted above 0 to 1e\\+06"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; wanted above 0 to 1"),
        ({"min_p": 1.1}, "min_p is 1.1; wanted 0 to 1"),
        ({"typical_p": 0.0}, "typical_p is 0.0; wanted above 0 to 1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; wanted -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"logit_bias": {7: 101}}, "logit_bias of token 7 is 101; wanted -100 to 100"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_range(values: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**values)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.sampled_from([0.5, 1.3, 10.0]))
def test_the_penalty_is_transformers_over_the_whole_sequence(prompt: list[int], penalty: float) -> None:
    sampler, ids = Sampler(SamplingParams(repetition_penalty=penalty), prompt), list(prompt)
    stock = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    for _ in range(8):
        ids.append(int(stock(torch.tensor([ids]), LOGITS[None].clone())[0].argmax()))
        assert sampler.choose(LOGITS, sampler.choice()) == ids[-1]
        sampler.take(ids[-1])


def test_the_logits_are_not_changed() -> None:
    before = LOGITS.clone()
    draws(SamplingParams(temperature=0.5, top_k=2, top_p=0.5, repetition_penalty=2.0, seed=1), 3)
    assert torch.equal(before, LOGITS)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_whole_range_of_seeds_is_taken(seed: int) -> None:
    assert Sampler(SamplingParams(do_sample=True, seed=seed), (0,)).seed == seed
