"""Divides the device's memory: trunk, KV memory of fixed rows, slots, spill area and ring, and room to compute.

Invariant: the number of slots is chosen, or checked, after the trunk is loaded and before any other allocation.
"""

from __future__ import annotations

import torch

from expert_store.errors import SlotsError
from expert_store.paging.pages import PagesShape
from server.model.device.capture import NotCapturableError
from server.model.device.step.prefill import RING_SPANS
from server.model.device.step.weights import DecodeShape

RESERVE_BYTES = 1 << 30
"""Bytes left free on a GPU for activations, logits and the allocator's rounding."""


class DeviceMemory:
    """Sizes of the parts of a captured model on `device`, in bytes.

    Args:
        num_kept: slots of each layer that are never evicted.
        keeps_most: whether all slots but those for one token's experts may be kept, since host memory has no room for
            the experts in slots.
        beside_trunk: bytes that the trunk leaves free on a device that is only planned; None: `device` is asked.
    """

    def __init__(
        self,
        shape: DecodeShape,
        device: torch.device,
        *,
        num_kept: int = 0,
        keeps_most: bool = False,
        beside_trunk: int | None = None,
    ) -> None:
        self._beside_trunk = beside_trunk
        self._shape, self._device, self._num_kept, self._keeps_most = shape, device, num_kept, keeps_most
        self.span_bytes = shape.span_bytes
        self.row_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
        """KV memory of one token of one row."""

    @property
    def kv_bytes(self) -> int:
        """KV memory of all rows."""
        return self.row_bytes * self._shape.max_rows * self._shape.max_blocks * self._shape.block_tokens

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
        shape = self.pages_shape(num_slots)
        beside = shape.num_spill(self.num_kept(num_slots)) + RING_SPANS if shape.paged else 0
        return (self._shape.num_moe_layers * num_slots + beside) * self.span_bytes

    def num_slots(self, most: int, wanted: int | None, budget_bytes: int | None) -> int:
        """The number of slots in each layer: `wanted`, or those that fit into `budget_bytes`, or into the free memory;
        at most as many as can be used.

        Args:
            most: number of experts of the layer that may serve most.

        Raises:
            NotCapturableError: the number is below one token's experts or the kept ones; the host-driven path computes
                such a token's experts in several waves.
            SlotsError: they do not fit on the device; the message names values that fit.
        """
        num_experts = self._shape.num_experts
        least = max(min(self._shape.top_k, num_experts), self._num_kept)
        useful = num_experts if most == num_experts else max(most, least)
        free = self._free_bytes()
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
                + self._advice(least, free)
            )
        if free is not None and self.slots_bytes(chosen) > free:
            raise SlotsError(
                f"{chosen} slots a layer take {self.slots_bytes(chosen)} bytes, and {max(free, 0)} are free beside the "
                f"trunk, {self.kv_bytes} bytes of KV memory and {RESERVE_BYTES} to compute in"
                + self._advice(least, free, chosen)
            )
        return chosen

    def _most_slots(self, useful: int, limit: int) -> int:
        return next((num for num in range(useful, 0, -1) if self.slots_bytes(num) <= limit), 0)

    def _free_bytes(self) -> int | None:
        """Bytes that slots may take on the device; None if the device has no memory of its own."""
        if self._beside_trunk is not None:
            return self._beside_trunk - self.kv_bytes - RESERVE_BYTES
        if self._device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] - self.kv_bytes - RESERVE_BYTES

    def _advice(self, least: int, free: int | None, chosen: int | None = None) -> str:
        """Settings whose values fit, for the message of an error."""
        fits = []
        num_slots = self._most_slots(self._shape.num_experts, free or 0)
        if num_slots >= least:
            fits.append(f"slots of at most {num_slots}")
        room = (free or 0) + self.kv_bytes - self.slots_bytes(chosen or least)
        tokens = room // (self.row_bytes * self._shape.max_rows)
        if tokens >= 2:
            fits.append(f"max_context_tokens of at most {tokens} at max_batch_size {self._shape.max_rows}")
        rows = room // (self.row_bytes * self._shape.max_tokens)
        if 1 <= rows < self._shape.max_rows:
            fits.append(f"max_batch_size of at most {rows} at max_context_tokens {self._shape.max_tokens}")
        return "; what fits: " + ", or ".join(fits) if fits else ": the model is too large for this device"
