"""Every family goes on from a beginning that another request read, with the bits of reading it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expert_store.store import Store
from server.model.host.assembly import HostModel
from server.model.host.sequence_runner import make_runner
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RowStep, Runner
from tests.families.checkpoints import random_model
from tests.families.serving import assembled, served_families
from tests.families.test_whole_model import extracted

EVERYDAY = ("qwen3_moe", "qwen3_next")
"""One that keeps only keys and values, and one that keeps a state beside them."""
TOKENS = torch.randint(3, 90, (110,), generator=torch.Generator().manual_seed(7)).tolist()
"""A prompt whose first 96 tokens are three blocks."""


def read(runner: Runner, tokens: list[int]) -> tuple[Tensor, int]:
    """Logits of a prompt's last token and of two decode steps, and the tokens of it that were found."""
    row = runner.allocate()
    found = 0
    while (start := runner.kv.length(row)) < len(tokens):
        runner.kv.reuse(row, tokens, b"")
        found += runner.kv.length(row) - start
        start = runner.kv.length(row)
        last = runner.prefill(row, tokens[start : start + BLOCK_TOKENS]).logits[0]
        end = runner.kv.length(row) // BLOCK_TOKENS
        runner.kv.share(row, tokens[: end * BLOCK_TOKENS], b"", [None] * end)
    logits = [last]
    logits += [runner.decode([RowStep(row, token)]).logits[0].clone() for token in (5, 6)]
    runner.free(row)
    runner.kv.check_integrity()
    return torch.stack(logits), found


def fresh(model: HostModel, tokens: list[int]) -> Tensor:
    logits, found = read(make_runner(model, max_rows=1, max_tokens=160), tokens)
    assert found == 0
    return logits


@pytest.mark.parametrize("family", served_families(EVERYDAY))
def test_a_prompt_that_begins_alike_has_the_logits_of_one_read_anew(
    family: str, tmp_path: Path, repository: Path
) -> None:
    extracted(random_model(family), tmp_path, repository).close()
    model = assembled(Store.open(tmp_path / "store"), 8)
    runner = make_runner(model, max_rows=1, max_tokens=160)
    read(runner, TOKENS[:100])
    for tokens in (TOKENS, [*TOKENS[:97], 3, 4], TOKENS):
        logits, found = read(runner, tokens)
        assert found == 3 * BLOCK_TOKENS
        assert torch.equal(logits, fresh(model, tokens))
    model.close()


@pytest.mark.parametrize("family", EVERYDAY)
def test_the_common_beginning_of_two_prompts_is_found_with_the_logits_of_reading_it_anew(
    family: str, tmp_path: Path, repository: Path
) -> None:
    extracted(random_model(family), tmp_path, repository).close()
    model = assembled(Store.open(tmp_path / "store"), 8)
    runner = make_runner(model, max_rows=1, max_tokens=640)
    read(runner, TOKENS)
    for common in (64, 64, 32):
        tokens = [*TOKENS[:common], *reversed(TOKENS[: 100 - common])]
        logits, found = read(runner, tokens)
        assert found >= common
        assert torch.equal(logits, fresh(model, tokens))
    model.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rows_decode_together_as_alone_whether_attention_makes_keys_of_what_it_finds_or_not(
    family: str, tmp_path: Path, repository: Path
) -> None:
    extracted(random_model(family), tmp_path, repository).close()
    model = assembled(Store.open(tmp_path / "store"), 8)
    prompts = [TOKENS[:9], TOKENS[20:60]]

    def decoded(together: bool) -> list[Tensor]:
        runner = make_runner(model, max_rows=2, max_tokens=64)
        rows = [runner.allocate() for _ in prompts]
        for row, prompt in zip(rows, prompts, strict=True):
            runner.prefill(row, prompt)
        steps = [[RowStep(row, 5) for row in rows]] if together else [[RowStep(row, 5)] for row in rows]
        return [logits.clone() for step in steps for logits in runner.decode(step).logits]

    for one, other in zip(decoded(True), decoded(False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    model.close()
