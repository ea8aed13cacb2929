"""Opening a checkpoint: what is taken, what is refused, and what tells two of them apart."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from extractor.checkpoint.checkpoint import INDEX_NAME, Checkpoint, resolve_checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.checkpoint.quantised import read_part
from extractor.errors import CheckpointError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from tests.extractor.checkpoints import save_checkpoint


@pytest.fixture
def checkpoint(qwen_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy in several files that a test may spoil."""
    return Path(shutil.copytree(qwen_checkpoint, tmp_path / "checkpoint"))


def edit_index(checkpoint: Path, tensor: str, file: str) -> None:
    index = json.loads((checkpoint / INDEX_NAME).read_text())
    index["weight_map"][tensor] = file
    (checkpoint / INDEX_NAME).write_text(json.dumps(index))


def test_one_file_and_many_hold_the_same_tensors(tmp_path: Path) -> None:
    one = Checkpoint.open(save_checkpoint(tmp_path / "one", "olmoe"))
    many = Checkpoint.open(save_checkpoint(tmp_path / "many", "olmoe", shards=True))
    assert len(one.files) == 1
    assert len(many.files) > 2
    assert {name: tensor.shape for name, tensor in one.tensors.items()} == {
        name: tensor.shape for name, tensor in many.tensors.items()
    }


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "x.bin"])
def test_an_index_that_names_a_file_elsewhere_is_refused(checkpoint: Path, name: str) -> None:
    edit_index(checkpoint, "model.norm.weight", name)
    with pytest.raises(CheckpointError, match="wanted the plain name"):
        Checkpoint.open(checkpoint)


def test_a_link_out_of_the_directory_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    shutil.move(file, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Checkpoint.open(checkpoint)


def test_the_links_of_the_hub_cache_are_followed(qwen_checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(qwen_checkpoint.iterdir())):
        shutil.copy(path, model / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint.open(snapshot).fingerprint == Checkpoint.open(qwen_checkpoint).fingerprint


def _transformers_reads(checkpoint: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return dict(model.named_parameters())[name].detach()


def test_an_index_may_promise_what_no_file_has(checkpoint: Path) -> None:
    edit_index(checkpoint, "model.phantom.weight", sorted(checkpoint.glob("*.safetensors"))[0].name)
    assert "model.phantom.weight" not in Checkpoint.open(checkpoint).tensors


def test_of_a_tensor_in_two_files_the_last_is_read_as_by_transformers(checkpoint: Path) -> None:
    name, changed = "model.norm.weight", torch.full((32,), 3.0, dtype=torch.bfloat16)
    save_file({name: changed}, checkpoint / "zzz.safetensors")
    edit_index(checkpoint, "anything", "zzz.safetensors")
    opened = Checkpoint.open(checkpoint)
    assert torch.equal(read_part(opened.tensors[name]), changed)
    assert torch.equal(_transformers_reads(checkpoint, name), changed)
    assert len(opened.ignored) == 1
    assert re.fullmatch(f"{name} of model-.*: transformers reads those of zzz.safetensors.*", opened.ignored[0])


def test_a_single_file_is_read_and_an_index_beside_it_is_not_as_by_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    name, single = "model.norm.weight", save_checkpoint(tmp_path / "single", "qwen3_moe", seed=1)
    tensors = load_file(single / "model.safetensors") | {name: torch.full((32,), 3.0, dtype=torch.bfloat16)}
    save_file(tensors, checkpoint / "model.safetensors")
    edit_index(checkpoint, "model.gone.weight", "gone.safetensors")
    opened = Checkpoint.open(checkpoint)
    assert torch.equal(read_part(opened.tensors[name]), tensors[name])
    assert torch.equal(_transformers_reads(checkpoint, name), tensors[name])
    assert [file.path.name for file in opened.files] == ["model.safetensors"]
    assert opened.ignored[0].startswith(f"{INDEX_NAME}, model-00001-of-")
    assert opened.ignored[0].endswith(
        "more beside model.safetensors: transformers reads model.safetensors and not those"
    )
    shutil.copy(single / "config.json", checkpoint)
    assert ExpertsLayout.of(Checkpoint.open(checkpoint)).model.num_layers == 2


def test_the_weights_that_the_config_names_are_read_as_by_transformers(tmp_path: Path) -> None:
    name, directory = "model.norm.weight", save_checkpoint(tmp_path / "named", "qwen3_moe")
    tensors = load_file(directory / "model.safetensors") | {name: torch.full((32,), 3.0, dtype=torch.bfloat16)}
    save_file(tensors, directory / "other.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    opened = Checkpoint.open(directory)
    assert torch.equal(read_part(opened.tensors[name]), tensors[name])
    assert torch.equal(_transformers_reads(directory, name), tensors[name])
    prepare(opened, tmp_path / "store", SelectionRequest(count=1)).run()
    assert "transformers_weights" not in (tmp_path / "store/trunk/config.json").read_text()
    for wrong in ("../other.safetensors", "absent.safetensors", 3):
        (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": wrong}))
        with pytest.raises(CheckpointError, match=r"config\.json names the weights .*remove the key"):
            Checkpoint.open(directory)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_config_that_is_no_json_object_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json is n"):
        Checkpoint.open(checkpoint)


def test_a_directory_without_weights_says_what_it_has(checkpoint: Path) -> None:
    for path in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX_NAME]:
        path.unlink()
    with pytest.raises(CheckpointError, match="found no weights"):
        Checkpoint.open(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin.*only safetensors"):
        Checkpoint.open(checkpoint)


def test_only_small_files_that_transformers_reads_are_taken(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    for name in ("modeling_x.py", "weights.bin", "adapter_config.json", ".hidden.json", "README.md"):
        (checkpoint / name).write_text("{}")
    for name in ("vocab.txt", "chat_template.jinja", "tokenizer.model"):
        (checkpoint / name).write_text("x")
    taken = [path.name for path in Checkpoint.open(checkpoint).sidecars]
    assert taken == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_the_fingerprint_is_of_the_content(checkpoint: Path, qwen_checkpoint: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(qwen_checkpoint).fingerprint
    assert Checkpoint.open(checkpoint).fingerprint == first
    other_weights = save_checkpoint(tmp_path / "other", "qwen3_moe", seed=1, shards=True)
    assert Checkpoint.open(other_weights).fingerprint != first
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert Checkpoint.open(checkpoint).fingerprint != first


def test_a_local_directory_is_opened_and_named_after_itself(qwen_checkpoint: Path) -> None:
    found = resolve_checkpoint(str(qwen_checkpoint))
    assert (found.name, found.location) == ("checkpoint", str(qwen_checkpoint))


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent", "a/b/c"])
def test_a_path_that_does_not_exist_is_told(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist; name a directory"):
        resolve_checkpoint(name)


def test_a_file_is_no_checkpoint(qwen_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; name the directory"):
        resolve_checkpoint(str(qwen_checkpoint / "config.json"))


def test_a_hub_name_is_downloaded_without_code_or_pickles(
    qwen_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str], list[str]]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        return str(qwen_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve_checkpoint("owner/name")
    assert found.name == "owner/name"
    assert found.location == "owner/name@checkpoint"
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    assert asked == [("owner/name", wanted, ["*/*", "consolidated*"])]


def test_a_hub_name_without_a_network_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"could not be downloaded from the hub \(offline\)"):
        resolve_checkpoint("owner/name")
