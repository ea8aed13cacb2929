"""The rates of a machine that predictions rest on, as a probe measured them once, or as another machine has them.

Invariant: bytes are bytes a second, and everything is measured as the server does it: products of one row, reads of
about one expert, the threads that it uses. `known.json` has machines on which this project was measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Literal

from expert_store.files import replacing
from server.errors import UsageError

VERSION = 1
H100_CODE_RATE = 2.75e12
"""Codes of int4 a second: 1.8e9 weights of a step at batch 1 in the 0.65 ms of gate_up and down in packed_gpu.json."""


@dataclass(frozen=True)
class MachineRates:
    """Memory in bytes, rates in bytes a second unless said otherwise.

    Attributes:
        kind: the device that computes.
        name: of the device.
        device_memory: of the GPU; 0 for a CPU, which computes from host memory.
        host_memory: that a process may take.
        read_rate: of the trunk's weights in products of one row, on a GPU of reading its memory.
        expert_rate: the same of one expert after the other.
        copy_rate: of an expert from host memory into a slot: page-locked on a GPU, from the page cache on a CPU.
        disk_rate: of reading experts from the disk.
        code_rate: codes a second that products of 4-bit rows convert; on a GPU it is that of its processors together.
        product_rate: floating-point operations a second of a prompt's products.
        operation_seconds: of one small operation of torch, launched by the host.
    """

    kind: Literal["gpu", "cpu"]
    name: str
    device_memory: int
    host_memory: int
    read_rate: float
    expert_rate: float
    copy_rate: float
    disk_rate: float
    code_rate: float
    product_rate: float
    operation_seconds: float


def known_machines() -> dict[str, MachineRates]:
    """The machines of `known.json` by name."""
    document = json.loads(files("server.machine").joinpath("known.json").read_text())
    return {name: MachineRates(**rates) for name, rates in document["machines"].items()}


def read_rates(path: Path) -> MachineRates:
    """The rates of a file that `write_rates` wrote.

    Raises:
        UsageError: it is another file, or of another version. FileNotFoundError: there is none.
    """
    try:
        document = json.loads(path.read_bytes())
        rates = MachineRates(**document["rates"]) if document["version"] == VERSION else None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} has no rates of a machine ({error}); remove it, or measure with --probe") from error
    if rates is None:
        raise UsageError(f"{path} has rates of another version; measure again with --probe")
    return rates


def write_rates(path: Path, rates: MachineRates) -> None:
    """Write the file, atomically, with its folders. Raises OSError."""
    with replacing(path) as file:
        file.write(json.dumps({"version": VERSION, "rates": asdict(rates)}, indent=1).encode())


RATE_NAMES = tuple(field.name for field in fields(MachineRates) if field.name not in ("kind", "name"))
