"""`Frames` of a GPU, by the driver's virtual memory management, which torch does not offer for graphs of its own.

A frame is one allocation of the least size that the driver maps, 2 MiB on the GPUs of today. Invariant: calls are made
by the thread that uses the device; a call that fails raises `MappingError`. Source: CUDA driver API, "Virtual Memory
Management".
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expert_store.errors import SlotsError
from expert_store.paging.frames import MappedMemory

_DEVICE, _PINNED, _READ_WRITE = 1, 1, 3
"""CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_ACCESS_FLAGS_PROT_READWRITE."""
_IS_SUPPORTED = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED."""


class MappingError(SlotsError):
    """The driver cannot map memory as it was asked to."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte), ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )  # fmt: skip


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


_SIZE, _ADDRESS, _HANDLE = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_ulonglong
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(_SIZE), ctypes.POINTER(_Properties), ctypes.c_int),
    "cuMemCreate": (ctypes.POINTER(_HANDLE), _SIZE, ctypes.POINTER(_Properties), ctypes.c_ulonglong),
    "cuMemRelease": (_HANDLE,),
    "cuMemAddressReserve": (ctypes.POINTER(_ADDRESS), _SIZE, _SIZE, _ADDRESS, ctypes.c_ulonglong),
    "cuMemAddressFree": (_ADDRESS, _SIZE),
    "cuMemMap": (_ADDRESS, _SIZE, _SIZE, _HANDLE, ctypes.c_ulonglong),
    "cuMemUnmap": (_ADDRESS, _SIZE),
    "cuMemSetAccess": (_ADDRESS, _SIZE, ctypes.POINTER(_Access), _SIZE),
}


class _Driver:
    """The functions of `_SIGNATURES`, which raise MappingError."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            loaded = ctypes.CDLL(library)
            self._functions = {name: getattr(loaded, name) for name in _SIGNATURES}
        except (OSError, AttributeError) as error:
            raise MappingError(f"the CUDA driver cannot be called: {error}") from error
        for name, arguments in _SIGNATURES.items():
            self._functions[name].argtypes, self._functions[name].restype = arguments, ctypes.c_int

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise MappingError(f"{name} failed with CUDA error {code}")


class CudaFrames:
    """`Frames` of a GPU; its memory is taken from the device at once, and freed with the last tensor over it.

    Args:
        device: with its number.

    Raises:
        MappingError: the driver does not map memory for this GPU, or the device has too little.
    """

    def __init__(self, device: torch.device, num_frames: int) -> None:
        torch.cuda.synchronize(device)  # makes the device's context that of this thread
        self.call, self.device = _Driver(), device
        supported, size = ctypes.c_int(), _SIZE()
        self.call("cuDeviceGetAttribute", ctypes.byref(supported), _IS_SUPPORTED, device.index)
        if not supported.value:
            raise MappingError(f"this GPU's driver has no virtual memory management: {device}")
        properties = _Properties(type=_PINNED, location=_Location(_DEVICE, device.index))
        self.call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(properties), 0)
        self.frame_bytes = int(size.value)
        self.access = _Access(_Location(_DEVICE, device.index), _READ_WRITE)
        handles: list[int] = []
        weakref.finalize(self, _release_all, self.call, handles).atexit = False
        for _ in range(num_frames):
            handle = _HANDLE()
            self.call("cuMemCreate", ctypes.byref(handle), self.frame_bytes, ctypes.byref(properties), 0)
            handles.append(handle.value)
        self.free = handles.copy()

    @property
    def num_free(self) -> int:
        """See `Frames`."""
        return len(self.free)

    def reserve(self, num_places: int) -> CudaAddresses:
        """See `Frames.reserve`."""
        return CudaAddresses(self, num_places)


class CudaAddresses:
    """`Addresses` of `CudaFrames`; a tensor over them keeps this object."""

    def __init__(self, frames: CudaFrames, num_places: int) -> None:
        self._frames, self._num_bytes = frames, num_places * frames.frame_bytes
        address = _ADDRESS()
        frames.call("cuMemAddressReserve", ctypes.byref(address), self._num_bytes, 0, 0, 0)
        self._address = address.value
        self._behind: dict[int, int] = {}  # place → its frame
        of_all = (self._address, self._num_bytes, frames.frame_bytes, self._behind)
        weakref.finalize(self, _unmap_all, frames.call, *of_all).atexit = False

    def place(self, first: int, last: int) -> None:
        """See `Addresses.place`."""
        size, call = self._frames.frame_bytes, self._frames.call
        assert last - first <= self._frames.num_free, f"{last - first} frames of {self._frames.num_free} free ones"
        for place in range(first, last):
            call("cuMemMap", self._address + place * size, size, 0, self._frames.free[-1], 0)
            self._behind[place] = self._frames.free.pop()
        access = ctypes.byref(self._frames.access)
        call("cuMemSetAccess", self._address + first * size, (last - first) * size, access, 1)

    def remove(self, first: int, last: int) -> None:
        """See `Addresses.remove`. Waits for everything that is enqueued."""
        torch.cuda.synchronize(self._frames.device)
        for place in range(first, last):
            self._frames.call("cuMemUnmap", self._address + place * self._frames.frame_bytes, self._frames.frame_bytes)
            self._frames.free.append(self._behind.pop(place))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def tensor(self) -> Tensor:
        """See `Addresses.tensor`."""
        return torch.as_tensor(self, device=self._frames.device)


def _release_all(call: Callable[..., None], handles: list[int]) -> None:
    for handle in handles:
        call("cuMemRelease", handle)


def _unmap_all(call: Callable[..., None], address: int, num_bytes: int, size: int, behind: dict[int, int]) -> None:
    for place in behind:
        call("cuMemUnmap", address + place * size, size)
    call("cuMemAddressFree", address, num_bytes)


def probe(device: torch.device) -> int:
    """Bytes of a frame of a GPU, on which a frame was moved from one tensor to another to see that this works.

    Raises:
        MappingError: this GPU, or its driver, does not do so.
    """
    try:
        return _try(device)
    except (RuntimeError, TypeError, ValueError) as error:  # of torch, over memory that it did not make
        raise MappingError(f"torch does not take memory that the driver maps: {error}") from error


def _try(device: torch.device) -> int:
    frames = CudaFrames(device, 3)
    size = frames.frame_bytes
    one, other = (MappedMemory(frames, 2 * size, [(0, size)]) for _ in range(2))
    one.keep([(0, 2 * size)])
    one.bytes.fill_(1)
    one.keep([(0, size)])
    other.keep([(0, 2 * size)])
    other.bytes.fill_(2)
    told = [int(one.bytes[:size].max()), int(other.bytes.min())]
    if told != [1, 2]:
        raise MappingError(f"after a frame moved from one tensor to another they hold {told}, wanted [1, 2]")
    return size
