"""Safetensors files made by hand, as broken as a test wants them."""

import json
from pathlib import Path
from typing import Any


def write_tensor_file(path: Path, entries: dict[str, Any], data: bytes) -> Path:
    """Write a file with this header and data, checking nothing."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
