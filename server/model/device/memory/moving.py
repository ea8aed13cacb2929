"""One memory for slots and blocks of KV memory, whose frames move between the two while captured graphs keep addresses.

Both have addresses for the most of either. The first slots of each layer and the first blocks are open and have frames;
what lies behind them has none, and no kernel reads or writes there: closed slots are never victims and hold no expert,
and no row has a closed block. Invariant: no frame is taken from an open slot or block.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping

import torch

from expert_store.paging.driver import CudaFrames, MappingError, probe
from expert_store.paging.frames import Frames, HostFrames, MappedMemory, Range, frames_of
from expert_store.paging.pages import DevicePages
from server.model.balance import SlotsAndBlocks, most_within, refusal
from server.model.device.memory.budget import DeviceMemory, Division
from server.model.device.memory.tier import SpanTier
from server.model.device.step.tuning import pow2
from server.model.device.step.weights import DecodeShape
from server.model.kv.rows import KvRows
from server.model.kv_memory import MemoryBalance

log = logging.getLogger(__name__)


def moving_memory(
    wish: MemoryBalance, memory: DeviceMemory, shape: DecodeShape, division: Division, device: torch.device
) -> tuple[MovingMemory | None, str]:
    """The memory of slots and blocks that move on a device; or None, and the reason why they keep their sizes."""
    if not memory.pages_shape(division.num_slots).paged:
        return None, "every expert has a slot, so that the captured graphs fetch none"
    is_gpu = device.type == "cuda"
    if reason := "" if is_gpu and wish == "moving" else refusal(wish, device):
        return None, reason
    try:
        frame_bytes = probe(device) if is_gpu else HostFrames.frame_bytes
        return MovingMemory(memory, shape, division, frame_bytes, frames_on(device)), ""
    except MappingError as error:
        log.warning("slots and KV memory keep the sizes of the start: %s", error)
        return None, str(error)


def frames_on(device: torch.device) -> Callable[[int], Frames]:
    """Makes so many frames of a device's memory."""
    return (lambda count: CudaFrames(device, count)) if device.type == "cuda" else HostFrames


