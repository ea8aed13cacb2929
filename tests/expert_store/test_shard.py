"""A shard's bytes, and how damaged ones are told."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from expert_store.errors import ManifestError, ShardCorruptError
from expert_store.manifest import Manifest
from expert_store.shard import DATA_ALIGNMENT, ShardLayout, open_shard, shard_name
from tests.expert_store.hand_made import COLUMNS, LAYERS, span, write_store

GOLDEN_HEADER = (
    b'{"__metadata__":{"format":"deepfew-shard","version":"1","index":"1","experts":"2,1"},'
    b'"layers.1.gate_up_proj":{"dtype":"BF16","shape":[4,3],"data_offsets":[0,24]},'
    b'"layers.1.down_proj":{"dtype":"BF16","shape":[3,2],"data_offsets":[24,36]},'
    b'"layers.2.gate_up_proj":{"dtype":"BF16","shape":[4,3],"data_offsets":[36,60]},'
    b'"layers.2.down_proj":{"dtype":"BF16","shape":[3,2],"data_offsets":[60,72]}}'
)
GOLDEN_DATA = bytes(range(80, 116)) + bytes(range(140, 176))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_store(tmp_path)


def check(root: Path, manifest: Manifest, index: int) -> None:
    deep = manifest.deep_experts[index]
    os.close(open_shard(root.resolve(), deep, ShardLayout.of(manifest.layers, deep)))


def test_shard_bytes_never_change(tmp_path: Path, manifest: Manifest) -> None:
    content = (tmp_path / "experts/deep-00001.safetensors").read_bytes()
    assert content == (4088).to_bytes(8, "little") + GOLDEN_HEADER.ljust(4088) + GOLDEN_DATA


def test_data_begins_on_a_page() -> None:
    for count in (1, 7, 40):
        layout = ShardLayout(LAYERS, 0, (1,) * count)
        assert layout.data_offset % DATA_ALIGNMENT == 0
        assert layout.span_offsets[1] == layout.data_offset + 36


def test_shard_is_a_safetensors_file(tmp_path: Path, manifest: Manifest) -> None:
    with safe_open(tmp_path / shard_name(1), "pt") as file:
        assert file.metadata() == {"format": "deepfew-shard", "version": "1", "index": "1", "experts": "2,1"}
        down = file.get_tensor("layers.2.down_proj")
    assert down.dtype == torch.bfloat16
    assert tuple(down.shape) == (3, 2)
    assert bytes(down.view(torch.uint8).flatten().tolist()) == span(1, COLUMNS[1][1])[24:]


def test_intact_shards_open(tmp_path: Path, manifest: Manifest) -> None:
    for index in range(2):
        check(tmp_path, manifest, index)


def test_swapped_shards_are_told_by_their_headers(tmp_path: Path, manifest: Manifest) -> None:
    first, second = (tmp_path / shard_name(index) for index in range(2))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(ShardCorruptError, match=r"deep-00000.*altered or swapped"):
        check(tmp_path, manifest, 0)


@given(at=st.integers(0, 4095), byte=st.integers(0, 255))
def test_any_changed_header_byte_is_told(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    root = tmp_path_factory.mktemp("store")
    manifest = write_store(root)
    path = root / shard_name(0)
    content = bytearray(path.read_bytes())
    if content[at] == byte:
        return
    content[at] = byte
    path.write_bytes(content)
    with pytest.raises(ShardCorruptError, match="deep-00000"):
        check(root, manifest, 0)


@given(size=st.integers(0, 4168 + 100).filter(lambda size: size != 4168))
def test_any_other_size_is_told(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    root = tmp_path_factory.mktemp("store")
    manifest = write_store(root)
    path = root / shard_name(0)
    path.write_bytes(path.read_bytes()[:size].ljust(size))
    with pytest.raises(ShardCorruptError, match=f"has {size} bytes, the manifest says 4168"):
        check(root, manifest, 0)


def test_a_missing_file_is_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / shard_name(0)).unlink()
    with pytest.raises(ShardCorruptError, match=r"deep-00000.*cannot be found"):
        check(tmp_path, manifest, 0)


def test_a_link_out_of_the_store_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "inner"
    manifest = write_store(root)
    outside = tmp_path / "outside"
    (root / shard_name(0)).rename(outside)
    (root / shard_name(0)).symlink_to(outside)
    with pytest.raises(ShardCorruptError, match="outside the store"):
        check(root, manifest, 0)


def test_a_link_within_the_store_is_followed(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / shard_name(0)).rename(tmp_path / "experts/moved")
    (tmp_path / shard_name(0)).symlink_to("moved")
    check(tmp_path, manifest, 0)


def test_a_directory_in_place_of_a_shard_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / shard_name(0)).unlink()
    (tmp_path / shard_name(0)).mkdir()
    with pytest.raises(ShardCorruptError):
        check(tmp_path, manifest, 0)


def test_offsets_that_the_layout_contradicts_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match="wanted 4096 and 4168"):
        ShardLayout.of(manifest.layers, replace(manifest.deep_experts[0], data_offset=8192))
