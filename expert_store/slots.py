"""The slots of one layer: one contiguous block of device memory per slot, seen as the layer's expert parameters.

Invariant: slot s of every parameter view is the memory of slot s of the pool; filling a slot is one contiguous copy
when the store's dtype is the pool's, and a conversion tensor by tensor when it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from expert_store.errors import SlotsError

if TYPE_CHECKING:
    from expert_store.manifest import LayerSpec

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors dtype names of weights that a slot can hold."""


class SlotPool:
    """Device memory for `num_slots` experts of one layer.

    Args:
        spec: the layer's tensors and their positions in a span.
        num_slots: S.
        device: device of the memory.
        dtype: dtype of the weights in the pool.

    Attributes:
        params: name → view [S, *shape] of `dtype`; rows change whenever a slot is filled.
        slot_bytes: bytes of one slot.

    Raises:
        SlotsError: the device has not enough memory.
    """

    def __init__(self, spec: LayerSpec, *, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        self.num_slots = num_slots
        self.device = device
        self._is_verbatim = all(TORCH_DTYPES[tensor.dtype] == dtype for tensor in spec.tensors)
        numels = [int(torch.Size(tensor.shape).numel()) for tensor in spec.tensors]
        self.slot_bytes = sum(numels) * dtype.itemsize
        try:
            self._memory = torch.zeros((num_slots, self.slot_bytes), dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError) as error:
            raise SlotsError(
                f"no memory on {device} for {num_slots} slots of {self.slot_bytes} bytes for layer {spec.layer}: "
                f"{error}; pass a smaller --slots or --slots-memory"
            ) from error
        self._flat = self._memory.view(dtype)
        self._numels = numels
        self.params = self._as_params(self._flat)
        self.rows = {name: list(param.unbind(0)) for name, param in self.params.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.num_slots * self.slot_bytes

    def gather(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies of slots' parameters, name → [N, *shape], made as one block; slots is int64 [N] on the device."""
        return self._as_params(self._flat.index_select(0, slots))

    def fill(self, slot: int, read: Callable[[torch.Tensor], None]) -> None:
        """Let `read` write a span (uint8 [span_bytes] on the CPU) into slot `slot`, with no copy where dtypes agree."""
        if self._is_verbatim and self.device.type == "cpu":
            read(self._memory[slot])
            return
        staging = torch.empty(self.spec.span_bytes, dtype=torch.uint8)
        read(staging)
        self.copy_from(slot, staging)

    def copy_from(self, slot: int, span: torch.Tensor) -> None:
        """Copy a span (uint8 [span_bytes], host memory) into slot `slot`, on the current stream, without waiting."""
        if self._is_verbatim:
            self._memory[slot].copy_(span, non_blocking=True)
            return
        for tensor in self.spec.tensors:
            part = span[tensor.offset : tensor.offset + tensor.bytes].view(TORCH_DTYPES[tensor.dtype])
            self.params[tensor.name][slot].copy_(part.view(tensor.shape), non_blocking=True)

    def _as_params(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views name → [N, *shape] of whole slots, flat [N, elements]."""
        params, start = {}, 0
        for tensor, numel in zip(self.spec.tensors, self._numels, strict=True):
            params[tensor.name] = flat[:, start : start + numel].view(len(flat), *tensor.shape)
            start += numel
        return params
