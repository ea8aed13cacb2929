"""Extraction: the store equals the checkpoint, and nothing that happens on the way changes that."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_store.errors import ManifestError
from expert_store.manifest import read_manifest
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import CheckpointError, DiskFullError, SelectionError, TargetError, UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing import disk, pipeline
from extractor.writing.journal import JOURNAL_NAME
from extractor.writing.prepare import prepare
from tests.extractor.checkpoints import NUM_EXPERTS, TOP_K, save_checkpoint

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def extract(checkpoint: Path, store: Path, request: SelectionRequest | None = None) -> bool:
    """Extract; returns whether there was something to do."""
    work = prepare(Checkpoint.open(checkpoint), store, request or SelectionRequest())
    finished = work.is_finished
    work.run()
    return not finished


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_store_equals_what_transformers_loads(family_checkpoint: Path, tmp_path: Path) -> None:
    extract(family_checkpoint, tmp_path / "store")
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype="auto")
    with Store.open(tmp_path / "store") as store:
        model_spec = store.manifest.model
        assert (model_spec.num_experts, model_spec.top_k) == (NUM_EXPERTS, TOP_K)
        assert model_spec.architecture == type(model).__name__
        assert store.available.all()
        store.verify()
        for layer in range(model_spec.num_layers):
            spec = store.layer_spec(layer)
            module = model.get_submodule(spec.module)
            assert f".{spec.model_layer}." in spec.module
            assert [tensor.name for tensor in spec.tensors] == [name for name, _ in module.named_parameters()]
            for expert in range(model_spec.num_experts):
                span = torch.empty(spec.span_bytes, dtype=torch.uint8)
                store.read_expert(layer, expert, span)
                for tensor in spec.tensors:
                    found = span[tensor.offset : tensor.offset + tensor.bytes].view(DTYPES[tensor.dtype])
                    wanted = module.get_parameter(tensor.name)[expert]
                    assert tuple(wanted.shape) == tensor.shape
                    assert torch.equal(found.view(tensor.shape), wanted)


def test_trunk_holds_every_other_tensor_verbatim(family_checkpoint: Path, tmp_path: Path) -> None:
    extract(family_checkpoint, tmp_path / "store")
    whole = Checkpoint.open(family_checkpoint)
    trunk = Checkpoint.open(tmp_path / "store/trunk")
    routed = {name for name in whole.tensors if ".experts." in name}
    assert set(trunk.tensors) == set(whole.tensors) - routed
    for name, entry in trunk.tensors.items():
        source = whole.tensors[name]
        assert (entry.dtype, entry.shape) == (source.dtype, source.shape)
        for tensor in (entry, source):
            assert tensor.path.is_file()
        found = entry.path.read_bytes()[entry.offset : entry.offset + entry.bytes]
        assert found == source.path.read_bytes()[source.offset : source.offset + source.bytes]


def test_dense_layers_are_not_moe_layers(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store")
    layers = read_manifest(tmp_path / "store").layers
    assert [(spec.layer, spec.model_layer) for spec in layers] == [(0, 0), (1, 2)]


def test_bundled_checkpoint_extracts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    extract(tiny_checkpoint, tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        assert store.available.shape == (8, 64)
        assert store.available.all()


def test_a_part_holds_that_part(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(experts="1,4-5"))
    with Store.open(tmp_path / "store") as store:
        assert store.available.tolist() == [[False, True, False, False, True, True]] * 2
        assert store.manifest.alignment.kind == "index"


def test_the_same_command_has_nothing_to_do(qwen_checkpoint: Path, tmp_path: Path) -> None:
    assert extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=3))
    before = contents(tmp_path / "store")
    assert not extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=3))
    assert contents(tmp_path / "store") == before


def test_a_smaller_selection_has_nothing_to_do(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=3))
    assert not extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=2))


def test_a_larger_selection_grows_the_store_under_an_open_reader(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(experts="2-3"))
    before = contents(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        extract(qwen_checkpoint, tmp_path / "store")
        after = contents(tmp_path / "store")
        assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
        assert store.reload()
        assert store.available.all()
        store.verify()
    experts = [deep.experts[0] for deep in read_manifest(tmp_path / "store").deep_experts]
    assert experts == [2, 3, 0, 1, 4, 5]


def test_a_store_never_shrinks_or_changes(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(experts="2-3"))
    with pytest.raises(TargetError, match="a store only grows"):
        extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(experts="0-2"))


def test_a_grown_store_keeps_its_source(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=1))
    source = read_manifest(tmp_path / "store").source
    moved = tmp_path / "moved"
    qwen_checkpoint.joinpath("config.json").stat()
    moved.symlink_to(qwen_checkpoint, target_is_directory=True)
    extract(moved, tmp_path / "store", SelectionRequest(count=2))
    assert read_manifest(tmp_path / "store").source == source


def test_a_lost_file_is_written_again(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store")
    before = contents(tmp_path / "store")
    (tmp_path / "store/experts/deep-00002.safetensors").unlink()
    (tmp_path / "store/trunk/config.json").write_text("")
    assert extract(qwen_checkpoint, tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_a_store_of_another_checkpoint_is_left_alone(qwen_checkpoint: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "qwen3_moe", seed=1, shards=True)
    extract(other, tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(TargetError, match="store of another checkpoint"):
        extract(qwen_checkpoint, tmp_path / "store")
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("name", ["store", "deeper/store", "link/store"])
def test_nothing_is_written_into_the_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=1)
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(checkpoint)
    target = tmp_path / name if name.startswith("link") else checkpoint / name
    with pytest.raises(TargetError, match=r"lies in the checkpoint .* name a directory outside it"):
        extract(checkpoint, target)
    assert contents(checkpoint) == before
    assert not target.exists()


def test_a_directory_with_other_things_in_it_is_left_alone(qwen_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/thesis.tex").write_text("x")
    with pytest.raises(TargetError, match=r"neither a store nor empty \(it holds thesis.tex\)"):
        extract(qwen_checkpoint, tmp_path / "store")
    with pytest.raises(TargetError, match="is not a directory"):
        extract(qwen_checkpoint, tmp_path / "store/thesis.tex")


def test_a_store_of_a_newer_version_is_left_alone(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=1))
    path = tmp_path / "store/manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ManifestError, match="version is 9"):
        extract(qwen_checkpoint, tmp_path / "store")


def test_errors_in_the_input_write_nothing(qwen_checkpoint: Path, tmp_path: Path) -> None:
    config = (qwen_checkpoint / "config.json").read_text()
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in qwen_checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = sorted(broken.glob("*.safetensors"))[1]

    def refused(error: type[Exception], match: str, request: SelectionRequest | None = None) -> None:
        with pytest.raises(error, match=match):
            extract(broken, tmp_path / "store", request)
        assert not (tmp_path / "store").exists()

    refused(SelectionError, "expert 6 does not exist", SelectionRequest(experts="0-6"))
    (broken / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    refused(UnsupportedFamilyError, "dense model")
    (broken / "config.json").write_text(config.replace('"moe_intermediate_size": 24', '"moe_intermediate_size": 16'))
    refused(CheckpointError, "config.json and weights are of different models")
    (broken / "config.json").write_text(config.replace('experts": 6', 'experts": 7'))
    refused(CheckpointError, r"mlp.gate.weight is \[6, 32\] and config.json wants \[7, 32\]")
    (broken / "config.json").write_text(config)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(CheckpointError, f"{shard.name} is truncated")
    shard.unlink()
    refused(CheckpointError, f"{shard.name} is missing")


def interrupted(checkpoint: Path, store: Path, request: SelectionRequest, after: int, *making: Any) -> None:
    """Begin an extraction and stop it as a signal would, when `after` files are journaled."""
    work = prepare(Checkpoint.open(checkpoint), store, request, *making)

    class Interrupted(BaseException):
        pass

    seen = 0
    add = pipeline.FileDigest

    def count(*args: object) -> object:
        nonlocal seen
        seen += 1
        if seen > after:
            raise Interrupted
        return add(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "FileDigest", count)
        with pytest.raises(Interrupted):
            work.run()


def test_a_half_made_store_is_continued_to_the_same_bytes(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "whole")
    interrupted(qwen_checkpoint, tmp_path / "store", SelectionRequest(), after=4)
    with pytest.raises(ManifestError, match="has not finished"):
        Store.open(tmp_path / "store")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    work = prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest())
    assert len(work.done) == 4
    work.run()
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name in work.done)


def test_a_half_made_store_is_for_one_selection_and_checkpoint(qwen_checkpoint: Path, tmp_path: Path) -> None:
    interrupted(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=4), after=3)
    before = contents(tmp_path / "store")
    with pytest.raises(TargetError, match="half-made extraction of another checkpoint, selection or enc"):
        extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=5))
    other = save_checkpoint(tmp_path / "other", "qwen3_moe", seed=1, shards=True)
    with pytest.raises(TargetError, match="half-made"):
        extract(other, tmp_path / "store", SelectionRequest(count=4))
    assert contents(tmp_path / "store") == before


def test_growth_that_was_interrupted_leaves_the_old_store_readable(qwen_checkpoint: Path, tmp_path: Path) -> None:
    extract(qwen_checkpoint, tmp_path / "store", SelectionRequest(count=2))
    interrupted(qwen_checkpoint, tmp_path / "store", SelectionRequest(), after=2)
    with Store.open(tmp_path / "store") as store:
        assert store.available.sum() == 4
        store.verify()
        extract(qwen_checkpoint, tmp_path / "store")
        store.reload()
        assert store.available.all()
        store.verify()


def test_a_journal_left_by_a_finished_run_is_no_obstacle(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extractor.writing.journal.Journal.remove", lambda journal: None)
        extract(qwen_checkpoint, store, SelectionRequest(count=2))
    left = (store / JOURNAL_NAME).read_bytes()
    assert not extract(qwen_checkpoint, store, SelectionRequest(count=2))
    assert not (store / JOURNAL_NAME).exists()
    (store / JOURNAL_NAME).write_bytes(left)
    assert extract(qwen_checkpoint, store, SelectionRequest(count=3))
    assert not (store / JOURNAL_NAME).exists()
    Store.open(store).close()


def test_two_extractions_at_once_are_refused(qwen_checkpoint: Path, tmp_path: Path) -> None:
    work = prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest())
    errors = []

    def again(_: int) -> None:
        if not errors:
            try:
                prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest()).run()
            except TargetError as error:
                errors.append(str(error))

    work.run(again)
    assert "another extraction is writing" in errors[0]
    Store.open(tmp_path / "store").close()


def test_too_small_a_disk_is_told_before_anything_is_written(
    qwen_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest())
    shard = work.outputs[-1].file_bytes
    free = disk.DISK_MARGIN_BYTES + work.trunk_bytes + 3 * shard
    monkeypatch.setattr("extractor.writing.extract.free_bytes", lambda path: free)
    with pytest.raises(DiskFullError, match=r"are still needed, .* are free; .*--keep 50%, which fits"):
        work.run()
    assert not (tmp_path / "store").exists()
    prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest(keep=0.5)).run()


def test_a_disk_that_fills_up_is_told_and_the_next_run_continues(
    qwen_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(qwen_checkpoint, tmp_path / "whole")
    room = 20_000

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(data)
        return real(descriptor, data)

    real = os.write
    monkeypatch.setattr(pipeline.os, "write", write)
    monkeypatch.setattr("extractor.writing.extract.free_bytes", lambda path: 2**30)
    with pytest.raises(DiskFullError, match="run the same command again to continue"):
        extract(qwen_checkpoint, tmp_path / "store")
    assert not list((tmp_path / "store").rglob("*.partial"))
    with pytest.raises(ManifestError):
        Store.open(tmp_path / "store")
    room = 10**9
    extract(qwen_checkpoint, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_place_that_cannot_be_written_is_one_error(qwen_checkpoint: Path, tmp_path: Path) -> None:
    work = prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest())
    (tmp_path / "store").mkdir()
    (tmp_path / "store/trunk").write_text("a file where a folder should be")
    with pytest.raises(TargetError, match="cannot be written"):
        work.run()


def test_a_checkpoint_that_shrinks_while_it_is_read_is_one_error(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "qwen3_moe")
    work = prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest())
    os.truncate(checkpoint / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="became shorter"):
        work.run()
    with pytest.raises(ManifestError):
        Store.open(tmp_path / "store")
