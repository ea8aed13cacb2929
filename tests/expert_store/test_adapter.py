"""Files of adapters, and the adapters that a store names."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.adapter import Adapter, attach, detach, store_adapters
from expert_store.errors import AdapterError, ShardCorruptError
from expert_store.manifest import format_manifest, read_manifest
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare


def an_adapter(fingerprint: str = "ab" * 32, num_layers: int = 2, num_experts: int = 4) -> Adapter:
    mask = np.zeros((num_layers, num_experts), dtype=np.bool_)
    mask[:, [0, 2, 3]] = True
    changes = {
        "model.layers.0.self_attn.q_proj": {"lora_A": torch.ones(2, 8), "lora_B": torch.arange(12.0).view(6, 2)},
        "model.norm": {"scale": torch.full((8,), 0.5)},
    }
    return Adapter(fingerprint, num_layers, num_experts, changes, mask=mask, training={"tokens": 7})


def same(one: Adapter, other: Adapter) -> bool:
    return one.to_bytes() == other.to_bytes()


def test_an_adapter_is_read_as_it_was_written(tmp_path: Path) -> None:
    adapter = an_adapter()
    adapter.write(tmp_path / "a.safetensors")
    read = Adapter.read(tmp_path / "a.safetensors")
    assert same(read, adapter)
    assert read.mask is not None
    assert read.mask.tolist() == [[True, False, True, True]] * 2
    assert torch.equal(read.changes["model.norm"]["scale"], torch.full((8,), 0.5))
    pools = replace(adapter, mask=None, shares=(0.25, 1.0))
    pools.write(tmp_path / "p.safetensors")
    assert Adapter.read(tmp_path / "p.safetensors").shares == (0.25, 1.0)


def test_an_adapter_is_for_its_mask_or_for_masks_of_its_sizes_and_never_for_a_full_one() -> None:
    planned = an_adapter()
    assert planned.mask is not None
    assert planned.is_for(planned.mask)
    assert not planned.is_for(~planned.mask)
    pools = replace(planned, mask=None, shares=(0.25, 1.0))
    assert pools.is_for(planned.mask)
    assert not pools.is_for(np.ones((2, 4), dtype=np.bool_))
    assert not replace(pools, shares=(0.25, 0.5)).is_for(planned.mask)


def test_a_ratio_is_told_with_the_one_before_only_where_that_was_measured() -> None:
    training = {"ratios_before": {"0.5": 2.0}, "ratios": [[1, {"0.5": 1.5}], [2, {"0.5": 1.25, "0.25": 3.0}]]}
    adapter = replace(an_adapter(), training=training)
    assert adapter.told_ratio("0.5") == "× 1.250 (without × 2.000)"
    assert adapter.told_ratio("0.25") == "× 3.000"


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"nothing that such a file begins with"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="deepfew adapt"):
        Adapter.read(tmp_path / "a.safetensors")


def test_an_adapter_of_an_unknown_version_or_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(an_adapter().to_bytes().replace(rb'"version\": 1', rb'"version\": 9'))
    with pytest.raises(AdapterError, match="version 9"):
        Adapter.read(path)
    path.write_bytes(an_adapter().to_bytes().replace(b"norm.scale", b"norm.stale"))
    with pytest.raises(AdapterError, match="damaged"):
        Adapter.read(path)
    infinite = replace(an_adapter(), changes={"model.norm": {"scale": torch.tensor([torch.inf])}})
    path.write_bytes(infinite.to_bytes())
    with pytest.raises(AdapterError, match="not finite"):
        Adapter.read(path)


@pytest.fixture
def store(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(count=8)).run()
    return tmp_path / "store"


def of_store(path: Path) -> Adapter:
    manifest = read_manifest(path)
    return an_adapter(manifest.source.fingerprint, manifest.model.num_layers, manifest.model.num_experts)


def test_a_store_names_the_adapters_that_are_attached_and_forgets_those_that_are_detached(store: Path) -> None:
    before = read_manifest(store)
    adapter = of_store(store)
    attach(store, "first", adapter)
    attach(store, "second", replace(adapter, mask=None, shares=(0.1, 0.5)))
    manifest = read_manifest(store)
    assert b'"version": 3' in format_manifest(manifest), "older programs refuse it by its version"
    found = store_adapters(store, manifest)
    assert list(found) == ["first", "second"]
    assert same(found["first"], adapter)
    with Store.open(store) as opened:
        opened.verify()
    attach(store, "first", replace(adapter, training={"tokens": 8}))
    assert store_adapters(store, read_manifest(store))["first"].training == {"tokens": 8}
    assert len(list((store / "adapters").iterdir())) == 2
    detach(store, "first")
    detach(store, "second")
    assert read_manifest(store) == before
    assert b'"version": 1' in format_manifest(before)
    with pytest.raises(AdapterError, match="it has none"):
        detach(store, "first")


def test_an_altered_adapter_is_found_before_it_is_used(store: Path) -> None:
    attach(store, "first", of_store(store))
    (file,) = (store / "adapters").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ShardCorruptError, match="attach first again"):
        store_adapters(store, read_manifest(store))
    with Store.open(store) as opened, pytest.raises(ShardCorruptError, match="adapters/first"):
        opened.verify()
    file.write_bytes(content[:-1])
    with pytest.raises(ShardCorruptError, match="adapters/first"):
        Store.open(store)


def test_adapters_of_other_checkpoints_and_odd_names_are_refused(store: Path) -> None:
    with pytest.raises(AdapterError, match="is of checkpoint abababababab"):
        attach(store, "first", an_adapter())
    for name in ("none", "../up", ""):
        with pytest.raises(AdapterError, match="names no adapter"):
            attach(store, name, of_store(store))
    assert not read_manifest(store).adapters
