"""Rows of the device-driven path take blocks as they grow, share those of common beginnings, and survive a lack of
memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from server.model.kv.blocks import BLOCK_TOKENS, NoBlocksError
from server.model.runner import RowStep, StepMemoryError
from tests.server.model.device.small import greedy

PROMPT = [20 + 7 * at % 60 for at in range(BLOCK_TOKENS + 16)]
CHUNKS = [PROMPT[:BLOCK_TOKENS], PROMPT[BLOCK_TOKENS:]]
SALT = b"of a test"
BLOCK_BYTES = 2 * 2 * 32 * 4 * BLOCK_TOKENS
"""Keys and values, layers, head_dim, float32: of `small_store`."""


def decoded(runner: Any, rows: list[int], tokens: list[int]) -> list[torch.Tensor]:
    """Logits [V] of one step of each row."""
    output = runner.decode([RowStep(row, token) for row, token in zip(rows, tokens, strict=True)])
    return list(output.logits.clone())


def read_and_share(runner: Any, row: int) -> None:
    """Reads the first chunk as the engine does."""
    assert runner.kv.reuse(row, PROMPT, SALT, BLOCK_TOKENS) == []
    runner.prefill(row, CHUNKS[0])
    runner.kv.share(row, CHUNKS[0], SALT, [None])


@pytest.mark.exhaustive
def test_rows_that_cross_a_block_while_they_decode_agree_with_the_host_driven_path(small_store, runners):
    device, host = (runners(small_store, kind) for kind in ("device", "host"))
    prompts = [PROMPT[: BLOCK_TOKENS - 2], PROMPT[:3]]
    assert greedy(device, prompts, 4, [None, None]) == greedy(host, prompts, 4, [None, None])
    device.kv.check_integrity()
    assert device.kv.pool.num_used == 0


def test_a_prompt_whose_beginning_was_found_has_the_bits_of_one_that_was_read(small_store, runners):
    device = runners(small_store)
    first = device.allocate()
    read_and_share(device, first)
    wanted = [device.prefill(first, CHUNKS[1]).logits[0].clone(), *(decoded(device, [first], [t])[0] for t in (5, 6))]
    second = device.allocate()
    assert device.kv.reuse(second, PROMPT, SALT, BLOCK_TOKENS) == [None]
    assert device.kv.blocks(second) == device.kv.blocks(first)[:1]
    got = [device.prefill(second, CHUNKS[1]).logits[0].clone()]
    got.append(decoded(device, [second], [5])[0])
    device.free(first)
    got.append(decoded(device, [second], [6])[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
    device.kv.check_integrity()


@pytest.mark.exhaustive
def test_rows_beside_one_another_read_the_same_blocks_and_write_their_own(small_store, runners):
    device = runners(small_store)
    rows = [device.allocate(), device.allocate()]
    read_and_share(device, rows[0])
    device.kv.reuse(rows[1], PROMPT, SALT, BLOCK_TOKENS)
    alone = [decoded(device, [row], [token])[0] for row, token in zip(rows, (5, 9), strict=True)]
    device.rows.take_back(rows, 1)
    together = decoded(device, rows, [5, 9])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
    assert not torch.equal(*together)


def test_a_step_without_blocks_left_changes_nothing_and_runs_when_a_row_was_freed(small_store, runners):
    device = runners(small_store, kv_memory_bytes=2 * BLOCK_BYTES, least_tokens=BLOCK_TOKENS)
    assert device.max_tokens == device.kv.pool.num_blocks * BLOCK_TOKENS == 2 * BLOCK_TOKENS
    rows = [device.allocate(), device.allocate()]
    device.prefill(rows[0], PROMPT[:3])
    device.prefill(rows[1], PROMPT[: BLOCK_TOKENS - 1])
    decoded(device, rows, [5, 6])
    with pytest.raises(NoBlocksError) as refused:
        device.decode([RowStep(row, 7) for row in rows])
    assert refused.value.positions == (1,)
    assert [device.kv.length(row) for row in rows] == [4, BLOCK_TOKENS]
    with pytest.raises(NoBlocksError):
        device.prefill(rows[1], [7, 8])
    device.free(rows[0])
    got = decoded(device, [rows[1]], [7])[0]
    device.free(rows[1])
    row = device.allocate()
    device.prefill(row, PROMPT[: BLOCK_TOKENS - 1])
    decoded(device, [row], [6])
    assert torch.equal(decoded(device, [row], [7])[0], got)
    device.kv.check_integrity()


def failing_once(call: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The call, after which the first time an error is raised."""
    left = [error]

    def failing(*args: Any, **options: Any) -> Any:
        result = call(*args, **options)
        if left:
            raise left.pop()
        return result

    return failing


def test_memory_that_ends_in_a_step_fails_its_longest_row_and_the_others_go_on(small_store, runners, monkeypatch):
    device = runners(small_store)
    rows = [device.allocate(), device.allocate()]
    for row, prompt in zip(rows, (PROMPT[:3], PROMPT[:7]), strict=True):
        device.prefill(row, prompt)
    wanted = decoded(device, rows, [5, 6])
    device.rows.take_back(rows, 1)
    graph = device.graphs.step(2, masked=False)
    monkeypatch.setattr(graph, "enqueue", failing_once(graph.enqueue, RuntimeError("CUDA error: out of memory")))
    with pytest.raises(StepMemoryError, match="memory for a step of 2 tokens ended") as failed:
        device.decode([RowStep(rows[0], 5), RowStep(rows[1], 6)])
    assert failed.value.positions == (1,)
    assert (failed.value.__context__, failed.value.__cause__) == (None, None)
    assert device._state.lengths[rows].tolist() == [3, 7]
    assert torch.equal(decoded(device, [rows[0]], [5])[0], wanted[0])
    assert torch.equal(decoded(device, [rows[1]], [6])[0], wanted[1])


@pytest.mark.parametrize("where", ["begin", "forward"])
def test_memory_that_ends_in_a_prompt_fails_its_row_and_leaves_it_as_it_was(small_store, runners, monkeypatch, where):
    device = runners(small_store)
    row, other = device.allocate(), device.allocate()
    device.prefill(other, PROMPT[:2])
    wanted = device.prefill(row, PROMPT[:5]).logits.clone()
    device.rows.take_back([row], 5)
    monkeypatch.setattr(
        device._stream,
        where,
        failing_once(getattr(device._stream, where), torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(StepMemoryError, match="memory for a step of 5 tokens ended") as failed:
        device.prefill(row, PROMPT[:5])
    assert failed.value.positions == (0,)
    assert (failed.value.__context__, failed.value.__cause__) == (None, None)
    assert [device.kv.length(held) for held in (row, other)] == [0, 2]
    assert torch.equal(device.prefill(row, PROMPT[:5]).logits, wanted)


@pytest.mark.exhaustive
def test_an_error_that_is_no_lack_of_memory_is_raised_as_it_is(small_store, runners, monkeypatch):
    device = runners(small_store)
    row = device.allocate()
    device.prefill(row, PROMPT[:3])
    graph = device.graphs.step(1, masked=False)
    monkeypatch.setattr(graph, "enqueue", failing_once(graph.enqueue, RuntimeError("CUDA error: device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        device.decode([RowStep(row, 5)])
