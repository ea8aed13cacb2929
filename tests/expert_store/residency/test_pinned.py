"""The memory that may be page-locked, as the system tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from expert_store.residency.pinned import lockable_bytes

MACHINE = {"proc/meminfo": "MemTotal:  4000 kB\nMemAvailable:  1000 kB\n"}
GROUP = {"sys/fs/cgroup/memory.current": "700000\n", "sys/fs/cgroup/memory.stat": "anon 400000\nfile 300000\n"}


@pytest.mark.parametrize(("files", "free"), [
    (MACHINE, 1_024_000),
    ({**MACHINE, **GROUP, "sys/fs/cgroup/memory.max": "max\n"}, 1_024_000),
    ({**MACHINE, **GROUP, "sys/fs/cgroup/memory.max": "900000\n"}, 500_000),
    ({**MACHINE, **GROUP, "sys/fs/cgroup/memory.max": "100000\n"}, 0),
    ({**MACHINE, "sys/fs/cgroup/memory.max": "900000\n"}, 1_024_000),
    ({}, None),
])  # fmt: skip
def test_four_fifths_of_what_is_free_on_the_machine_and_in_the_group(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert lockable_bytes(tmp_path) == (None if free is None else int(0.8 * free))
