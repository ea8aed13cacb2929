"""Rows, blocks and the prefix tree against a model of what every block must hold."""

from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.model.kv.blocks import BLOCK_TOKENS, BlockPool, NoBlocksError, num_blocks_of
from server.model.kv.prefixes import block_digests
from server.model.kv.rows import KvRows, KvUsage

SALT, OTHER = b"one mask", b"another mask"


def prompt(*kinds: int) -> list[int]:
    """A prompt of one block of equal tokens for each kind, and one token more."""
    return [token for kind in kinds for token in [kind] * BLOCK_TOKENS] + [9]


def read(rows: KvRows, tokens: list[int], salt: bytes = SALT, multiple: int = BLOCK_TOKENS) -> tuple[int, int]:
    """Read a prompt into a new row and share it; returns the row and the tokens that were found."""
    row = rows.allocate()
    rows.reuse(row, tokens, salt, multiple)
    found = rows.length(row)
    rows.reserve([(row, len(tokens))])
    rows.set_length(row, len(tokens))
    rows.share(row, tokens, salt, [f"note {at}" for at in range(len(tokens) // BLOCK_TOKENS)])
    rows.check_integrity()
    return row, found


def test_a_prompt_is_found_again_as_far_as_its_complete_blocks_are_the_same() -> None:
    rows = KvRows(max_rows=3, num_blocks=20)
    first, found = read(rows, prompt(1, 2, 3))
    assert found == 0
    second, found = read(rows, prompt(1, 2, 4))
    assert found == 2 * BLOCK_TOKENS
    assert rows.blocks(first)[:2] == rows.blocks(second)[:2]
    assert rows.blocks(first)[2] != rows.blocks(second)[2]


def test_the_notes_of_found_blocks_are_those_given_with_them() -> None:
    rows = KvRows(max_rows=2, num_blocks=20)
    rows.free(read(rows, prompt(1, 2))[0])
    assert rows.reuse(rows.allocate(), prompt(1, 2, 3), SALT) == ["note 0", "note 1"]


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    rows = KvRows(max_rows=2, num_blocks=20)
    whole = prompt(1, 2)[:-1]
    rows.free(read(rows, whole)[0])
    assert read(rows, whole)[1] == BLOCK_TOKENS


def test_prompts_under_other_masks_share_nothing() -> None:
    rows = KvRows(max_rows=2, num_blocks=20)
    rows.free(read(rows, prompt(1, 2), SALT)[0])
    assert read(rows, prompt(1, 2), OTHER)[1] == 0


def test_where_prompts_are_cut_at_fixed_places_only_whole_pieces_are_found() -> None:
    rows = KvRows(max_rows=2, num_blocks=20)
    rows.free(read(rows, prompt(1, 2, 3))[0])
    assert read(rows, prompt(1, 2, 3), multiple=2 * BLOCK_TOKENS)[1] == 2 * BLOCK_TOKENS


def test_a_row_whose_mask_changes_neither_takes_nor_gives_any_more() -> None:
    rows = KvRows(max_rows=3, num_blocks=20)
    rows.free(read(rows, prompt(1, 2, 3))[0])
    row = rows.allocate()
    rows.reuse(row, prompt(1, 2)[:-1], SALT)
    assert rows.length(row) == BLOCK_TOKENS
    assert rows.reuse(row, prompt(1, 2, 3), OTHER) == []
    assert rows.reuse(row, prompt(1, 2, 3), SALT) == [], "the row was mixed already"
    rows.reserve([(row, 2 * BLOCK_TOKENS)])
    rows.set_length(row, 2 * BLOCK_TOKENS)
    rows.share(row, prompt(1, 7)[:-1], SALT, [None, None])
    rows.free(row)
    assert read(rows, prompt(1, 7, 7))[1] == BLOCK_TOKENS


def test_two_rows_that_read_the_same_at_once_find_what_the_other_has_read_already() -> None:
    rows = KvRows(max_rows=2, num_blocks=8)
    tokens = prompt(1, 2, 3)
    one, other = rows.allocate(), rows.allocate()
    for row, end in ((one, 1), (other, 2), (one, 3)):  # each turn reads one block more than there was
        rows.reuse(row, tokens, SALT)
        assert rows.length(row) == (end - 1) * BLOCK_TOKENS
        rows.reserve([(row, end * BLOCK_TOKENS)])
        rows.set_length(row, end * BLOCK_TOKENS)
        rows.share(row, tokens[: end * BLOCK_TOKENS], SALT, [None] * end)
    assert rows.usage().num_used == 3
    rows.check_integrity()


def test_a_block_that_was_read_twice_is_kept_once() -> None:
    rows = KvRows(max_rows=2, num_blocks=8)
    tokens = prompt(1, 2)
    held = [rows.allocate(), rows.allocate()]
    for row in held:
        assert rows.reuse(row, tokens, SALT) == []
    for row in held:
        rows.reserve([(row, len(tokens))])
        rows.set_length(row, len(tokens))
    for row in held:
        rows.share(row, tokens, SALT, [None, None])
    rows.check_integrity()
    assert rows.blocks(held[0])[:2] == rows.blocks(held[1])[:2]
    assert rows.usage().num_used == 4


def test_the_prefix_that_was_not_used_for_longest_makes_room_from_its_end() -> None:
    rows = KvRows(max_rows=2, num_blocks=8)
    for kinds in ((1, 2), (3, 4)):
        rows.free(read(rows, prompt(*kinds))[0])
    rows.free(read(rows, prompt(1, 2))[0])  # used again
    row = rows.allocate()
    rows.reserve([(row, 5 * BLOCK_TOKENS)])
    rows.free(row)
    assert read(rows, prompt(3, 4))[1] == BLOCK_TOKENS
    assert read(rows, prompt(1, 2))[1] == 2 * BLOCK_TOKENS


def test_digests_name_the_beginnings_that_are_held() -> None:
    rows = KvRows(max_rows=2, num_blocks=8)
    first, second = block_digests(prompt(1, 2, 3)), block_digests(prompt(1, 2, 4))
    assert first[:2] == second[:2]
    assert len({*first, *second, *block_digests(prompt(2))}) == 5
    rows.free(read(rows, prompt(1, 2, 3))[0])
    rows.free(read(rows, prompt(1, 2, 3), OTHER)[0])
    assert rows.held_prefixes() == set(first)
    row = rows.allocate()
    rows.reserve([(row, 5 * BLOCK_TOKENS)])  # three of six blocks leave
    assert rows.held_prefixes() == set(first), "each is still there below one of the salts"
    rows.free(row)
    row = rows.allocate()
    rows.reserve([(row, 8 * BLOCK_TOKENS)])
    assert rows.held_prefixes() == frozenset()
    rows.check_integrity()


def test_where_blocks_lack_the_rows_without_one_are_named_and_nothing_changes() -> None:
    rows = KvRows(max_rows=3, num_blocks=3)
    first, second, third = (rows.allocate() for _ in range(3))
    rows.reserve([(first, BLOCK_TOKENS)])
    with pytest.raises(
        NoBlocksError, match="3 more blocks of 32 tokens are needed; 2 of the KV memory's 3 are free"
    ) as told:
        rows.reserve([(first, BLOCK_TOKENS + 1), (second, 1), (third, 1)])
    assert told.value.positions == (2,)
    assert [rows.blocks(row) for row in (first, second, third)] == [[0], [], []]


def test_without_sharing_nothing_is_kept() -> None:
    rows = KvRows(max_rows=1, num_blocks=4, shares=False)
    rows.free(read(rows, prompt(1, 2))[0])
    assert read(rows, prompt(1, 2))[1] == 0
    assert rows.usage().num_cached == 0


def test_a_row_grows_in_consecutive_blocks_beside_others_as_long_as_there_are_some() -> None:
    pool = BlockPool(64)
    one, other = pool.take(2), pool.take(2)
    for _ in range(20):
        one += pool.take(1, one[-1])
        other += pool.take(1, other[-1])
    assert one == list(range(one[0], one[0] + 22))
    assert other == list(range(other[0], other[0] + 22))


def test_blocks_close_from_the_end_and_what_only_the_tree_holds_leaves_first() -> None:
    rows = KvRows(max_rows=2, num_blocks=6, most_blocks=8)
    closed: list[list[int]] = []
    rows.on_resize = closed.append
    rows.free(read(rows, prompt(1, 2))[0])
    rows.resize(4)
    assert closed == [[4, 5]]
    assert rows.usage().num_cached == 2
    rows.resize(1)
    assert rows.usage() == KvUsage(num_blocks=1, num_used=0, num_cached=1)
    rows.resize(8)
    assert rows.usage().num_free == 7
    rows.check_integrity()


def test_a_row_that_lacks_blocks_gets_those_that_are_lent_to_it() -> None:
    rows = KvRows(max_rows=2, num_blocks=2, most_blocks=8)
    lacking: list[int] = []

    def lend(count: int) -> None:
        lacking.append(count)
        rows.resize(min(rows.pool.num_blocks + count, 5))

    rows.on_lack = lend
    rows.reserve([(rows.allocate(), 4 * BLOCK_TOKENS)])
    assert (lacking, rows.usage().num_blocks) == ([2], 4)
    with pytest.raises(NoBlocksError, match="2 more blocks of 32 tokens are needed; 1 of the KV memory's 5 are free"):
        rows.reserve([(rows.allocate(), 2 * BLOCK_TOKENS)])


class Operations(RuleBasedStateMachine):
    """Requests come, read their prompts in pieces, generate, are preempted and leave, in any order, while blocks open
    and close."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = KvRows(max_rows=4, num_blocks=12, most_blocks=16)
        self.rows.on_resize = self._lose
        self.held: dict[int, tuple[list[int], bytes]] = {}
        self.content: dict[int, tuple[bytes, list[int]]] = {}  # the beginning that a block's tokens end

    def _write(self, row: int, end: int) -> bool:
        """Read the row's tokens up to `end` in one step, or find no room."""
        tokens, salt = self.held[row]
        try:
            self.rows.reserve([(row, end)])
        except NoBlocksError:
            usage, missing = self.rows.usage(), num_blocks_of(end) - len(self.rows.blocks(row))
            assert missing > usage.num_free + usage.num_cached
            return False
        for at in range(self.rows.length(row), end):
            block = self.rows.blocks(row)[at // BLOCK_TOKENS]
            assert sum(block in self.rows.blocks(other) for other in self.held) == 1, "a shared block is written"
            self.content[block] = (salt, tokens[: at + 1])
        self.rows.set_length(row, end)
        return True

    def _lose(self, blocks: list[int]) -> None:
        for block in blocks:
            self.content.pop(block, None)

    @rule(num_blocks=st.integers(0, 16))
    def resize(self, num_blocks: int) -> None:
        wanted = max(num_blocks, self.rows.num_held)
        self.rows.resize(wanted)
        assert self.rows.usage().num_blocks == wanted

    @precondition(lambda self: self.rows.num_free_rows)
    @rule(kinds=st.lists(st.integers(1, 2), min_size=1, max_size=5), salt=st.sampled_from([SALT, OTHER]))
    def come(self, kinds: list[int], salt: bytes) -> None:
        self.held[self.rows.allocate()] = (prompt(*kinds), salt)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 3), size=st.integers(1, 70), multiple=st.sampled_from([1, 2]))
    def read(self, pick: int, size: int, multiple: int) -> None:
        row = list(self.held)[pick % len(self.held)]
        tokens, salt = self.held[row]
        self.rows.reuse(row, tokens, salt, multiple * BLOCK_TOKENS)
        end = min(len(tokens), self.rows.length(row) + size)
        if self._write(row, end):
            self.rows.share(row, tokens[:end], salt, [None] * (end // BLOCK_TOKENS))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 3), token=st.integers(1, 2))
    def generate(self, pick: int, token: int) -> None:
        row = list(self.held)[pick % len(self.held)]
        tokens, salt = self.held[row]
        if self.rows.length(row) == len(tokens):
            self.held[row] = ([*tokens, token], salt)
            if not self._write(row, len(tokens) + 1):
                self.held[row] = (tokens, salt)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 3))
    def leave(self, pick: int) -> None:
        row = list(self.held)[pick % len(self.held)]
        del self.held[row]
        self.rows.free(row)

    @invariant()
    def every_row_reads_its_own_tokens(self) -> None:
        self.rows.check_integrity()
        for row, (tokens, salt) in self.held.items():
            length = self.rows.length(row)
            for at, block in enumerate(self.rows.blocks(row)[: -(-length // BLOCK_TOKENS)]):
                end = min(length, (at + 1) * BLOCK_TOKENS)
                assert self.content[block] == (salt, tokens[:end])

    def teardown(self) -> None:
        for row in list(self.held):
            self.rows.free(row)
        usage = self.rows.usage()
        assert usage.num_used == 0
        assert usage.num_free + usage.num_cached == usage.num_blocks


class PackedOperations(Operations):
    """The same where only the last blocks close, and what they hold moves."""

    def __init__(self) -> None:
        super().__init__()
        self.rows.on_move = self._move

    def _move(self, places: Mapping[int, int]) -> None:
        assert max(places.values()) < min(places)
        for block, place in places.items():
            self.content[place] = self.content.pop(block)

    @invariant()
    def the_first_blocks_are_open(self) -> None:
        num_open = self.rows.pool.num_blocks
        holders = self.rows.pool.num_holders
        assert (holders[:num_open] >= 0).all()
        assert (holders[num_open:] < 0).all()


TestOperations = Operations.TestCase
TestPackedOperations = PackedOperations.TestCase
for case in (TestOperations, TestPackedOperations):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
