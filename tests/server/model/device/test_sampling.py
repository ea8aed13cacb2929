"""Tokens drawn for a batch on the device are those that each row's own sampler draws."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from server.engine.request import SamplingParams
from server.engine.sampling import Sampler
from server.model.device.step.sampling import draw_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 500
WAYS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, do_sample=True, seed=at)
    for at, (temperature, top_k, top_p) in enumerate(
        itertools.product((None, 0.3, 1.7), (None, 1, 20, 10**6), (None, 0.2, 0.95, 1.0))
    )
]


def test_every_way_to_draw_gives_the_samplers_tokens_whatever_the_batch():
    steps = 12
    logits = 3 * torch.randn(steps, len(WAYS), VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alone = [Sampler(params, (0,)) for params in WAYS]
    batched = [Sampler(params, (0,)) for params in WAYS]
    for now in logits:
        wanted = [sampler.choose(row, sampler.choice()) for sampler, row in zip(alone, now, strict=True)]
        choices = [sampler.choice() for sampler in batched]
        given = torch.tensor(
            [[c.temperature, c.top_k or VOCAB, c.top_p, c.draw] for c in choices], dtype=torch.float64, device=DEVICE
        ).T
        tokens, values = draw_tokens(now, now.argmax(dim=-1), given, narrow=True)
        assert tokens.tolist() == wanted
        assert values.tolist() == now.double()[range(len(wanted)), wanted].tolist()
        wide = [at for at, c in enumerate(choices) if (c.top_k or VOCAB) >= VOCAB and c.top_p == 1.0]
        tokens, _ = draw_tokens(now[wide], now[wide].argmax(dim=-1), given[:, wide], narrow=False)
        assert tokens.tolist() == [wanted[at] for at in wide]


def test_a_row_that_draws_nothing_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]], device=DEVICE)
    given = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0], [-1.0, 0.999]], dtype=torch.float64, device=DEVICE)
    best = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    assert draw_tokens(logits, best, given, narrow=True)[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_range_of_draws_give_tokens(draw):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    given = torch.tensor([[0.5], [10], [0.9], [draw]], dtype=torch.float64, device=DEVICE)
    token = int(draw_tokens(logits, logits.argmax(dim=-1), given, narrow=True)[0, 0])
    assert token in logits[0].topk(10).indices.tolist()
