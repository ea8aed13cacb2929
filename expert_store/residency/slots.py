"""The slots of one layer: one contiguous block of device memory per slot, seen as the layer's expert parameters.

Invariant: slot s of every parameter view is the memory of slot s of the pool; filling a slot is one contiguous copy
when the store's dtype is the pool's, and a conversion tensor by tensor when it is not. Encoded tensors are never
converted: a slot holds the rows that the store holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from expert_store.encoding import ROW_ALIGNMENT
from expert_store.errors import SlotsError
from expert_store.residency.returnable import ReturnableMemory
from expert_store.rows import TORCH_DTYPES

if TYPE_CHECKING:
    from expert_store.manifest import LayerSpec, TensorSpec


def slot_bytes(spec: LayerSpec, dtype: torch.dtype) -> int:
    """Bytes of a slot of a layer whose plain tensors are held in `dtype`; of encoded layers a multiple of 16."""
    total = sum(_bytes_in_slot(tensor, dtype) for tensor in spec.tensors)
    return total + -total % ROW_ALIGNMENT if spec.is_encoded else total


def _bytes_in_slot(tensor: TensorSpec, dtype: torch.dtype) -> int:
    return tensor.bytes if tensor.encoding is not None else math.prod(tensor.shape) * dtype.itemsize


class SlotPool:
    """Device memory for `num_slots` experts of one layer.

    Args:
        spec: the layer's tensors and their positions in a span.
        num_slots: S.
        device: device of the memory.
        dtype: dtype of the plain tensors in the pool.

    Attributes:
        params: name → view [S, *shape] of `dtype`, and of an encoded tensor uint8 [S, O, row bytes]; rows change
            whenever a slot is filled.
        rows: name → the view of each slot.
        encodings: name → encoding, of the encoded tensors alone.
        slot_bytes: bytes of one slot.

    Raises:
        SlotsError: the device has not enough memory.
    """

    def __init__(self, spec: LayerSpec, *, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self.device = device
        self.encodings = {tensor.name: tensor.encoding for tensor in spec.tensors if tensor.encoding is not None}
        self._dtype = dtype
        plain = [tensor for tensor in spec.tensors if tensor.encoding is None]
        self._is_verbatim = all(TORCH_DTYPES[tensor.dtype] == dtype for tensor in plain)
        self.slot_bytes = slot_bytes(spec, dtype)
        self._returnable: ReturnableMemory | None = None
        try:
            self._memory = self._zeros()
        except (OSError, RuntimeError, MemoryError) as error:
            raise SlotsError(
                f"no memory on {device} for {num_slots} slots of {self.slot_bytes} bytes for layer {spec.layer}: "
                f"{error}; pass a smaller --slots or --slots-memory"
            ) from error
        self.params = self._as_params(self._memory)
        self.rows = {name: list(param.unbind(0)) for name, param in self.params.items()}

    def _zeros(self) -> torch.Tensor:
        """uint8 [S, slot_bytes]; on a CPU the system gives the memory of a slot when it is first filled."""
        shape = (self.num_slots, self.slot_bytes)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._returnable = ReturnableMemory(self.num_slots * self.slot_bytes)
        return self._returnable.bytes.view(shape)

    def give_back(self, slot: int) -> None:
        """Give the memory of a slot back to the system until it is filled again; does nothing on a GPU."""
        if self._returnable is not None:
            self._returnable.give_back(slot * self.slot_bytes, (slot + 1) * self.slot_bytes)

    def gather(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies of slots' parameters, name → [N, *shape], made as one block; slots is int64 [N] on the device."""
        return self._as_params(self._memory.view(self._dtype).index_select(0, slots).view(torch.uint8))

    def fill(self, slot: int, read: Callable[[torch.Tensor], None]) -> None:
        """Let `read` write a span (uint8 [span_bytes] on the CPU) into slot `slot`, with no copy where dtypes agree."""
        if self._is_verbatim and self.device.type == "cpu":
            read(self._memory[slot, : self.spec.span_bytes])
            return
        staging = torch.empty(self.spec.span_bytes, dtype=torch.uint8)
        read(staging)
        self.copy_from(slot, staging)

    def copy_from(self, slot: int, span: torch.Tensor) -> None:
        """Copy a span (uint8 [span_bytes], host memory) into slot `slot`, on the current stream, without waiting."""
        if self._is_verbatim:
            self._memory[slot, : self.spec.span_bytes].copy_(span, non_blocking=True)
            return
        for tensor in self.spec.tensors:
            part = span[tensor.offset : tensor.offset + tensor.bytes]
            dtype = torch.uint8 if tensor.encoding is not None else TORCH_DTYPES[tensor.dtype]
            self.params[tensor.name][slot].copy_(part.view(dtype).view(tensor.stored[1]), non_blocking=True)

    def _as_params(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views name → [N, *shape] of whole slots, uint8 [N, slot_bytes]."""
        params, start = {}, 0
        for tensor in self.spec.tensors:
            end = start + _bytes_in_slot(tensor, self._dtype)
            dtype = torch.uint8 if tensor.encoding is not None else self._dtype
            params[tensor.name] = memory[:, start:end].view(dtype).view(len(memory), *tensor.stored[1])
            start = end
        return params
