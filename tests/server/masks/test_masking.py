from collections.abc import Callable

import numpy as np
import pytest

from server.masks.masking import FixedMasking, PoolMasking, RequestMasks
from server.masks.pools import PoolOptions, PromptPool
from server.masks.profiles import ProfileError
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, SelectiveModel
from tests.server.masks.small_masks import FULL, E, L, allowed, picks


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
