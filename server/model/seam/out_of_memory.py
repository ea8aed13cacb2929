"""A step that memory does not suffice for: told apart from what is broken, so that it costs one request alone.

Invariant: a `StepMemoryError` has neither cause nor context, whose frames would keep the step's tensors alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

REMEDY = (
    "ask for fewer tokens, or again when fewer requests run; the operator can lower max_batch_size, "
    "prefill_chunk_tokens or slots_memory"
)


class StepMemoryError(Exception):
    """A step that could not be run for want of memory. No row was advanced.

    Attributes:
        positions: of the rows, among those given, that have to go so that the others can run the step again.
    """

    def __init__(self, message: str, positions: Sequence[int]) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


def ran_out(error: BaseException) -> bool:
    """Whether `error` is an allocator's, of host or device memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def told(error: BaseException) -> str:
    """What an allocator says in its first sentence."""
    return " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
