"""Headers of checkpoint files: what is read, and that nothing garbled is believed."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from extractor.checkpoint.tensor_file import read_tensor_file
from extractor.errors import CheckpointError
from tests.extractor.tensor_files import entry, write_tensor_file


def test_tensors_are_found_where_the_library_puts_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "a": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = {tensor.name: tensor for tensor in read_tensor_file(tmp_path / "x.safetensors").tensors}
    content = (tmp_path / "x.safetensors").read_bytes()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        wanted = bytes(tensor.flatten().view(torch.uint8).tolist()) if tensor.numel() else b""
        assert content[found[name].offset : found[name].offset + found[name].bytes] == wanted


BROKEN: dict[str, tuple[dict[str, Any], int, str]] = {
    "overlapping tensors": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "overlap or leave holes"),
    "a hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, 10, "overlap or leave holes"),
    "data cut off": ({"a": entry("U8", [4], 0, 4)}, 3, "is truncated"),
    "data too long": ({"a": entry("U8", [4], 0, 4)}, 5, "longer than its header says"),
    "a shape that needs more": (
        {"a": entry("F32", [4], 0, 4)},
        4,
        r"takes 4 bytes, its shape \[4\] and dtype F32 need 16",
    ),
    "a shape that overflows": (
        {"a": entry("U8", [2**62, 2**62, 16], 0, 4)},
        4,
        r"takes 4 bytes, its shape .* need \d{38}",
    ),
    "offsets beyond 64 bits": ({"a": entry("U8", [4], 2**64, 2**64 + 4)}, 4, "overlap or leave holes"),
    "an unknown dtype": ({"a": entry("F4", [8], 0, 4)}, 4, "has the dtype 'F4'"),
    "a negative offset": ({"a": entry("U8", [4], -4, 0)}, 0, "impossible sizes"),
    "a fractional shape": ({"a": entry("U8", [4.0], 0, 4)}, 4, "impossible sizes"),  # type: ignore[list-item]
    "an entry that is none": ({"a": [1, 2]}, 0, "is malformed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_is_refused_that_has(name: str, tmp_path: Path) -> None:
    entries, size, message = BROKEN[name]
    path = write_tensor_file(tmp_path / "x.safetensors", entries, bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensor_file(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_missing_or_no_safetensors_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.safetensors is missing; copy or download the whole checkpoint"):
        read_tensor_file(tmp_path / "absent.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 not a tensor in sight")
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        read_tensor_file(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((4).to_bytes(8, "little") + b"[[[[")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_tensor_file(tmp_path / "x.safetensors")


def test_a_hundred_thousand_tensors_are_read_in_a_moment(tmp_path: Path) -> None:
    entries = {f"layers.{number}": entry("U8", [1], number, number + 1) for number in range(100_000)}
    path = write_tensor_file(tmp_path / "x.safetensors", entries, bytes(100_000))
    begin = time.process_time()
    assert len(read_tensor_file(path).tensors) == 100_000
    assert time.process_time() - begin < 10


@given(at=st.integers(0, 300), noise=st.binary(max_size=12), cut=st.integers(0, 400))
def test_garbled_files_are_refused_or_consistent(
    tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes, cut: int
) -> None:
    path = tmp_path_factory.mktemp("garbled") / "x.safetensors"
    entries = {"a": entry("BF16", [3, 5], 0, 30), "b": entry("F32", [7], 30, 58)}
    content = write_tensor_file(path, entries, bytes(58)).read_bytes()
    path.write_bytes((content[:at] + noise + content[at + len(noise) :])[:cut])
    try:
        found = read_tensor_file(path)
    except CheckpointError:
        return
    size, end = path.stat().st_size, len(found.header)
    for tensor in found.tensors:
        assert tensor.offset == end
        end += tensor.bytes
    assert end == size


def test_a_file_that_cannot_be_opened_is_not_called_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory; check the disk and its permissions"):
        read_tensor_file(tmp_path)
