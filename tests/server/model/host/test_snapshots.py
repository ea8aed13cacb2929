"""Copies of the states of prompts: where they are kept, and how many."""

from __future__ import annotations

from server.model.host.snapshots import CacheRows
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.snapshots import MOST_BORDERS

SALT = b"one mask"
CHUNK = 2 * BLOCK_TOKENS


def prompt(*kinds: int) -> list[int]:
    """A prompt of one chunk of equal tokens for each kind, and one token more."""
    return [token for kind in kinds for token in [kind] * CHUNK] + [99]


def read(rows: CacheRows, tokens: list[int]) -> int:
    """Read a prompt chunk by chunk, as the engine does; the state is the tokens read. Returns those that were found."""
    row, found = rows.allocate(), 0
    while rows.length(row) < len(tokens):
        before = rows.length(row)
        rows.reuse(row, tokens, SALT, CHUNK)
        found += rows.length(row) - before
        start = rows.length(row)
        assert rows.states[row] == (tokens[:start] or None), "another prompt's state"
        end = min(start + CHUNK, len(tokens))
        rows.reserve([(row, end)])
        rows.states[row] = tokens[:end]
        rows.set_length(row, end)
        shared = tokens[: end // CHUNK * CHUNK]
        rows.share(row, shared, SALT, [None] * (len(shared) // BLOCK_TOKENS))
        rows.check_integrity()
    rows.free(row)
    return found


def make(num_blocks: int = 400) -> CacheRows:
    return CacheRows(max_rows=2, num_blocks=num_blocks)


def test_a_prompt_that_leaves_another_in_its_middle_goes_on_from_the_border_before() -> None:
    rows = make()
    assert read(rows, prompt(1, 2, 3, 4, 5, 6)) == 0
    assert read(rows, prompt(1, 2, 3, 7, 8)) == 3 * CHUNK
    assert read(rows, prompt(1, 2, 9)) == 2 * CHUNK


def test_where_borders_are_far_apart_the_third_prompt_finds_all_that_the_second_had_in_common() -> None:
    rows = make(2000)
    start = list(range(1, 24))
    read(rows, prompt(*start, *range(100, 117)))  # 40 chunks, so a border at every fifth
    assert read(rows, prompt(*start, 200, 201)) == 20 * CHUNK
    assert read(rows, prompt(*start, 300, 301)) == 23 * CHUNK


def test_a_prompt_keeps_a_bounded_number_of_copies() -> None:
    rows = make(4000)
    for num_chunks in (1, 7, 8, 9, 40):
        before = len(rows._kept)
        read(rows, prompt(*(1000 * num_chunks + at for at in range(num_chunks))))
        assert 1 <= len(rows._kept) - before <= MOST_BORDERS


def test_copies_that_nobody_used_leave_before_they_cost_the_ends_of_prompts_their_place() -> None:
    rows = make(num_blocks=100)  # copies of 1600 tokens, borders of 800
    for first in (10, 20, 30):
        read(rows, prompt(*range(first, first + 5)))  # an end of 320 tokens, borders of 640 together
    held = {node: node.depth * BLOCK_TOKENS for node in rows._kept}
    assert sum(held.values()) <= 1600
    assert sum(size for node, size in held.items() if node in rows._borders) <= 800
    for first in (10, 20, 30):
        assert read(rows, prompt(*range(first, first + 5))) == 5 * CHUNK


def test_copies_without_room_leave_when_blocks_close() -> None:
    rows = make(num_blocks=100)
    for first in (10, 20, 30):
        read(rows, prompt(*range(first, first + 5)))
    rows.resize(40)  # copies of 640 tokens
    assert sum(node.depth * BLOCK_TOKENS for node in list(rows._kept)[:-1]) <= 640
    assert read(rows, prompt(*range(30, 35))) == 5 * CHUNK
    rows.check_integrity()


def test_a_border_that_was_used_stays_longer_than_others() -> None:
    rows = make(num_blocks=100)
    read(rows, prompt(1, 2, 3, 4, 5))
    assert read(rows, prompt(1, 2, 6)) == 2 * CHUNK
    read(rows, prompt(*range(30, 35)))
    assert read(rows, prompt(1, 2, 7)) == 2 * CHUNK
