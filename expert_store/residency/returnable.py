"""Host memory at fixed addresses whose pages can be given back to the system while tensors still show it.

The system takes a page for it when the page is first written, and again after it was given back; then it holds zeros.
Invariant: giving back touches no byte outside the range that it is told.
"""

from __future__ import annotations

import mmap
import sys

import torch


def can_return() -> bool:
    """Whether this system takes single pages back: Linux does at once, others when they want to."""
    return sys.platform == "linux"


class ReturnableMemory:
    """Zeros in pages of the system.

    Attributes:
        bytes: uint8 [num_bytes] on the CPU; keeps the memory alive.

    Raises:
        OSError: the system has not so much memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def give_back(self, start: int, end: int) -> None:
        """Give the system the pages that lie wholly in [start, end), bytes from the beginning. What they held is lost,
        and needs to be nobody's."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if can_return() and first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
