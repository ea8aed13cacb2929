"""Findings of the doctor: each fault of a machine is told with its remedy, and a sound machine has none."""

from __future__ import annotations

import importlib.metadata
import resource
from pathlib import Path

import pytest

from expert_store.manifest import read_manifest
from server.machine import checks
from server.machine.versions import Finding, library_findings, python_finding

GIB = 1 << 30


def _version(name: str) -> str:
    if name == "absent":
        raise importlib.metadata.PackageNotFoundError(name)
    return "2.11.0+cu130"


def _write(root: Path, name: str, text: str) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("finding", "status", "said"),
    [
        (python_finding(">=3.11", "3.12.3"), "ok", "3.12.3"),
        (python_finding(">=3.11", "3.10.1"), "error", "install Python >=3.11"),
        (checks.no_gpu_finding(False, None), "ok", "the CPU serves"),
        (checks.no_gpu_finding(True, None), "error", "install torch with CUDA"),
        (checks.no_gpu_finding(True, "13.0"), "error", "update the driver to one for CUDA 13.0"),
        (checks.gpu_finding("A", (9, 0), 79 * GIB, 80 * GIB), "ok", "79.0 GiB of 80.0 GiB free"),
        (checks.gpu_finding("A", (9, 0), 40 * GIB, 80 * GIB), "warning", "end the process that holds the rest"),
        (checks.gpu_finding("A", (7, 5), 80 * GIB, 80 * GIB), "warning", "captured decoding wants 8.0"),
        (checks.compiler_finding(lambda name: "/bin/gcc" if name == "gcc" else None), "ok", "/bin/gcc"),
        (checks.compiler_finding(lambda name: None), "error", "install gcc"),
        (checks.memory_finding(None, None), "ok", "does not tell"),
        (checks.threads_finding(2, 2, None), "ok", "with 2, on 2 cores"),
        (checks.threads_finding(8, 16, 2.0), "warning", "set OMP_NUM_THREADS=2: threads wait"),
        (checks.threads_finding(1, 4, None), "warning", "set OMP_NUM_THREADS=4: cores are idle"),
        (checks.wait_policy_finding(None), "ok", "spin briefly"),
        (checks.wait_policy_finding("active"), "warning", "unset it"),
        (checks.files_finding(65536), "ok", "65536"),
        (checks.files_finding(resource.RLIM_INFINITY), "ok", "unlimited"),
        (checks.files_finding(1024), "warning", "ulimit -n"),
        (checks.room_finding(Path("x"), GIB), "ok", "1.0 GiB free"),
        (checks.room_finding(Path("x"), 1), "error", "free some"),
        (checks.disk_finding(3.2e9), "ok", "3.20 GB/s"),
        (checks.disk_finding(1e8), "warning", "local NVMe disk"),
    ],
)
def test_a_finding_says_what_is_wrong_and_what_to_do(finding: Finding, status: str, said: str) -> None:
    assert finding.status == status
    assert said in f"{finding.found} | {finding.remedy}"
    assert bool(finding.remedy) == (status != "ok")


def test_libraries_out_of_their_range_or_missing_are_named() -> None:
    wanted = ["torch>=2.11", "absent>=1,<2", "torch>=3; extra == 'dev'", "torch>=3; sys_platform == 'none'"]
    assert [(one.subject, one.status) for one in library_findings(wanted, _version)] == [("absent", "error")]
    [old] = library_findings(["torch>=2.12"], _version)
    assert (old.found, old.remedy) == ("2.11.0+cu130, wanted >=2.12", "pip install 'torch>=2.12'")
    assert [one.status for one in library_findings(wanted[:1], _version)] == ["ok"]


@pytest.mark.parametrize(("free", "status"), [(1, "error"), (20 << 20, "warning"), (GIB, "ok")])
def test_host_memory_is_held_against_the_store(tiny_store: Path, free: int, status: str) -> None:
    assert checks.memory_finding(read_manifest(tiny_store), free).status == status


def test_huge_pages_are_wanted_only_where_the_system_has_them_off(tmp_path: Path) -> None:
    name = "sys/kernel/mm/transparent_hugepage/enabled"
    assert checks.huge_pages_finding(tmp_path).status == "ok"
    assert checks.huge_pages_finding(_write(tmp_path, name, "always [madvise] never\n")).found == "madvise"
    assert checks.huge_pages_finding(_write(tmp_path, name, "always madvise [never]\n")).status == "warning"


def test_a_store_is_examined_with_the_rate_of_its_disk(tiny_store: Path, tmp_path: Path) -> None:
    _write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    findings = {one.subject: one for one in checks.examine(tiny_store, tmp_path)}
    assert "GB/s" in findings["disk rate"].found
    assert "a quota leaves 0.5" in findings["threads"].found
