"""Checks of this machine for serving: GPU, memory, threads, disk, each with what to do about it.

Invariant: a check reads and measures, and changes nothing; what it cannot read is no fault of the machine. An *error*
is a fault that stops serving or the path that the hardware is there for; a *warning* costs speed or fails under load.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from expert_store.errors import SlotsError
from expert_store.manifest import Manifest, read_manifest
from expert_store.residency.pinned import free_host_bytes, new_arena, page_lock
from expert_store.store import MAX_OPEN_FILES
from extractor.planning.sizes import format_size
from extractor.writing.disk import DISK_MARGIN_BYTES, free_bytes
from server.machine.disk import read_rate
from server.machine.versions import Finding
from server.settings.openmp import wait_policy

CAPTURED_CAPABILITY = (8, 0)
"""Least compute capability that the captured decode path compiles for."""
BUSY_SHARE = 0.9
"""A GPU with less than this share of its memory free is used by another process."""
SLOW_DISK_RATE = 0.5e9
"""Bytes a second below which a missed expert takes several tokens' time; half of what an ordinary NVMe disk reads."""
SERVER_FILES = 1024 + 128 + MAX_OPEN_FILES
"""Open files of a server at its default number of connections: those, logs and libraries, and shards."""
TRIED_LOCK_BYTES = 256 << 20


