"""Verification: what is intact and equal passes, every difference is named."""

from pathlib import Path

import pytest

from expert_store.errors import ShardCorruptError
from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import MismatchError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from extractor.writing.verify import compared_bytes, verify_against, verify_store
from tests.extractor.checkpoints import save_checkpoint


@pytest.fixture
def store(qwen_checkpoint: Path, tmp_path: Path) -> Path:
    prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest(experts="1,4")).run()
    return tmp_path / "store"


def test_a_store_equals_its_checkpoint(store: Path, qwen_checkpoint: Path) -> None:
    counted: list[int] = []
    total = verify_store(store)
    assert verify_against(store, Checkpoint.open(qwen_checkpoint), counted.append) == total == sum(counted)
    assert compared_bytes(read_manifest(store)) == total


def test_a_checkpoint_cut_differently_is_the_same(store: Path, tmp_path: Path) -> None:
    one_file = save_checkpoint(tmp_path / "one", "qwen3_moe")
    verify_against(store, Checkpoint.open(one_file))


def test_one_changed_weight_is_found_and_named(store: Path, tmp_path: Path) -> None:
    changed = save_checkpoint(tmp_path / "changed", "qwen3_moe")
    entry = Checkpoint.open(changed).tensors["model.layers.2.mlp.experts.4.up_proj.weight"]
    content = bytearray(entry.path.read_bytes())
    content[entry.offset + 7] ^= 1
    entry.path.write_bytes(content)
    with pytest.raises(MismatchError, match=r"deep-00001.safetensors: the layers 1 differ \(layer 1 expert 4\)"):
        verify_against(store, Checkpoint.open(changed))


def test_a_changed_trunk_is_found_and_named(store: Path, tmp_path: Path) -> None:
    changed = save_checkpoint(tmp_path / "changed", "qwen3_moe")
    (changed / "added.jinja").write_text("new")
    config = changed / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(MismatchError, match=r"(?s)trunk/added.jinja is not in the store.*trunk/config.json differs"):
        verify_against(store, Checkpoint.open(changed))


def test_another_model_is_told_at_once(store: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "olmoe")
    with pytest.raises(
        MismatchError, match=r"different models: family is qwen3_moe in the store and olmoe there, arch"
    ):
        verify_against(store, Checkpoint.open(other))


def test_a_damaged_store_is_told(store: Path) -> None:
    path = store / "experts/deep-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardCorruptError, match="deep-00000"):
        verify_store(store)
