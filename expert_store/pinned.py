"""Page-locked host memory, from which a GPU reads spans, by the copy engine or inside its kernels.

Large arenas are mapped in huge pages, written first and registered afterwards: registering pages that are not allocated
yet takes many times as long. Invariant: an arena never moves, and stays registered until its tensor is freed.
"""

from __future__ import annotations

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import SlotsError

SMALL_ARENA_BYTES = 64 << 20
TOUCH_THREADS = 8


class NotPinnableError(SlotsError):
    """The host cannot page-lock the requested memory."""


def new_arena(num_spans: int, elements: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """[num_spans, elements] of host memory, to be filled and then page-locked with `page_lock`. torch rounds its own
    pinned blocks up to powers of two, so it allocates only small arenas; a large one is mapped in huge pages."""
    num_bytes = num_spans * elements * dtype.itemsize
    if not pinned or num_bytes == 0:
        return torch.empty(num_spans, elements, dtype=dtype)
    if num_bytes <= SMALL_ARENA_BYTES:
        try:
            return torch.empty(num_spans, elements, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise NotPinnableError(f"{num_bytes} bytes of host memory could not be page-locked: {error}") from error
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_spans, elements)


def page_lock(arena: Tensor) -> None:
    """Page-locks an arena of `new_arena` for a GPU, until the tensor is freed. Raises NotPinnableError."""
    if arena.nbytes == 0 or arena.is_pinned():
        return
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = arena.data_ptr()
    status = int(runtime.cudaHostRegister(address, arena.nbytes, 0))
    if status != 0:
        raise NotPinnableError(f"{arena.nbytes} bytes of host memory could not be page-locked (CUDA error {status})")
    weakref.finalize(arena.untyped_storage(), runtime.cudaHostUnregister, address)


def locked_arena(num_spans: int, elements: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """A page-locked arena that is filled later: its pages are written by several threads before they are registered.

    Without `pinned` it is ordinary memory. Raises NotPinnableError.
    """
    arena = new_arena(num_spans, elements, dtype, pinned)
    if pinned and arena.nbytes and not arena.is_pinned():
        with ThreadPoolExecutor(TOUCH_THREADS, thread_name_prefix="page-touch") as threads:
            list(threads.map(_touch, np.array_split(arena.view(torch.uint8).numpy().reshape(-1), 8 * TOUCH_THREADS)))
        page_lock(arena)
    return arena


def _touch(part: npt.NDArray[np.uint8]) -> None:
    part[:: mmap.PAGESIZE] = 0
