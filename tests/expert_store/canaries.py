"""Frames of host memory that show who reads or writes where no frame is: numbers there are no numbers, and stay."""

from __future__ import annotations

from torch import Tensor

from expert_store.paging.frames import HostFrames
from expert_store.residency.returnable import ReturnableMemory

CANARY = 0xFF
"""All bytes; as a number of float16, bfloat16 or float32 it is none."""


class CanaryFrames(HostFrames):
    """`HostFrames` that are full of canaries when they come and when they have left."""

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.made: list[CanaryAddresses] = []

    def reserve(self, num_places: int) -> CanaryAddresses:
        self.made.append(CanaryAddresses(self, num_places))
        return self.made[-1]

    def check(self) -> None:
        """Raise AssertionError if somebody wrote where no frame is."""
        for addresses in self.made:
            without = addresses.places[[place not in addresses.held for place in range(len(addresses.places))]]
            assert (without == CANARY).all(), "somebody wrote where no frame is"


class CanaryAddresses:
    def __init__(self, frames: CanaryFrames, num_places: int) -> None:
        self._frames, self._memory = frames, ReturnableMemory(num_places * frames.frame_bytes)
        self.places = self._memory.bytes.view(num_places, frames.frame_bytes)
        self.places.fill_(CANARY)
        self.held: set[int] = set()

    def place(self, first: int, last: int) -> None:
        new = set(range(first, last))
        assert not new & self.held, "a place gets a second frame"
        assert len(new) <= self._frames.num_free, "more frames than there are"
        assert (self.places[first:last] == CANARY).all(), "somebody wrote where no frame is"
        self.held |= new
        self._frames.num_free -= len(new)

    def remove(self, first: int, last: int) -> None:
        gone = set(range(first, last))
        assert gone <= self.held, "a place without a frame loses one"
        self.places[first:last] = CANARY
        self.held -= gone
        self._frames.num_free += len(gone)

    def tensor(self) -> Tensor:
        assert 0 in self.held, "a GPU's tensor begins with memory"
        return self._memory.bytes
