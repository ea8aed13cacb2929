"""Tokens chosen for a batch on the device are those that each row's own sampler chooses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.engine.request import SamplingParams
from server.engine.sampling import Sampler
from server.model.device.step.sampling import DrawKind, DrawRoom, TokenDraw
from server.model.runner import Adjustment, Choice, RowStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 500
PLAIN, NARROWED, ALL = DrawKind(), DrawKind(narrowed=True), DrawKind(True, True, True)
DRAWN = [SamplingParams(do_sample=True, seed=1), SamplingParams(temperature=1.7, min_p=0.1, seed=2)]
NARROW = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, do_sample=True, seed=3)
    for temperature, top_k, top_p, min_p in [
        (None, 1, None, None), (0.3, 20, None, None), (None, None, 0.2, None), (1.7, None, 0.95, None),
        (1.7, 20, 0.7, None), (None, 10**6, 0.9, 0.05), (None, 40, None, 0.2),
    ]
]  # fmt: skip
ADJUSTED = [
    SamplingParams(logit_bias={3: 100.0}),
    SamplingParams(min_tokens=9),
    SamplingParams(presence_penalty=2.0, frequency_penalty=-0.5, logit_bias={7: -3.0, 8: 4.0}),
    SamplingParams(frequency_penalty=1.5, temperature=0.8, top_p=0.5, seed=4),
]
WAYS = [SamplingParams(), *DRAWN, *NARROW, *ADJUSTED]


def device_logits(*size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chosen(logits: Tensor, kind: DrawKind, steps: list[RowStep]) -> list[int]:
    """The tokens that the device chooses; their logits are those of the model."""
    draw = TokenDraw(logits, kind, DrawRoom(len(logits), logits.shape[1], logits.device))
    draw.capture()
    draw.enqueue(steps)
    if logits.is_cuda:
        torch.cuda.synchronize()
    tokens = draw.drawn[0].long()
    assert draw.drawn[1].tolist() == logits.cpu().gather(1, tokens[:, None])[:, 0].double().tolist()
    return tokens.tolist()


def steps_of(samplers: list[Sampler], allowed: np.ndarray | None = None) -> list[RowStep]:
    """The rows' inputs; `allowed` bool [V] is that of the odd rows."""
    words = None if allowed is None else np.packbits(allowed, bitorder="little")
    padded = None if words is None else np.concatenate([words, np.zeros(-len(words) % 4, np.uint8)]).view(np.uint32)
    return [
        RowStep(
            at, 0, choice=sampler.choice(), adjustment=sampler.adjustment,
            allowed=(lambda: padded) if padded is not None and at % 2 else None,
        )
        for at, sampler in enumerate(samplers)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        pytest.param(PLAIN, DRAWN, marks=pytest.mark.exhaustive),
        pytest.param(NARROWED, NARROW, marks=pytest.mark.exhaustive),
        (ALL, WAYS),
    ],
    ids=["drawn", "narrowed", "all"],
)
def test_every_way_to_choose_gives_the_samplers_tokens_whatever_the_batch(
    kind: DrawKind, ways: list[SamplingParams]
) -> None:
    allowed = np.random.default_rng(5).random(VOCAB) < 0.3 if kind.constrained else None
    alone, batched = ([Sampler(params, (0,), (5,)) for params in ways] for _ in range(2))
    for seed in range(2):
        logits = device_logits(len(ways), VOCAB, seed=seed)
        wanted = [
            sampler.choose(row, sampler.choice(), allowed if at % 2 else None)
            for at, (sampler, row) in enumerate(zip(alone, logits, strict=True))
        ]
        assert chosen(logits, kind, steps_of(batched, allowed)) == wanted
        for sampler, token in zip([*alone, *batched], wanted * 2, strict=True):
            sampler.take(token)


def test_what_other_rows_ask_for_changes_no_token() -> None:
    logits = device_logits(2, 2500)
    steps = [RowStep(0, 0, choice=Choice(1.0, None, 1.0, draw)) for draw in (0.1, 0.9)]
    tokens = [chosen(logits, kind, steps) for kind in DrawKind.all()]
    assert tokens == [tokens[0]] * 8


def test_a_greedy_row_takes_the_lowest_of_equally_likely_tokens_and_rows_past_the_end_too() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], device=DEVICE)
    assert chosen(logits, NARROWED, [RowStep(0, 0), RowStep(1, 0, choice=Choice(1.0, 3, 1.0, 0.999))]) == [1, 2, 0, 2]


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(2, 1.0, {1, 2, 3}), (1, 1.0, {1}), (None, 0.6, {1, 2, 3})])
def test_tokens_that_are_equally_likely_are_kept_or_left_together(
    top_k: int | None, top_p: float, kept: set[int]
) -> None:
    logits = torch.tensor([[-0.0, 3.0, 2.0, 2.0, 0.0]], device=DEVICE).repeat(8, 1)
    steps = [RowStep(at, 0, choice=Choice(1.0, top_k, top_p, at / 8)) for at in range(8)]
    assert set(chosen(logits, NARROWED, steps)) == kept


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_range_of_draws_give_tokens(draw: float) -> None:
    logits = device_logits(1, VOCAB, seed=1)
    [token] = chosen(logits, NARROWED, [RowStep(0, 0, choice=Choice(0.5, 10, 0.9, draw))])
    assert token in logits[0].topk(10).indices.tolist()
    [least] = chosen(logits, NARROWED, [RowStep(0, 0, choice=Choice(1.0, None, 5e-324, draw))])
    assert least == int(logits[0].argmax())


def test_a_banned_token_is_never_chosen_and_one_allowed_token_always_is() -> None:
    logits = device_logits(2, 64)
    best = int(logits[0].argmax())
    ban = Adjustment(np.array([best], dtype=np.int32), np.array([-np.inf], dtype=np.float32))
    only = np.array([0, 1 << 3], dtype=np.uint32)  # token 35
    bias = Adjustment(np.array([1], dtype=np.int32), np.array([100.0], dtype=np.float32))
    steps = [RowStep(0, 0, adjustment=ban), RowStep(1, 0, adjustment=bias, allowed=lambda: only)]
    assert chosen(logits, DrawKind(adjusted=True, constrained=True), steps) == [int(logits[0].topk(2).indices[1]), 35]
