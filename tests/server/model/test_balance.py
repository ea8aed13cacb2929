"""Memory that moves between slots and KV memory of a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_store.store import Store
from server.model.balance import SlotsAndBlocks, refusal
from server.model.decode_path import load_runner
from server.model.host.runner import HostRunner
from server.model.kv.blocks import BLOCK_TOKENS, NoBlocksError
from server.model.runner import RunnerOptions

CPU = torch.device("cpu")
SLOT_BYTES = 2 * 3 * 32 * 16 * 4
"""Of one slot in each of two layers: three matrices of float32."""
BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 32 * 4


@pytest.fixture
def loaded(small_store: Path) -> Iterator[Callable[..., HostRunner]]:
    runners: list[HostRunner] = []

    def load(**options: Any) -> HostRunner:
        given = {"num_slots": 6, "max_rows": 2, "max_tokens": 128, "kv_memory_bytes": 4 * BLOCK_BYTES} | options
        runner = load_runner(
            Store.open(small_store),
            RunnerOptions(device=CPU, dtype=torch.float32, path="host", **{"memory_balance": "moving"} | given),
        )
        assert isinstance(runner, HostRunner)
        runners.append(runner)
        return runner

    yield load
    for runner in runners:
        runner.close()


def balance(runner: HostRunner, **options: Any) -> SlotsAndBlocks:
    """A balance of the runner that looks after every step and keeps nothing."""
    runner.balance = SlotsAndBlocks(
        runner.model.cache,
        runner.kv,
        blocks_bytes=lambda num_blocks: num_blocks * BLOCK_BYTES,
        **{"look_steps": 1, "kept_looks": 1} | options,
    )
    return runner.balance


def check(runner: HostRunner) -> None:
    runner.balance.check_integrity()
    runner.kv.check_integrity()
    runner.model.cache.check_integrity()


def test_a_row_that_lacks_blocks_gets_the_memory_of_as_few_slots_as_that_takes(
    loaded: Callable[..., HostRunner],
) -> None:
    runner = loaded(max_rows=2)
    first = runner.allocate()
    runner.prefill(first, list(range(1, 4 * BLOCK_TOKENS + 1)))
    assert runner.shares().moves_to_kv == 0
    runner.prefill(runner.allocate(), [5])
    shares = runner.shares()
    assert (shares.moves_to_kv, shares.slot_bytes, shares.kv_bytes) == (1, 4 * SLOT_BYTES, 5 * BLOCK_BYTES)
    check(runner)


def test_slots_stay_at_their_least_and_the_row_waits(loaded: Callable[..., HostRunner]) -> None:
    runner = loaded(max_rows=3)
    assert runner.shares().least_slot_bytes == 6 * SLOT_BYTES, "three rows of two experts"
    runner.prefill(runner.allocate(), list(range(1, 4 * BLOCK_TOKENS + 1)))
    with pytest.raises(NoBlocksError, match="1 more blocks"):
        runner.prefill(runner.allocate(), [5])
    assert runner.shares().moves_to_kv == 0
    check(runner)


def test_slots_get_idle_blocks_when_experts_are_missed_and_never_those_of_rows_or_the_least(
    loaded: Callable[..., HostRunner],
) -> None:
    runner = loaded(num_slots=3, kv_memory_bytes=8 * BLOCK_BYTES, least_tokens=64)
    balance(runner, least_blocks=2)
    row = runner.allocate()
    tokens = np.random.default_rng(0).integers(1, 8000, 3 * BLOCK_TOKENS).tolist()
    sizes = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        runner.prefill(row, tokens[start : start + BLOCK_TOKENS])
        runner.after_step()
        check(runner)
        sizes.append(runner.model.cache.num_slots)
    assert sizes == [4, 5, 6], "one more at every look"
    assert runner.shares().moves_to_slots == 3
    assert runner.kv.usage().num_free >= runner.max_rows


def test_without_misses_nothing_moves(loaded: Callable[..., HostRunner]) -> None:
    runner = loaded(num_slots=8)
    balance(runner)
    runner.prefill(runner.allocate(), [1, 2, 3])
    runner.after_step()
    assert runner.shares().moves_to_slots == 0


def test_blocks_that_were_needed_lately_are_not_lent(loaded: Callable[..., HostRunner]) -> None:
    runner = loaded(num_slots=3, kv_memory_bytes=8 * BLOCK_BYTES)
    balance(runner, kept_looks=3)
    row = runner.allocate()
    runner.prefill(row, list(range(1, 4 * BLOCK_TOKENS)))
    runner.kv.reserve([(other := runner.allocate(), 2 * BLOCK_TOKENS)])
    for _ in range(3):
        runner.after_step()
    runner.kv.free(other)
    runner.kv.free(row)
    slots = []
    for token in range(5):
        runner.prefill(row := runner.allocate(), [100 + 7 * token])
        runner.free(row)
        runner.after_step()
        slots.append(runner.model.cache.num_slots)
    assert slots[0] == 3, "six blocks and one for each row"
    assert slots[-1] > 3
    check(runner)


def test_the_same_bits_while_memory_moves_to_and_fro(loaded: Callable[..., HostRunner]) -> None:
    moving, fixed = loaded(), loaded(memory_balance="fixed", num_slots=8, kv_memory_bytes=8 * BLOCK_BYTES)
    balance(moving, least_slots=2)
    generator = np.random.default_rng(1)
    for turn in range(12):
        rows = [(moving.allocate(), fixed.allocate()) for _ in range(1 + turn % 2)]
        for at, (mine, theirs) in enumerate(rows):
            tokens = generator.integers(1, 8000, 90 - 30 * at if turn % 2 else 9).tolist()
            assert torch.equal(moving.prefill(mine, tokens).logits, fixed.prefill(theirs, tokens).logits)
            moving.after_step()
            check(moving)
        for mine, theirs in rows:
            moving.free(mine)
            fixed.free(theirs)
    shares = moving.shares()
    assert min(shares.moves_to_slots, shares.moves_to_kv) >= 3
    assert shares.slot_bytes + shares.kv_bytes <= 6 * SLOT_BYTES + 4 * BLOCK_BYTES


def test_a_fixed_division_says_why(loaded: Callable[..., HostRunner]) -> None:
    shares = loaded(memory_balance="fixed").shares()
    assert (shares.is_moving, shares.reason) == (False, "memory_balance is fixed")
    assert (shares.least_slot_bytes, shares.least_kv_bytes) == (shares.slot_bytes, shares.kv_bytes)
    assert "whole tensors only" in refusal("moving", torch.device("cuda:0"))
    assert loaded().shares().is_moving
