"""Measures the rates of this machine: some seconds, once; `server.cli.fit` keeps the result.

Everything is measured as the server does it: products of one row over matrices of about one expert that fill more
memory than caches have, reads by its threads, page-locked copies. Invariant: what was allocated is freed, and the
temporary file is removed.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from expert_store.residency.pinned import free_host_bytes, new_arena, page_lock
from extractor.encoding.names import ENCODINGS
from server.machine.disk import PIECE_BYTES, read_rate
from server.machine.rates import H100_CODE_RATE, MachineRates
from server.model.seam.row_kernels import Run, row_kernels

Clock = Callable[[], float]
ROWS, COLUMNS = 1024, 2048
"""Of a matrix: 4 MiB in 16 bits, between a small expert's and a large one's."""
NUM_MATRICES = 64
PROMPT_ROWS = 16
"""Tokens that one expert gets of a prompt's chunk: 256 tokens, top-8 of 128."""
OPERATIONS = 2000
COPIED_BYTES = 256 << 20
GPU_MATRIX = 4096
REPEATS = 5
COPY_SHARE = 3.0 / 3.16
"""Of an H100's rate of reading its memory that a copy on it reaches, read and written bytes together."""
H100_PROCESSORS = 132


def probe(device: torch.device, files: list[Path], clock: Clock = time.perf_counter) -> MachineRates:
    """The rates of this machine with `device` as the one that computes.

    Args:
        files: to measure the disk's rate on; without any, a temporary file is written.
        clock: seconds; that of the process leaves out what other processes take.

    Raises:
        OSError: a file cannot be read or written. SlotsError: no memory can be page-locked.
    """
    if device.type == "cuda":
        return _probe_gpu(device, files, clock)
    matrices = torch.zeros(NUM_MATRICES, ROWS, COLUMNS, dtype=torch.bfloat16)
    row = torch.randn(COLUMNS).bfloat16()
    rows = torch.randn(PROMPT_ROWS, COLUMNS).bfloat16()
    few = matrices[: NUM_MATRICES // 4]
    product = seconds(lambda: [functional.linear(rows, matrix) for matrix in few], clock)
    disk, cached = _file_rates(files, clock)
    return MachineRates(
        kind="cpu",
        name=_cpu_name(),
        device_memory=0,
        host_memory=free_host_bytes() or 0,
        read_rate=matrices.nbytes / seconds(lambda: [functional.linear(row, matrix) for matrix in matrices], clock),
        expert_rate=matrices.nbytes / seconds(lambda: [torch.mv(matrix, row) for matrix in matrices], clock),
        copy_rate=cached,
        disk_rate=disk,
        code_rate=_code_rate(clock),
        product_rate=2 * PROMPT_ROWS * few.numel() / product,
        operation_seconds=_operation_seconds(torch.device("cpu"), clock),
    )


def with_free_memory(rates: MachineRates, device: torch.device) -> MachineRates:
    """This machine's rates, measured some time ago, with the memory that is free now."""
    device_memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return replace(rates, device_memory=device_memory, host_memory=free_host_bytes() or 0)


def seconds(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of `run`, which has finished when it returns: the least of some, since other work only adds to them."""
    run()
    times = []
    for _ in range(REPEATS):
        began = clock()
        run()
        times.append(clock() - began)
    return max(min(times), 1e-9)


def _operation_seconds(device: torch.device, clock: Clock) -> float:
    """Of one small operation, by the host: what the device computes meanwhile is hidden behind the next launch."""
    small = torch.zeros(1, 512, device=device)

    def many() -> None:
        for _ in range(OPERATIONS):
            small.add(small)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return seconds(many, clock) / OPERATIONS


def _code_rate(clock: Clock) -> float:
    """Codes a second of products of one row with 4-bit rows; without vector kernels, those decode in torch: a tenth."""
    encoding = ENCODINGS["int4"]
    kernels = row_kernels(encoding, COLUMNS)
    matrices = torch.zeros(NUM_MATRICES, ROWS, encoding.row_bytes(COLUMNS), dtype=torch.uint8)
    x, out = torch.zeros(1, COLUMNS), torch.zeros(1, ROWS)
    if kernels is None:
        return 1e8
    run = [Run(0, 0, 1, 0)]

    def products() -> None:
        for matrix in matrices:
            kernels.multiply(x, [matrix], run, out)

    return NUM_MATRICES * ROWS * COLUMNS / seconds(products, clock)


def _file_rates(files: list[Path], clock: Clock) -> tuple[float, float]:
    """Rates of reading files from the disk and again from the page cache."""
    with tempfile.NamedTemporaryFile(prefix="deepfew-probe-", dir=files[0].parent if files else None) as temporary:
        temporary.write(os.urandom(PIECE_BYTES) * (COPIED_BYTES // PIECE_BYTES))
        temporary.flush()
        own = [Path(temporary.name)]
        disk = read_rate(files or own)
        return disk, COPIED_BYTES / seconds(lambda: _read_all(own[0]), clock)


def _read_all(path: Path) -> None:
    memory = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(memory):
            pass


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return told or platform.processor() or platform.machine()


def _probe_gpu(device: torch.device, files: list[Path], clock: Clock) -> MachineRates:
    def done(run: Callable[[], object]) -> float:
        def finished() -> None:
            run()
            torch.cuda.synchronize(device)

        return seconds(finished, clock)

    properties = torch.cuda.get_device_properties(device)
    free = torch.cuda.mem_get_info(device)[0]
    source = torch.zeros(COPIED_BYTES * 4, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = new_arena(1, COPIED_BYTES, torch.uint8, True)
    page_lock(host)
    memory_seconds = done(lambda: target.copy_(source)) * COPY_SHARE
    copy_seconds = done(lambda: target[:COPIED_BYTES].copy_(host[0], non_blocking=True))
    matrix = torch.zeros(GPU_MATRIX, GPU_MATRIX, dtype=torch.bfloat16, device=device)
    rate = 2 * source.nbytes / memory_seconds
    return MachineRates(
        kind="gpu",
        name=properties.name,
        device_memory=free,
        host_memory=free_host_bytes() or 0,
        read_rate=rate,
        expert_rate=rate,
        copy_rate=host.nbytes / copy_seconds,
        disk_rate=_file_rates(files, clock)[0],
        code_rate=H100_CODE_RATE * properties.multi_processor_count / H100_PROCESSORS,
        product_rate=2 * GPU_MATRIX**3 / done(lambda: matrix @ matrix),
        operation_seconds=_operation_seconds(device, clock),
    )


def weights_of(path: Path) -> list[Path]:
    """The files of a store's experts, or of a checkpoint, to measure the disk on; empty where there is none."""
    shards = sorted((path / "experts").glob("*.safetensors"))
    return shards or sorted(path.glob("*.safetensors"))
