"""The files of a store as functions of the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.checkpoint.tensor_file import CopiedPiece
from extractor.writing.outputs import OutputFile, shard_output, trunk_outputs
from extractor.writing.pipeline import stream
from tests.extractor.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def layout(qwen_checkpoint: Path) -> ExpertsLayout:
    return ExpertsLayout.of(Checkpoint.open(qwen_checkpoint))


def written(outputs: list[OutputFile], target: Path) -> Path:
    for folder in ("trunk", "experts"):
        (target / folder).mkdir(parents=True)
    list(stream(outputs, target))
    return target


def test_sizes_are_what_the_pieces_come_to(layout: ExpertsLayout) -> None:
    for output in [*trunk_outputs(layout.checkpoint, layout.trunk), shard_output(layout, 0, (3, 1))]:
        pieces = list(output.pieces())
        assert len(output.head) + sum(piece.num_bytes for piece in pieces) == output.file_bytes


def test_an_expert_of_separate_tensors_is_copied_not_converted(layout: ExpertsLayout) -> None:
    pieces = list(layout.span(1, 4))
    assert all(isinstance(piece, CopiedPiece) for piece in pieces)
    names = [piece.source.name.split(".experts.")[1] for piece in pieces if isinstance(piece, CopiedPiece)]
    assert names == ["4.gate_proj.weight", "4.up_proj.weight", "4.down_proj.weight"]


def test_a_large_trunk_is_cut_into_files_with_an_index(layout: ExpertsLayout, tmp_path: Path) -> None:
    outputs = trunk_outputs(layout.checkpoint, layout.trunk, max_file_bytes=5000)
    written(outputs, tmp_path)
    trunk = Checkpoint.open(tmp_path / "trunk")
    assert len(trunk.files) > 2
    assert set(trunk.tensors) == {tensor.name for tensor in layout.trunk}
    largest = max(tensor.bytes for tensor in layout.trunk)
    assert all(sum(tensor.bytes for tensor in file.tensors) <= max(5000, largest) for file in trunk.files)


def test_every_tensor_of_the_trunk_is_aligned_to_its_dtype(layout: ExpertsLayout, tmp_path: Path) -> None:
    trunk = Checkpoint.open(written(trunk_outputs(layout.checkpoint, layout.trunk), tmp_path) / "trunk")
    assert all(tensor.offset % 2 == 0 for tensor in trunk.tensors.values())
    assert trunk.files[0].tensors[0].offset % 4096 == 0


def test_how_the_checkpoint_is_cut_does_not_matter(tmp_path: Path) -> None:
    found = []
    for shards in (False, True):
        directory = save_checkpoint(tmp_path / str(shards), "olmoe", shards=shards)
        layout = ExpertsLayout.of(Checkpoint.open(directory))
        outputs = [*trunk_outputs(layout.checkpoint, layout.trunk), shard_output(layout, 0, (3, 1, 5))]
        found.append(sorted((digest.name, digest.sha256) for digest in stream(outputs, None)))
    assert found[0] == found[1]


def test_references_to_code_are_dropped(qwen_checkpoint: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(qwen_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config"}
    config["nested"] = {"auto_map": 1, "kept": "é"}
    (directory / "config.json").write_text(json.dumps(config))
    layout = ExpertsLayout.of(Checkpoint.open(directory))
    trunk = written(trunk_outputs(layout.checkpoint, layout.trunk), tmp_path / "store") / "trunk"
    found = json.loads((trunk / "config.json").read_text())
    del config["auto_map"], config["nested"]["auto_map"]
    assert found == config
    assert AutoConfig.from_pretrained(trunk).model_type == "qwen3_moe"


def test_other_side_files_are_verbatim(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    trunk = written(trunk_outputs(checkpoint, ()), tmp_path) / "trunk"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (trunk / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
