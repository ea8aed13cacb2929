"""Divides the device's memory: trunk, blocks of KV memory, slots, spill area and ring, and room to compute.

KV memory and slots share what is free beside the trunk. Each gets what is asked for; without a wish, KV memory gets
`KV_SHARE` and what slots leave, never more than all rows at full length need, never less than one row needs. Invariant:
both are chosen, or checked, after the trunk is loaded and before any other allocation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from expert_store.errors import SlotsError
from expert_store.paging.pages import PagesShape
from server.model.device.capture import NotCapturableError
from server.model.device.step.prefill import ring_spans
from server.model.device.step.weights import DecodeShape
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv_memory import DEVICE_RESERVE_BYTES

KV_SHARE = 1 / 8
"""Share of the free memory that KV memory takes from slots."""


class Division(NamedTuple):
    """Slots in each layer, and blocks of KV memory."""

    num_slots: int
    num_blocks: int


class DeviceMemory:
    """Sizes of the parts of a captured model on `device`, in bytes.

    Args:
        num_kept: slots of each layer that are never evicted.
        keeps_most: whether all slots but those for one token's experts may be kept, since host memory has no room for
            the experts in slots.
        beside_trunk: bytes that the trunk leaves free on a device that is only planned; None: `device` is asked.
        least_tokens: KV memory has room for one row of so many at least; None: of `max_tokens`.
    """

    def __init__(
        self,
        shape: DecodeShape,
        device: torch.device,
        *,
        num_kept: int = 0,
        keeps_most: bool = False,
        beside_trunk: int | None = None,
        least_tokens: int | None = None,
    ) -> None:
        self._beside_trunk = beside_trunk
        self._shape, self._device, self._num_kept, self._keeps_most = shape, device, num_kept, keeps_most
        self._most_blocks = shape.max_rows * shape.max_blocks
        self.least_blocks = num_blocks_of(shape.max_tokens if least_tokens is None else least_tokens)
        self.span_bytes = shape.span_bytes
        self.token_bytes = shape.kv_token_bytes
        """KV memory of one token."""
        self.block_bytes = self.token_bytes * BLOCK_TOKENS
        self._attended_bytes = shape.dtype.itemsize * max(kind.prompt_elements for kind in shape.each_attention)
        """Of one token of one layer, as a prompt's attention reads them."""

    def kv_bytes(self, num_blocks: int) -> int:
        """Bytes of so many blocks, and of one layer's attention over the longest row that they hold."""
        longest = min(num_blocks * BLOCK_TOKENS, self._shape.max_tokens)
        return num_blocks * self.block_bytes + longest * self._attended_bytes

    def _blocks_within(self, limit: int) -> int:
        """The most blocks whose `kv_bytes` are within `limit`, at most what all rows need."""
        blocks = (limit - self._shape.max_tokens * self._attended_bytes) // self.block_bytes
        if blocks * BLOCK_TOKENS < self._shape.max_tokens:
            blocks = limit // (self.block_bytes + BLOCK_TOKENS * self._attended_bytes)
        return max(0, min(self._most_blocks, blocks))

    def pages_shape(self, num_slots: int) -> PagesShape:
        """The shape of pages with this many slots in each layer."""
        shape = self._shape
        return PagesShape(
            shape.num_moe_layers,
            shape.num_experts,
            shape.top_k,
            num_slots,
            shape.span_elements,
            shape.max_rows,
            shape.span_dtype,
        )

    def num_kept(self, num_slots: int) -> int:
        """Most slots of a layer that are never evicted, of so many."""
        return max(self._num_kept, num_slots - self._shape.top_k) if self._keeps_most else self._num_kept

    def slots_bytes(self, num_slots: int) -> int:
        """Bytes of the slots of all layers, with the spill area and the ring if experts are fetched."""
        beside = ring_spans(self._shape) if self.pages_shape(num_slots).paged else 0
        return (self._shape.num_moe_layers * num_slots + self.num_spill(num_slots) + beside) * self.span_bytes

    def num_spill(self, num_slots: int) -> int:
        """Spans of the spill area beside so many open slots of each layer."""
        return self.pages_shape(num_slots).num_spill(self.num_kept(num_slots))

    def least_slots(self, num_slots: int) -> int:
        """The slots of each layer, of so many, that stay where KV memory has the memory of others: half of them, those
        of one token's experts, and the kept ones."""
        return min(num_slots, max(-(-num_slots // 2), self._shape.top_k, self._num_kept))

    def moving_bytes(self, division: Division) -> int:
        """Bytes of slots, spill area and blocks, where experts are fetched."""
        spans = self._shape.num_moe_layers * division.num_slots + self.num_spill(division.num_slots)
        return spans * self.span_bytes + division.num_blocks * self.block_bytes

    def divide(
        self, most: int, num_slots: int | None = None, slots_bytes: int | None = None, kv_bytes: int | None = None
    ) -> Division:
        """Slots: `num_slots` of them, or those that fit into `slots_bytes`, or into the free memory; at most as many as
        can be used. Blocks: those that fit into `kv_bytes`, or a share.

        Args:
            most: number of experts of the layer that may serve most.

        Raises:
            NotCapturableError: the slots are fewer than one token's experts or the kept ones; the host-driven path
                computes such a token's experts in several waves.
            SlotsError: they do not fit on the device, or the blocks hold no row; the message names values that fit.
        """
        free = self._free_bytes()
        is_open = num_slots is None and slots_bytes is None
        blocks = self._most_blocks if free is None else self.least_blocks
        if kv_bytes is not None:
            blocks = min(kv_bytes // self.block_bytes, self._most_blocks)
            self._check_blocks(kv_bytes, blocks)
        elif free is not None and is_open:
            blocks = max(blocks, self._blocks_within(int(KV_SHARE * free)))
        taken = self.kv_bytes(blocks)
        slots = self._num_slots(most, num_slots, slots_bytes, None if free is None else free - taken, taken)
        if kv_bytes is None and free is not None:
            blocks = max(blocks, self._blocks_within(free - self.slots_bytes(slots)))
        return Division(slots, blocks)

    def _check_blocks(self, kv_bytes: int, blocks: int) -> None:
        if blocks < self.least_blocks:
            raise SlotsError(
                f"kv_memory of {kv_bytes} bytes holds {blocks * BLOCK_TOKENS} tokens, and one request may have "
                f"{self.least_blocks * BLOCK_TOKENS}: set kv_memory to at least "
                f"{self.least_blocks * self.block_bytes}"
                + (f", or max_context_tokens to at most {blocks * BLOCK_TOKENS}" if blocks else "")
            )

    def _num_slots(
        self, most: int, wanted: int | None, budget_bytes: int | None, free: int | None, kv_bytes: int
    ) -> int:
        """Slots in each layer, of `free` bytes beside `kv_bytes` of KV memory. See `divide`."""
        num_experts = self._shape.num_experts
        least = max(min(self._shape.top_k, num_experts), self._num_kept)
        useful = num_experts if most == num_experts else max(most, least)
        if wanted is not None:
            chosen = min(wanted, useful)
        else:
            limit = free if budget_bytes is None else budget_bytes
            chosen = useful if limit is None else self._most_slots(useful, limit)
        if chosen < least and (wanted is not None or budget_bytes is not None):
            given = f"{wanted} slots" if wanted is not None else f"slots_memory of {budget_bytes} bytes, {chosen} slots"
            raise NotCapturableError(
                f"{given} a layer: one token's experts and those that are kept need {least}, with spill and ring "
                f"{self.slots_bytes(least)} bytes"
            )
        if chosen < least:
            raise SlotsError(
                f"{free} bytes are free for slots: {least} slots in each of {self._shape.num_moe_layers} layers and "
                f"what a batch of {self._shape.max_rows} needs beside them take {self.slots_bytes(least)} bytes"
                + self._advice(least, free, kv_bytes)
            )
        if free is not None and self.slots_bytes(chosen) > free:
            raise SlotsError(
                f"{chosen} slots a layer take {self.slots_bytes(chosen)} bytes, and {max(free, 0)} are free beside the "
                f"trunk, {kv_bytes} bytes of KV memory with its attention, and {DEVICE_RESERVE_BYTES} to compute in"
                + self._advice(least, free, kv_bytes, chosen)
            )
        return chosen

    def _most_slots(self, useful: int, limit: int) -> int:
        return next((num for num in range(useful, 0, -1) if self.slots_bytes(num) <= limit), 0)

    def _free_bytes(self) -> int | None:
        """Bytes that slots and KV memory may take on the device; None if the device has no memory of its own."""
        if self._beside_trunk is not None:
            return self._beside_trunk - DEVICE_RESERVE_BYTES - self._shape.state_bytes
        if self._device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] - DEVICE_RESERVE_BYTES - self._shape.state_bytes

    def _advice(self, least: int, free: int | None, kv_bytes: int, chosen: int | None = None) -> str:
        """Settings whose values fit, for the message of an error."""
        fits = []
        num_slots = self._most_slots(self._shape.num_experts, free or 0)
        if num_slots >= least:
            fits.append(f"slots of at most {num_slots}")
        room = (free or 0) + kv_bytes - self.slots_bytes(chosen or least)
        blocks = self._blocks_within(room)
        if 0 < blocks * BLOCK_TOKENS < self._shape.max_tokens:
            fits.append(f"max_context_tokens of at most {blocks * BLOCK_TOKENS}")
        elif blocks:
            fits.append(f"kv_memory of at most {blocks * self.block_bytes}")
        return "; what fits: " + ", or ".join(fits) if fits else ": the model is too large for this device"
