"""Memory at fixed addresses, parts of which have physical memory behind them that others may get.

Physical memory comes in frames of one size. Tensors show all addresses from the start and captured graphs hold them;
only the frames move. Nobody may read or write addresses without a frame. Invariants: a frame is behind one place at
most, and a place whose frame leaves holds nobody's data. Source: CUDA's virtual memory management; vAttention (Prabhu
et al., 2024) lays KV memory out so.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expert_store.residency.returnable import ReturnableMemory

Range = tuple[int, int]
"""Bytes [start, end) of a memory."""


class Addresses(Protocol):
    """Addresses for a number of frames."""

    def place(self, first: int, last: int) -> None:
        """Put frames behind the places [first, last), which have none; what they hold is undefined."""

    def remove(self, first: int, last: int) -> None:
        """Take the frames behind the places [first, last) away; everything enqueued that reads them has ended."""

    def tensor(self) -> Tensor:
        """uint8, all the addresses; place 0 must have a frame. Keeps the memory alive."""


class Frames(Protocol):
    """A fixed number of frames.

    Attributes:
        frame_bytes: of each.
    """

    frame_bytes: int

    @property
    def num_free(self) -> int:
        """Frames that are behind no place."""

    def reserve(self, num_places: int) -> Addresses:
        """New addresses without a frame."""


class MappedMemory:
    """A tensor over addresses, with frames behind some ranges of it.

    Args:
        num_bytes: of the tensor.
        ranges: those that have frames at first, byte 0 among them.

    Attributes:
        bytes: uint8 [num_bytes].
    """

    def __init__(self, frames: Frames, num_bytes: int, ranges: Sequence[Range]) -> None:
        self._frames = frames
        self._held: npt.NDArray[np.bool_] = np.zeros(-(-num_bytes // frames.frame_bytes), dtype=np.bool_)
        self._addresses = frames.reserve(len(self._held))
        self.keep(ranges)
        self.bytes = self._addresses.tensor()[:num_bytes]

    def keep(self, ranges: Sequence[Range]) -> None:
        """Let exactly the places of these ranges have frames: give the others' back first, then take what lacks."""
        wanted = np.zeros_like(self._held)
        for start, end in ranges:
            wanted[start // self._frames.frame_bytes : -(-end // self._frames.frame_bytes)] |= start < end
        for first, last in _runs(self._held & ~wanted):
            self._addresses.remove(first, last)
        for first, last in _runs(wanted & ~self._held):
            self._addresses.place(first, last)
        self._held = wanted


def frames_of(ranges: Sequence[Range], frame_bytes: int) -> int:
    """The number of frames that ranges need, which are in order and do not overlap."""
    count, done = 0, 0
    for start, end in ranges:
        if start < end:
            first, last = max(done, start // frame_bytes), -(-end // frame_bytes)
            count, done = count + max(0, last - first), max(done, last)
    return count


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[first, last) of each run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class HostFrames:
    """`Frames` of a CPU: pages of the system, given back by `ReturnableMemory`."""

    frame_bytes = mmap.PAGESIZE

    def __init__(self, num_frames: int) -> None:
        self.num_free = num_frames

    def reserve(self, num_places: int) -> HostAddresses:
        """See `Frames.reserve`."""
        return HostAddresses(self, num_places)


class HostAddresses:
    """`Addresses` of `HostFrames`."""

    def __init__(self, frames: HostFrames, num_places: int) -> None:
        self._frames = frames
        self._memory = ReturnableMemory(num_places * frames.frame_bytes)

    def place(self, first: int, last: int) -> None:
        """See `Addresses.place`: the system gives a page when it is first written."""
        self._frames.num_free -= last - first
        assert self._frames.num_free >= 0, f"{last - first} frames are wanted, {-self._frames.num_free} more than free"

    def remove(self, first: int, last: int) -> None:
        """See `Addresses.remove`."""
        self._frames.num_free += last - first
        self._memory.give_back(first * self._frames.frame_bytes, last * self._frames.frame_bytes)

    def tensor(self) -> Tensor:
        """See `Addresses.tensor`."""
        return self._memory.bytes
