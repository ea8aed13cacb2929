from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from extractor.planning.plan import Plan, PlannedExpert, write_plan
from router.mask import ExpertMask
from server.masks.domain_prior import DomainPrior
from server.masks.masking import FixedMasking, PoolMasking, RequestMasks
from server.masks.pools import PoolOptions, PromptPool
from server.masks.profiles import ProfileError, find_profile, load_profiles
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, SelectiveModel
from tests.extractor.selection_statistics import make_statistics

L, E = 2, 6
FULL = ExpertMask(np.ones((L, E), dtype=np.bool_))


def picks(*experts: int) -> tuple[np.ndarray, np.ndarray]:
    """One token for each expert, which it wants alone, in both layers."""
    index = np.tile(np.array(experts)[None, :, None], (L, 1, 1))
    return index, np.ones(index.shape, dtype=np.float32)


def allowed(mask: ExpertMask | None, layer: int = 0) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(mask.allowed[layer]))


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


def test_the_prompt_runs_whole_and_the_pool_follows_the_text() -> None:
    masking = PoolMasking(PromptPool(1, L, E, options=PoolOptions(refresh_tokens=2, half_life_tokens=1)), 3)
    masking.observe(*picks(0, 0))
    assert masking.mask is None
    masking.observe(*picks(0))
    first = masking.mask
    assert allowed(first) == {0}
    masking.observe(*picks(5))
    assert masking.mask is first
    masking.observe(*picks(5))
    assert allowed(masking.mask) == {5}


def test_an_unchanged_choice_keeps_the_same_mask() -> None:
    masking = PoolMasking(PromptPool(1, L, E, options=PoolOptions(refresh_tokens=1)), 1)
    masking.observe(*picks(2))
    first = masking.mask
    masking.observe(*picks(2))
    assert masking.mask is first


def test_a_pool_of_no_or_too_many_experts_is_refused() -> None:
    for count in (0, E + 1):
        with pytest.raises(ProfileError, match="wanted 1 to 6"):
            PromptPool(count, L, E)


def write(path: Path, columns: list[tuple[int, ...]], num_experts: int = E) -> Path:
    deep = tuple(PlannedExpert(column) for column in columns)
    write_plan(path, Plan(L, num_experts, {"kind": "free"}, deep))
    return path


def test_profiles_are_plans_by_the_name_of_their_file(tmp_path: Path) -> None:
    profiles = load_profiles([write(tmp_path / "code.json", [(0, 3), (1, 2)])], FULL)
    code = find_profile(profiles, "code")
    assert (allowed(code, 0), allowed(code, 1)) == ({0, 1}, {2, 3})
    assert FixedMasking(code).mask is code
    with pytest.raises(ProfileError, match="no such profile: this server has code"):
        find_profile(profiles, "chat")


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="the plan is for 2 layers of 9 experts"):
        load_profiles([write(tmp_path / "code.json", [(0, 3)], num_experts=9)], FULL)


def test_a_request_in_a_batch_gets_the_pool_and_the_logits_it_gets_alone(
    selective: Callable[..., SelectiveModel],
) -> None:
    model = selective()
    prompts = ["Once upon a time", "The capital of France is"]

    def run(chosen: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        runner = HostRunner(model, max_rows=4, max_tokens=64)
        rows, maskings, tokens = [], [], []
        for prompt in chosen:
            ids = model.tokenizer(prompt)["input_ids"]
            masking = PoolMasking(PromptPool(12, 8, 64, options=PoolOptions(refresh_tokens=2)), len(ids))
            rows.append(runner.allocate())
            output = runner.prefill(rows[-1], ids)
            masking.observe(output.record.served_index, output.record.served_weight)
            maskings.append(masking)
            tokens.append(int(output.logits[0].argmax()))
        for _ in range(4):
            output = runner.decode(
                [RowStep(row, token, mask=one.mask) for row, token, one in zip(rows, tokens, maskings, strict=True)]
            )
            tokens = [int(line.argmax()) for line in output.logits]
            record = output.record
            assert record.demand_index is not None
            assert record.demand_weight is not None
            for at, masking in enumerate(maskings):
                masking.observe(record.demand_index[:, at : at + 1], record.demand_weight[:, at : at + 1])
        return [
            (masking.mask.allowed, line.numpy())
            for masking, line in zip(maskings, output.logits, strict=True)
            if masking.mask is not None
        ]

    together = run(prompts)
    for prompt, (mask, logits) in zip(prompts, together, strict=True):
        ((alone_mask, alone_logits),) = run([prompt])
        assert np.array_equal(mask, alone_mask)
        assert np.allclose(logits, alone_logits, atol=1e-4)


def test_a_request_asks_for_a_profile_a_pool_or_nothing() -> None:
    masks = RequestMasks({"code": FULL}, L, E)
    assert masks.masking(3) is None
    fixed = masks.masking(3, profile="code")
    assert isinstance(fixed, FixedMasking)
    assert fixed.mask is FULL
    for pool in (3, 0.5):
        masking = masks.masking(2, pool=pool)
        assert masking is not None
        masking.observe(*picks(0, 5))
        assert len(allowed(masking.mask)) == 3
    for arguments, message in (
        ({"profile": "code", "pool": 3}, "contradict"),
        ({"profile": "chat"}, "no such profile"),
        ({"pool": 7}, "wanted 1 to 6"),
        ({"pool": 0}, "wanted 1 to 6"),
        ({"pool": 1.5}, "a share from 0 to 1"),
        ({"pool": True}, "a share from 0 to 1"),
    ):
        with pytest.raises(ProfileError, match=message):
            masks.masking(2, **arguments)  # type: ignore[arg-type]
