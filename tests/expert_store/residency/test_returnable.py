"""Memory that is given back to the system page by page."""

from __future__ import annotations

import mmap

import pytest

from expert_store.residency.returnable import ReturnableMemory, can_return

PAGE = mmap.PAGESIZE


@pytest.mark.skipif(not can_return(), reason="this system gives no single pages back")
def test_whole_pages_of_the_range_leave_and_every_other_byte_stays() -> None:
    memory = ReturnableMemory(8 * PAGE)
    memory.bytes.fill_(7)
    memory.give_back(PAGE + 1, 5 * PAGE - 1)
    left = memory.bytes.view(8, PAGE)
    assert left[[2, 3]].eq(0).all()
    assert left[[0, 1, 4, 5, 6, 7]].eq(7).all()
    left[2] = 3
    assert left[2].eq(3).all()


def test_a_range_without_a_whole_page_gives_nothing_back() -> None:
    memory = ReturnableMemory(2 * PAGE)
    memory.bytes.fill_(7)
    memory.give_back(1, PAGE + 1)
    assert memory.bytes.eq(7).all()


def test_a_tensor_keeps_the_memory_alive() -> None:
    part = ReturnableMemory(PAGE).bytes[5:9]
    part.fill_(4)
    assert part.tolist() == [4, 4, 4, 4]
