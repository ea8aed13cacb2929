"""Calls of CUDA's driver, compiled against its header: the driver on a GPU, else one made of the system's mapping."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from expert_store.paging import driver
from expert_store.paging.driver import CudaAddresses, CudaFrames, MappingError, _Driver, probe
from expert_store.paging.frames import MappedMemory

HEADERS = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
DEVICE = torch.device("cuda:0")
NUM_FRAMES = 16


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """A library in the place of the driver's, and of what torch does of a GPU's memory."""
    compiler = shutil.which("cc")
    if compiler is None or not (HEADERS / "cuda.h").is_file():
        pytest.skip("there is no compiler here, or no header of CUDA's driver")
    path = tmp_path / "driver.so"
    source = Path(__file__).with_name("driver.c")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{HEADERS}", str(source), "-o", str(path)]
    subprocess.run(command, check=True, timeout=60)

    def tensor(addresses: CudaAddresses) -> torch.Tensor:
        told = addresses.__cuda_array_interface__
        shown = (ctypes.c_uint8 * told["shape"][0]).from_address(told["data"][0])
        shown.keeps = addresses  # type: ignore[attr-defined]
        return torch.frombuffer(shown, dtype=torch.uint8)

    monkeypatch.setattr(CudaAddresses, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(driver, "_Driver", lambda: _Driver(str(path)))
    return ctypes.CDLL(str(path))


def test_a_frame_moves_between_two_tensors(library: ctypes.CDLL) -> None:
    assert probe(DEVICE) == 1 << 16
    gc.collect()
    assert library.held() == 0, "what was tried is given back"


def test_frames_hold_what_was_written_and_are_freed_with_the_last_tensor(library: ctypes.CDLL) -> None:
    frames = CudaFrames(DEVICE, 6)
    size = frames.frame_bytes
    one, other = MappedMemory(frames, 4 * size, [(0, 3 * size)]), MappedMemory(frames, 4 * size, [(0, size)])
    one.bytes[: 3 * size].fill_(1)
    assert frames.num_free == 2
    one.keep([(0, 1), (2 * size, 3 * size)])
    other.keep([(0, 4 * size)])
    other.bytes.fill_(2)
    assert (frames.num_free, one.bytes[0], one.bytes[2 * size]) == (0, 1, 1)
    with pytest.raises(AssertionError, match="1 frames of 0 free ones"):
        one.keep([(0, 3 * size)])
    shown = one.bytes[5:9]
    del frames, one, other
    gc.collect()
    assert library.held() == 6
    assert shown.tolist() == [1] * 4
    del shown
    gc.collect()
    assert library.held() == 0


def test_memory_that_ends_is_an_error_and_what_was_taken_is_given_back(library: ctypes.CDLL) -> None:
    with pytest.raises(MappingError, match="cuMemCreate failed with CUDA error 2"):
        CudaFrames(DEVICE, NUM_FRAMES + 1)
    gc.collect()
    assert library.held() == 0


def test_a_gpu_that_maps_no_memory_and_a_missing_driver_are_named(library: ctypes.CDLL) -> None:
    with pytest.raises(MappingError, match="no virtual memory management: cuda:1"):
        probe(torch.device("cuda:1"))
    with pytest.raises(MappingError, match="the CUDA driver cannot be called: no-driver"):
        _Driver("no-driver.so")


@pytest.mark.gpu
def test_frames_of_a_gpu_move_under_a_captured_graph() -> None:
    """A graph that copies between two tensors reads and writes what has moved behind their addresses since."""
    frames = CudaFrames(DEVICE, 3)
    size = frames.frame_bytes
    one, other = (MappedMemory(frames, 2 * size, [(0, size)]) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    one.bytes[:size].fill_(3)
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        other.bytes[:size].add_(one.bytes[:size])
    for value in (4, 5):
        one.keep([(0, 2 * size)])
        one.bytes.fill_(value)
        other.bytes[:size].fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert (other.bytes[:size] == value + 1).all()
        one.keep([(0, size)])
        other.keep([(0, 2 * size)])
        other.bytes[size:].fill_(9)
        assert (one.bytes[:size] == value).all()
        other.keep([(0, size)])
