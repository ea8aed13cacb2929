"""Page-locked host memory, from which a GPU reads spans, by the copy engine or inside its kernels.

Large arenas are mapped in huge pages, written first and registered afterwards: registering pages that are not allocated
yet takes many times as long. Invariant: an arena never moves, and stays registered until its tensor is freed.
"""

from __future__ import annotations

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import SlotsError

SMALL_ARENA_BYTES = 64 << 20
TOUCH_THREADS = 8

LOCKED_SHARE = 0.8
"""Share of the free memory that is page-locked at most, where no bound is set: locked pages cannot be swapped out."""


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


def lockable_bytes(root: Path = Path("/")) -> int | None:
    """Memory that may be page-locked now without a danger to the system: `LOCKED_SHARE` of what is free on the machine
    and in this process's control group. None if the system does not tell. `root` is where /proc and /sys are."""
    free = free_host_bytes(root)
    return None if free is None else int(LOCKED_SHARE * free)


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Memory that is free on the machine and in this process's control group; None if the system does not tell."""
    free = [_free_on_machine(root / "proc/meminfo"), _free_in_group(root / "sys/fs/cgroup")]
    known = [one for one in free if one is not None]
    return max(0, min(known)) if known else None


def _free_on_machine(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_in_group(group: Path) -> int | None:
    """Of version 2, where the group's own files are at the root of what a container sees; page cache counts as free."""
    try:
        most, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(fields.get("file", 0))


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