class MovingMemory:
    """The memory of the slots of pages and of the blocks of rows.

    Args:
        memory: sizes of the model's parts.
        shape: of the captured step.
        division: the slots and blocks whose memory it takes. There are fewer slots than experts. KV memory begins with
            somewhat fewer blocks, because frames are whole and the spill area is for the fewest slots.
        frame_bytes: of a frame.
        make_frames: makes so many frames.

    Attributes:
        pages_shape: of the pages, with the most slots.
        slots: [L * most slots + spill, span_elements]; blocks: of each layer [most blocks, elements].
        num_blocks: that are open at first; most_blocks: that may be open while the fewest slots are.
        budget: bytes of all frames.

    Raises:
        MappingError: frames are too large for so little memory, or the device does not give them.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        shape: DecodeShape,
        division: Division,
        frame_bytes: int,
        make_frames: Callable[[int], Frames],
    ) -> None:
        num_slots, layers = division.num_slots, shape.num_moe_layers
        self.memory, self._frame = memory, frame_bytes
        self.least_slots = memory.least_slots(num_slots)
        self._num_spill = memory.num_spill(self.least_slots)
        count = memory.moving_bytes(division) // frame_bytes
        self.budget = count * frame_bytes
        # no more than the power of two of the first ones, so that no kernel ranks more victims than without moves
        room = self.budget // memory.span_bytes - self._num_spill
        self.pages_shape = memory.pages_shape(
            max(num_slots, min(pow2(num_slots), shape.num_experts - 1, room // layers))
        )
        self._block_bytes = [
            shape.block_tokens * kind.token_elements * shape.dtype.itemsize for kind in shape.each_attention
        ]
        of_rows = shape.max_rows * shape.max_blocks
        self.most_blocks = most_within(of_rows, self.blocks_bytes, self.budget - self.slots_bytes(self.least_slots))
        self.num_blocks = min(
            division.num_blocks,
            most_within(self.most_blocks, self.blocks_bytes, self.budget - self.slots_bytes(num_slots)),
        )
        self.least_blocks = min(division.num_blocks, memory.least_blocks)
        if self.num_blocks < self.least_blocks or self.most_blocks < division.num_blocks:
            raise MappingError(
                f"in whole frames of {frame_bytes} bytes KV memory has {max(0, self.num_blocks)} blocks beside "
                f"{num_slots} slots a layer and {max(0, self.most_blocks)} beside {self.least_slots}; wanted at least "
                f"{self.least_blocks} and {division.num_blocks}"
            )
        self._make(make_frames(count), num_slots, shape)

    def _make(self, frames: Frames, num_slots: int, shape: DecodeShape) -> None:
        in_frames = (self._whole(self.most_blocks * size) for size in self._block_bytes)
        self._starts = list(itertools.accumulate(in_frames, initial=0))  # of the layers' blocks, each with a frame
        spans = self.pages_shape.num_layers * self.pages_shape.num_slots + self._num_spill
        self._slots = MappedMemory(frames, spans * self.memory.span_bytes, self._slot_ranges(num_slots))
        self._blocks = MappedMemory(frames, self._starts[-1], self._block_ranges(self.num_blocks))
        self.slots = self._slots.bytes.view(shape.span_dtype).view(spans, shape.span_elements)
        self.blocks = []
        for start, size in zip(self._starts, self._block_bytes, strict=False):
            of_layer = self._blocks.bytes[start : start + self.most_blocks * size].view(shape.dtype)
            self.blocks.append(of_layer.view(self.most_blocks, size // shape.dtype.itemsize))

    def _whole(self, num_bytes: int) -> int:
        """Bytes of the frames that hold so many."""
        return -(-num_bytes // self._frame) * self._frame

    def _slot_ranges(self, num_slots: int) -> list[Range]:
        """Of the first slots of each layer, and of the spill area."""
        span, most, layers = self.memory.span_bytes, self.pages_shape.num_slots, self.pages_shape.num_layers
        slots = [(layer * most * span, (layer * most + num_slots) * span) for layer in range(layers)]
        return [*slots, (layers * most * span, (layers * most + self._num_spill) * span)]

    def _block_ranges(self, num_blocks: int) -> list[Range]:
        """Of the first blocks of each layer."""
        return [
            (start, start + num_blocks * size) for start, size in zip(self._starts, self._block_bytes, strict=False)
        ]

    def slots_bytes(self, num_slots: int) -> int:
        """Bytes of the frames behind so many slots of each layer and the spill area."""
        return frames_of(self._slot_ranges(num_slots), self._frame) * self._frame

    def blocks_bytes(self, num_blocks: int) -> int:
        """Bytes of the frames behind so many blocks."""
        return sum(self._whole(num_blocks * size) for size in self._block_bytes)

    def keep_slots(self, num_slots: int) -> None:
        """Let the first slots of each layer have frames, and no others."""
        self._slots.keep(self._slot_ranges(num_slots))

    def keep_blocks(self, num_blocks: int) -> None:
        """Let the first blocks have frames, and no others."""
        self._blocks.keep(self._block_ranges(num_blocks))

    def balance(self, pages: DevicePages, tier: SpanTier, rows: KvRows) -> SlotsAndBlocks:
        """The balance of pages over `slots` and rows over `blocks`; mutates both from now on."""
        rows.on_move = self._move
        rows.on_resize = lambda closed: self.keep_blocks(rows.pool.num_blocks)
        return SlotsAndBlocks(
            OpenSlots(self, pages, tier), rows, blocks_bytes=self.blocks_bytes, budget=self.budget,
            least_blocks=self.least_blocks,
        )  # fmt: skip

    def _move(self, places: Mapping[int, int]) -> None:
        """Copy the keys and values of blocks to those in their places."""
        device = self.slots.device
        old, new = torch.tensor([list(places), list(places.values())], device=device)
        for layer in self.blocks:
            layer[new] = layer[old]


class OpenSlots:
    """`server.model.balance.Slots` of pages."""

    def __init__(self, moving: MovingMemory, pages: DevicePages, tier: SpanTier) -> None:
        self._moving, self._pages, self._tier = moving, pages, tier
        self.most_slots, self.least_slots = moving.pages_shape.num_slots, moving.least_slots

    @property
    def num_slots(self) -> int:
        """See `Slots.num_slots`."""
        return self._pages.num_open

    def slots_bytes(self, num_slots: int) -> int:
        """See `Slots.slots_bytes`."""
        return self._moving.slots_bytes(num_slots)

    def resize(self, num_slots: int) -> None:
        """See `Slots.resize`."""
        if num_slots > self.num_slots:
            self._moving.keep_slots(num_slots)
        self._tier.resize(num_slots, self._moving.memory.num_kept(num_slots))
        self._moving.keep_slots(num_slots)

    def misses_of_full_layers(self) -> int:
        """See `Slots.misses_of_full_layers`. Waits for the device."""
        is_full = (self._pages.slot_owner[:, : self.num_slots] >= 0).all(dim=1)
        return int(self._pages.stats[is_full, 1].sum())
