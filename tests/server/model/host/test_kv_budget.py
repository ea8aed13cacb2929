"""The size of KV memory on the host-driven path, and what is said where it is too small."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.errors import SlotsError
from expert_store.store import Store
from server.model.decode_path import load_runner
from server.model.host import kv_budget
from server.model.host.runner import HostRunner
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RunnerOptions

OPTIONS = RunnerOptions(
    device=torch.device("cpu"), dtype=torch.float32, num_slots=8, path="host", max_rows=4, max_tokens=128
)
BLOCK_BYTES = 2 * 2 * BLOCK_TOKENS * 1 * 32 * 4  # layers, keys and values, tokens, heads, dim, bytes of a float32


@pytest.fixture
def blocks_of(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Blocks of KV memory, and most tokens of a row, where so many bytes are free."""

    def load(free: int | None, **options: Any) -> tuple[int, int]:
        monkeypatch.setattr(kv_budget, "free_host_bytes", lambda: free)
        runner = load_runner(Store.open(small_store), replace(OPTIONS, **options))
        runner.close()
        return runner.kv.pool.num_blocks, runner.max_tokens

    return load


def test_kv_memory_has_no_more_than_all_rows_need(blocks_of: Callable[..., tuple[int, int]]) -> None:
    assert blocks_of(1 << 40) == blocks_of(None) == blocks_of(None, kv_memory_bytes=1 << 40) == (16, 128)


def test_without_a_wish_it_takes_a_share_of_what_is_free(blocks_of: Callable[..., tuple[int, int]]) -> None:
    assert blocks_of(4 * 8 * BLOCK_BYTES) == (8, 128)
    assert blocks_of(4 * 2 * BLOCK_BYTES, least_tokens=64) == (2, 64)


def test_one_request_gets_more_than_the_share_where_it_needs_it(blocks_of: Callable[..., tuple[int, int]]) -> None:
    assert blocks_of(6 * BLOCK_BYTES) == (4, 128)


def test_it_gets_what_was_asked_for(blocks_of: Callable[..., tuple[int, int]]) -> None:
    assert blocks_of(1 << 40, kv_memory_bytes=5 * BLOCK_BYTES + 1) == (5, 128)


@pytest.mark.parametrize(
    ("free", "asked", "message"),
    [
        (3 * BLOCK_BYTES, None, r"bytes are free for KV memory, which hold 96 tokens, and one request may have 128"),
        (1 << 40, 3 * BLOCK_BYTES, r"kv_memory of \d+ bytes holds 96 tokens.*set max_context_tokens to at most 96"),
        (1 << 40, 9, r"holds 0 tokens.*lower slots_memory"),
    ],
)
def test_too_little_for_one_request_is_told_with_figures(
    blocks_of: Callable[..., tuple[int, int]], free: int, asked: int | None, message: str
) -> None:
    with pytest.raises(SlotsError, match=message):
        blocks_of(free, kv_memory_bytes=asked)


def test_the_bytes_of_a_block_are_those_that_the_layers_take(small_store: Path) -> None:
    runner = load_runner(Store.open(small_store), OPTIONS)
    assert isinstance(runner, HostRunner)
    runner.prefill(runner.allocate(), [1, 2, 3])
    assert runner.cache.nbytes == BLOCK_BYTES
    runner.close()


def test_many_short_requests_fit_where_few_long_ones_do(small_store: Path) -> None:
    options = replace(OPTIONS, max_rows=64, kv_memory_bytes=64 * BLOCK_BYTES)  # or sixteen of 128 tokens
    runner = load_runner(Store.open(small_store), options)
    for _ in range(64):
        runner.prefill(runner.allocate(), [1, 2, 3])
    assert runner.kv.usage().num_free == 0
    runner.close()
