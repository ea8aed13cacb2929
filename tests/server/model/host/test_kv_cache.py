"""The tensors of the blocks: each row reads what it wrote, beside others, after growing, sharing and leaving."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.model.host.kv_cache import BlockCache
from server.model.kv.blocks import BLOCK_TOKENS, NoBlocksError
from server.model.kv.rows import KvRows

CPU = torch.device("cpu")


def cache_of(num_blocks: int = 64, max_rows: int = 4, by_rows: bool = True) -> BlockCache:
    return BlockCache(KvRows(max_rows=max_rows, num_blocks=num_blocks), CPU, by_rows=by_rows)


def fill(cache: BlockCache, row: int, num_tokens: int, value: float) -> None:
    """A prompt's chunk of equal keys, other ones in each of two layers, and their negatives as values."""
    cache.begin_prefill(row, num_tokens)
    for layer in range(2):
        new = torch.full((1, 2, num_tokens, 4), value + layer)
        cache.update(new, -new, layer)
    cache.commit()


def append(cache: BlockCache, rows: list[int], values: list[float]) -> list[list[float]]:
    """One decode step that writes a constant for each row; returns the keys of each row."""
    cache.begin_decode(rows)
    new = torch.tensor(values)[:, None, None, None].expand(-1, 2, 1, 4)
    keys, _ = cache.update(new, new.clone(), 0)
    own = [keys] if len(rows) == 1 else cache.apart[id(keys)][1] if cache.apart else keys.unbind(0)
    read = [one.reshape(2, -1, 4)[1, :length, 3].tolist() for one, length in zip(own, cache.step_lengths, strict=True)]
    cache.commit()
    return read


def test_a_step_that_is_not_committed_leaves_no_trace() -> None:
    cache = cache_of()
    row = cache.kv.allocate()
    cache.begin_prefill(row, 3)
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert cache.kv.length(row) == 0


def test_memory_is_in_proportion_to_the_blocks_in_use_and_given_back_with_the_last() -> None:
    cache = cache_of()
    rows = [cache.kv.allocate(), cache.kv.allocate()]
    for row in rows:
        fill(cache, row, BLOCK_TOKENS, 1.0)
    assert cache.nbytes == 2 * 2 * 2 * BLOCK_TOKENS * 2 * 4 * 4  # rows, layers, keys and values, tokens, heads, dim
    for row in rows:
        cache.kv.free(row)
        cache.release()
    assert cache.nbytes == 0


@pytest.mark.parametrize("by_rows", [True, False], ids=["row by row", "padded"])
def test_rows_whose_blocks_do_not_follow_on_one_another_are_read_in_the_order_of_their_tokens(by_rows: bool) -> None:
    cache = cache_of(num_blocks=4, by_rows=by_rows)
    first, second = cache.kv.allocate(), cache.kv.allocate()
    wanted: dict[int, list[float]] = {first: [], second: []}
    for at in range(2):  # blocks of both rows in turn
        for row in (first, second):
            fill(cache, row, BLOCK_TOKENS - 1 + at, value := 10.0 * row + at + 1)
            wanted[row] += [value] * (BLOCK_TOKENS - 1 + at)
    assert sorted(cache.kv.blocks(first) + cache.kv.blocks(second)) == [0, 1, 2, 3]
    read = append(cache, [second, first], [7.0, 8.0])
    assert read == [[*wanted[second], 7.0], [*wanted[first], 8.0]]


def test_a_row_reads_the_blocks_that_another_one_wrote_and_shared() -> None:
    cache, tokens = cache_of(), list(range(3 * BLOCK_TOKENS))
    first, second = cache.kv.allocate(), cache.kv.allocate()
    cache.kv.reuse(first, tokens, b"")
    fill(cache, first, len(tokens), 5.0)
    cache.kv.share(first, tokens, b"", [None] * 3)
    cache.kv.reuse(second, tokens, b"")
    fill(cache, second, 3, 6.0)
    (read,) = append(cache, [second], [7.0])
    assert read == [5.0] * 2 * BLOCK_TOKENS + [6.0] * 3 + [7.0]
    (read,) = append(cache, [first], [8.0])
    assert read == [5.0] * 3 * BLOCK_TOKENS + [8.0]


def test_several_rows_read_apart_get_tensors_of_the_right_shape_without_a_number() -> None:
    cache = cache_of()
    rows = [cache.kv.allocate(), cache.kv.allocate()]
    fill(cache, rows[0], 5, 1.0)
    cache.begin_decode(rows)
    keys, values = cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert keys.shape == values.shape == (2, 2, 6, 4)
    assert keys.isnan().all()


def test_a_step_without_blocks_changes_nothing() -> None:
    cache = cache_of(num_blocks=2)
    first, second = cache.kv.allocate(), cache.kv.allocate()
    fill(cache, first, BLOCK_TOKENS, 1.0)
    fill(cache, second, BLOCK_TOKENS, 2.0)
    with pytest.raises(NoBlocksError) as told:
        cache.begin_decode([first, second])
    assert told.value.positions == (0, 1)
    cache.kv.free(second)
    assert append(cache, [first], [9.0]) == [[1.0] * BLOCK_TOKENS + [9.0]]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40), st.booleans())
def test_rows_keep_their_own_tokens_through_joining_and_leaving(
    operations: list[tuple[int, bool]], by_rows: bool
) -> None:
    cache = cache_of(num_blocks=8, by_rows=by_rows)
    written: dict[int, list[float]] = {}
    count = 0.0
    for pick, leaves in operations:
        if leaves and written:
            row = list(written)[pick % len(written)]
            cache.kv.free(row)
            cache.release()
            del written[row]
        elif len(written) < 4:
            row = cache.kv.allocate()
            fill(cache, row, 29, count)
            written[row] = [count] * 29
        rows = list(written)[:: 2 if pick % 2 else 1]
        if not rows:
            continue
        values = [count + at for at in range(len(rows))]
        count += len(rows)
        for row, value, read in zip(rows, values, append(cache, rows, values), strict=True):
            written[row].append(value)
            assert read == written[row]


def test_all_rows_in_use_is_the_callers_mistake() -> None:
    cache = cache_of(max_rows=1)
    cache.kv.allocate()
    with pytest.raises(AssertionError, match="all 1 rows"):
        cache.kv.allocate()
