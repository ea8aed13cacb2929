import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.model.host.kv_cache import RowCache
from server.model.runner import StepMemoryError

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


class Allocator:
    """Gives `zeros` as long as a tensor has at most `most` elements and `left` calls are left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.left = 1 << 30, 1 << 30
        self._zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", self)

    def __call__(self, shape: tuple[int, ...], **options: object) -> torch.Tensor:
        self.left -= 1
        if self.left < 0 or torch.Size(shape).numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._zeros(shape, **options)


def fill(cache: RowCache, handle: int, num_tokens: int, value: float) -> None:
    cache.begin_prefill(handle, num_tokens)
    for layer in range(2):
        new = torch.full((1, 1, num_tokens, 1), value + layer)
        cache.update(new, -new, layer)
    cache.commit()


def rows_of(cache: RowCache, handle: int) -> list[list[float]]:
    """What a row would read of each layer's keys and values at the next step, which is not committed."""
    cache.begin_prefill(handle, 1)
    nothing = torch.full((1, 1, 1, 1), 0.0)
    return [memory[0, 0, :-1, 0].tolist() for layer in range(2) for memory in cache.update(nothing, nothing, layer)]


@pytest.mark.parametrize("layers_that_grow", [0, 1, 3])
def test_a_row_that_gets_no_memory_leaves_all_rows_as_they_were(
    monkeypatch: pytest.MonkeyPatch, layers_that_grow: int
) -> None:
    cache, allocator = RowCache(max_rows=4, max_tokens=512, device=CPU), Allocator(monkeypatch)
    first, second = cache.allocate(), cache.allocate()
    fill(cache, first, 60, 1.0)
    before = rows_of(cache, first)
    allocator.left = layers_that_grow
    with pytest.raises(StepMemoryError, match=r"row of 100 tokens beside the \d+ bytes.*1 rows of 64.*max_batch_size"):
        fill(cache, second, 100, 7.0)
    assert rows_of(cache, first) == before
    cache.free(second)
    allocator.left = 1 << 30
    third = cache.allocate()
    fill(cache, third, 200, 3.0)
    assert rows_of(cache, first) == before
    assert rows_of(cache, third) == [[3.0] * 200, [-3.0] * 200, [4.0] * 200, [-4.0] * 200]


def test_where_twice_as_much_is_not_to_be_had_what_is_needed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, allocator = RowCache(max_rows=4, max_tokens=512, device=CPU), Allocator(monkeypatch)
    row = cache.allocate()
    fill(cache, row, 64, 1.0)
    allocator.most = 65
    append_one = [cache.begin_decode([row]), *(cache.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0))]
    assert append_one[1].shape[2] == 65


def test_of_several_rows_only_those_too_long_for_the_memory_there_is_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, allocator = RowCache(max_rows=4, max_tokens=512, device=CPU), Allocator(monkeypatch)
    rows = [cache.allocate() for _ in range(3)]
    for row, tokens in zip(rows, (10, 64, 20), strict=True):
        fill(cache, row, tokens, float(row))
    allocator.left = 0
    with pytest.raises(StepMemoryError) as raised:
        cache.begin_decode(rows)
    assert raised.value.positions == (1,)
    assert cache.begin_decode([rows[0], rows[2]]).tolist() == [10, 20]


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