def examine(store: Path | None, root: Path = Path("/")) -> Iterator[Finding]:
    """The findings of all checks, in the order of the report. Reads up to 256 MiB of the store's shards.

    Args:
        store: a store that is to be served; None: only the machine is looked at.
        root: the directory that holds /proc, /sys and /dev.

    Raises:
        ManifestError: `store` is no store. OSError: a shard cannot be read.
    """
    manifest = None if store is None else read_manifest(store)
    if torch.cuda.is_available():
        yield from _gpus()
        yield compiler_finding(shutil.which)
        yield _page_locking()
    else:
        has_driver = (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists()
        yield no_gpu_finding(has_driver, torch.version.cuda)
    yield memory_finding(manifest, free_host_bytes(root))
    yield huge_pages_finding(root)
    yield threads_finding(torch.get_num_threads(), _num_cores(), _cpu_quota(root))
    yield wait_policy_finding(wait_policy())
    yield files_finding(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield room_finding(store or Path.cwd(), free_bytes(store or Path.cwd()))
    if store is not None and manifest is not None and manifest.deep_experts:
        yield disk_finding(read_rate([store / deep.file for deep in manifest.deep_experts]))


def no_gpu_finding(has_driver: bool, built_for: str | None) -> Finding:
    """The finding where torch sees no GPU. `built_for` is torch's version of CUDA, None: it is built for the CPU."""
    if not has_driver:
        return Finding("GPU", "ok", "none; the CPU serves")
    if built_for is None:
        return Finding("GPU", "error", "has a driver here, but torch is built for the CPU", "install torch with CUDA")
    return Finding(
        "GPU",
        "error",
        f"has a driver here, but torch for CUDA {built_for} sees no device",
        f"update the driver to one for CUDA {built_for}, or give the container its devices (docker run --gpus all)",
    )


def _gpus() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield gpu_finding(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), free, total)


def gpu_finding(name: str, capability: tuple[int, int], free_bytes: int, total_bytes: int) -> Finding:
    """The finding of one GPU that torch sees."""
    found = f"{name}, {format_size(free_bytes)} of {format_size(total_bytes)} free"
    if capability < CAPTURED_CAPABILITY:
        found += f", compute capability {capability[0]}.{capability[1]}"
        return Finding("GPU", "warning", found, "captured decoding wants 8.0; the host drives the experts, more slowly")
    if free_bytes < BUSY_SHARE * total_bytes:
        return Finding("GPU", "warning", found, "end the process that holds the rest (nvidia-smi names it)")
    return Finding("GPU", "ok", found)


def compiler_finding(which: Callable[[str], str | None]) -> Finding:
    """Triton compiles the launcher of its kernels with the system's C compiler. `which` finds a program's path."""
    path = next((path for path in map(which, ("cc", "gcc", "clang")) if path is not None), None)
    if path is None:
        return Finding("C compiler", "error", "none, so Triton cannot start kernels", "install gcc")
    return Finding("C compiler", "ok", path)


def _page_locking() -> Finding:
    """Page-locks memory as the server does. `ulimit -l` binds some drivers and not others, so it is tried."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    said = "unlimited" if limit == resource.RLIM_INFINITY else format_size(limit)
    try:
        page_lock(new_arena(1, TRIED_LOCK_BYTES, torch.uint8, True))
    except SlotsError as error:
        remedy = f"raise ulimit -l, which is {said} (docker run --ulimit memlock=-1), or free memory"
        return Finding("page-locked memory", "error", str(error), remedy)
    return Finding("page-locked memory", "ok", f"{format_size(TRIED_LOCK_BYTES)} could be locked; ulimit -l is {said}")


def memory_finding(manifest: Manifest | None, free: int | None) -> Finding:
    """The finding of `free` bytes of host memory, None if unknown, for the store of `manifest` if there is one.

    A trunk that does not fit stops serving on a CPU; experts that do not fit are read from the disk.
    """
    if free is None:
        return Finding("host memory", "ok", "the system does not tell how much is free")
    found = f"{format_size(free)} free for this process"
    if manifest is None:
        return Finding("host memory", "ok", found)
    trunk = sum(file.bytes for file in manifest.trunk)
    experts = sum(deep.bytes for deep in manifest.deep_experts)
    if free < trunk:
        found += f", the trunk alone takes {format_size(trunk)}"
        return Finding("host memory", "error", found, "end other processes, or raise the container's limit of memory")
    if free < trunk + experts:
        found += f", trunk and experts take {format_size(trunk + experts)}"
        return Finding("host memory", "warning", found, "the disk holds the rest: a miss takes longer")
    return Finding("host memory", "ok", f"{found}, trunk and experts take {format_size(trunk + experts)}")


def huge_pages_finding(root: Path) -> Finding:
    """Page-locked memory is mapped in huge pages where the system allows it, which makes locking it faster."""
    try:
        text = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return Finding("huge pages", "ok", "the system does not tell")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: host memory is page-locked faster"
        return Finding("huge pages", "warning", "never", remedy)
    return Finding("huge pages", "ok", chosen)


def threads_finding(num_threads: int, num_cores: int, quota: float | None) -> Finding:
    """Threads of torch against the cores that this process may use, and its control group's quota of them."""
    most = num_cores if quota is None else min(num_cores, max(1, int(quota)))
    limit = f"{num_cores} cores" + ("" if quota is None else f", of which a quota leaves {quota:g}")
    found = f"torch computes with {num_threads}, on {limit}"
    if num_threads == most:
        return Finding("threads", "ok", found)
    slower = "threads wait for one another" if num_threads > most else "cores are idle"
    return Finding("threads", "warning", found, f"set OMP_NUM_THREADS={most}: {slower}")


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_quota(root: Path) -> float | None:
    """Cores that the control group of version 2 allows; None without a limit."""
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def wait_policy_finding(policy: str | None) -> Finding:
    """`policy` is OpenMP's wait policy as the user set it, None: deepfew sets the spins of waiting threads."""
    if policy is None or policy.upper() not in ("ACTIVE", "PASSIVE"):
        return Finding("waiting threads", "ok", "spin briefly")
    cost = "slow beside other processes" if policy.upper() == "ACTIVE" else "up to a quarter slower on small experts"
    return Finding("waiting threads", "warning", f"OMP_WAIT_POLICY={policy}", f"unset it: {cost}")


def files_finding(limit: int) -> Finding:
    """The finding of the soft limit of open files; -1 is none."""
    if limit == resource.RLIM_INFINITY or limit >= SERVER_FILES:
        return Finding("open files", "ok", "unlimited" if limit == resource.RLIM_INFINITY else str(limit))
    remedy = f"ulimit -n {SERVER_FILES}, or set --max-connections to less than 1024"
    return Finding("open files", "warning", f"{limit}, a server may need {SERVER_FILES}", remedy)


def room_finding(path: Path, free: int) -> Finding:
    """The finding of `free` bytes on the disk of `path`, where a store keeps usage and statistics, and may grow."""
    found = f"{format_size(free)} free beside {path}"
    if free < DISK_MARGIN_BYTES:
        return Finding("disk", "error", found, "free some: usage, statistics and growth are written there")
    return Finding("disk", "ok", found)


def disk_finding(rate: float) -> Finding:
    """The finding of a disk that reads so many bytes a second."""
    found = f"reads {rate / 1e9:.2f} GB/s"
    if rate < SLOW_DISK_RATE:
        remedy = "put the store on a local NVMe disk, or give --host-memory room for all experts"
        return Finding("disk rate", "warning", f"{found}, wanted {SLOW_DISK_RATE / 1e9:g}", remedy)
    return Finding("disk rate", "ok", found)
