"""Frames behind ranges of addresses, on the CPU; `test_driver.py` has those of a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from expert_store.paging.frames import HostFrames, MappedMemory, Range, frames_of
from expert_store.residency.returnable import can_return
from tests.expert_store.canaries import CanaryFrames

FRAME = HostFrames.frame_bytes


def random_ranges(generator: np.random.Generator, num_bytes: int) -> list[Range]:
    """Up to four, in order, the first one at byte 0."""
    edges = np.sort(generator.choice(num_bytes, 8, replace=False)).tolist()
    return [(0, edges[0] + 1), *zip(edges[1::2], edges[2::2], strict=False)]


def test_frames_move_between_memories_and_what_stays_keeps_its_bytes() -> None:
    frames, generator = CanaryFrames(24), np.random.default_rng(0)
    num_bytes = 11 * FRAME + 5
    memories = [MappedMemory(frames, num_bytes, [(0, 1)]) for _ in range(2)]
    kept: list[list[Range]] = [[(0, 1)], [(0, 1)]]
    for turn in range(40):
        at = turn % 2
        ranges = random_ranges(generator, num_bytes)
        stay = [
            (max(old[0], new[0]), min(old[1], new[1]))
            for old in kept[at] for new in ranges if max(old[0], new[0]) < min(old[1], new[1])
        ]  # fmt: skip
        for number, (start, end) in enumerate(stay):
            memories[at].bytes[start:end] = number
        memories[at].keep(ranges)
        for number, (start, end) in enumerate(stay):
            assert (memories[at].bytes[start:end] == number).all()
        kept[at] = ranges
        assert frames.num_free == 24 - sum(frames_of(one, FRAME) for one in kept)
        frames.check()


def test_ranges_share_the_frame_in_which_one_ends_and_the_next_begins() -> None:
    assert frames_of([(0, FRAME // 2), (FRAME // 2, FRAME)], FRAME) == 1
    assert frames_of([(0, FRAME + 1), (2 * FRAME - 1, 2 * FRAME + 1), (5, 5)], FRAME) == 3


@pytest.mark.skipif(not can_return(), reason="this system gives no single pages back")
def test_frames_that_leave_a_memory_of_the_host_leave_the_process() -> None:
    frames = HostFrames(8)
    memory = MappedMemory(frames, 4 * FRAME, [(0, 4 * FRAME)])
    memory.bytes.fill_(7)
    memory.keep([(0, FRAME), (3 * FRAME, 3 * FRAME + 1)])
    assert frames.num_free == 6
    assert memory.bytes.view(4, FRAME).eq(7).all(dim=1).tolist() == [True, False, False, True]
    assert memory.bytes.view(4, FRAME)[1:3].eq(0).all()
