import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.model.kv_cache import RowCache

CPU = torch.device("cpu")


def append(cache: RowCache, handles: list[int], values: list[float]) -> torch.Tensor:
    """One decode step that writes a constant per row in one layer; returns the keys of those rows."""
    cache.begin_decode(handles)
    new = torch.tensor(values)[:, None, None, None].expand(-1, 2, 1, 4)
    keys, same = cache.update(new, new.clone(), 0)
    assert torch.equal(keys, same)
    cache.commit()
    return keys


def test_a_step_that_is_not_committed_leaves_no_trace() -> None:
    cache = RowCache(max_rows=2, max_tokens=8, device=CPU)
    row = cache.allocate()
    cache.begin_prefill(row, 3)
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert cache.length(row) == 0


def test_memory_is_given_back_when_no_row_is_in_use() -> None:
    cache = RowCache(max_rows=2, max_tokens=512, device=CPU)
    row = cache.allocate()
    append(cache, [row], [1.0])
    assert cache.nbytes > 0
    cache.free(row)
    assert cache.nbytes == 0


def test_memory_grows_by_doubling_up_to_its_bounds() -> None:
    cache = RowCache(max_rows=3, max_tokens=100, device=CPU)
    rows = [cache.allocate() for _ in range(3)]
    for row in rows:
        cache.begin_prefill(row, 100)
        cache.update(torch.ones(1, 1, 100, 1), torch.ones(1, 1, 100, 1), 0)
        cache.commit()
    assert cache.nbytes == 2 * 3 * 100 * 4


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_rows_keep_their_own_tokens_through_joining_and_leaving(operations: list[tuple[int, bool]]) -> None:
    cache = RowCache(max_rows=4, max_tokens=64, device=CPU)
    written: dict[int, list[float]] = {}
    count = 0.0
    for pick, leaves in operations:
        if leaves and written:
            handle = list(written)[pick % len(written)]
            cache.free(handle)
            del written[handle]
        elif len(written) < 4:
            written[cache.allocate()] = []
        handles = list(written)[:: 2 if pick % 2 else 1]
        if not handles:
            continue
        handles = [handles[at] for at in cache.order(handles)]
        values = [count + at for at in range(len(handles))]
        count += len(handles)
        keys = append(cache, handles, values)
        for at, handle in enumerate(handles):
            written[handle].append(values[at])
            assert keys[at, 0, : len(written[handle]), 0].tolist() == written[handle]
            assert cache.length(handle) == len(written[handle])


def test_all_rows_in_use_is_the_callers_mistake() -> None:
    cache = RowCache(max_rows=1, max_tokens=8, device=CPU)
    cache.allocate()
    with pytest.raises(AssertionError, match="all 1 rows"):
        cache.allocate()
