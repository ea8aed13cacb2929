"""Experts that are made smaller: a store of them is made, continued, grown and proven like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_store.errors import ExpertUnavailableError
from expert_store.manifest import read_manifest, write_manifest
from expert_store.rows import span_values
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.source import attach_source
from extractor.encoding.importance import FILE_NAME, PRIOR_PICKS, Importance
from extractor.encoding.names import ENCODINGS, MADE, ExpertsDtype, encoding_of
from extractor.errors import CheckpointError, ExtractError, MismatchError, SelectionError, TargetError
from extractor.planning.selection import SelectionRequest
from extractor.statistics.channels import ChannelSquares
from extractor.writing.inspection import store_summary
from extractor.writing.prepare import prepare
from extractor.writing.shrink import shrink_store
from extractor.writing.verify import verify_against
from tests.extractor.checkpoints import write_tokenizer
from tests.extractor.writing.test_extract import contents, interrupted
from tests.families.checkpoints import random_model

LAYERS, EXPERTS = 2, 6
MOST_ERROR = {"fp8": 0.03, "int8": 0.01, "int4": 0.1, "int4-g64": 0.11, "int4-int8": 0.1, "mxfp4": 0.15, "nvfp4": 0.11}


def make(
    checkpoint: Path,
    store: Path,
    experts_dtype: ExpertsDtype | None,
    importance: Importance | None = None,
    request: SelectionRequest | None = None,
) -> tuple[str, ...]:
    """Extract; returns the notes."""
    work = prepare(Checkpoint.open(checkpoint), store, request or SelectionRequest(), experts_dtype, importance)
    work.run()
    return work.notes


def values_of(store: Path, layer: int, expert: int) -> dict[str, torch.Tensor]:
    with Store.open(store) as opened:
        spec = opened.manifest.layers[layer]
        span = torch.empty(spec.span_bytes, dtype=torch.uint8)
        opened.read_expert(layer, expert, span)
        return span_values(spec, span)


def importance_of(store: Path, seed: int = 0) -> Importance:
    """Weights that one column in eight dominates, for the experts of a store in 16 bits."""
    gate_up, down = read_manifest(store).layers[0].tensors
    channels, rng = ChannelSquares(LAYERS, EXPERTS), np.random.default_rng(seed)
    for layer in range(LAYERS):
        channels.add_input(layer, rng.random(gate_up.shape[1]) + 50.0 * (np.arange(gate_up.shape[1]) % 8 == seed))
        for expert in range(EXPERTS):
            channels.add_inner(layer, expert, rng.random(down.shape[1]) * 1000, 1000)
    return Importance.of(channels)


@pytest.fixture(scope="module")
def plain_store(qwen_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of the checkpoint in 16 bits."""
    store = tmp_path_factory.mktemp("plain") / "store"
    make(qwen_checkpoint, store, None)
    return store


@pytest.mark.parametrize("experts_dtype", MADE)
def test_a_store_is_made_smaller_and_proven(
    experts_dtype: ExpertsDtype, qwen_checkpoint: Path, plain_store: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert make(qwen_checkpoint, store, experts_dtype) == ()
    made, plain = values_of(store, 1, 3), values_of(plain_store, 1, 3)
    for name, value in made.items():
        error = float((value.float() - plain[name].float()).norm() / plain[name].float().norm())
        assert 0 < error < MOST_ERROR[experts_dtype]
    codes = [tensor.encoding.codes for tensor in read_manifest(store).layers[0].tensors if tensor.encoding is not None]
    assert codes == [ENCODINGS[name].codes for name in MADE[experts_dtype]]
    assert store_summary(store)["made"] == {"experts_dtype": experts_dtype, "statistics": None}
    verify_against(store, Checkpoint.open(qwen_checkpoint))


def test_families_whose_matrices_are_transposed_get_rows_of_outputs_and_keep_their_biases(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    random_model("gpt_oss").bfloat16().save_pretrained(checkpoint)
    write_tokenizer(checkpoint, 96)
    make(checkpoint, tmp_path / "plain", None)
    make(checkpoint, tmp_path / "made", "int8")
    made, plain = values_of(tmp_path / "made", 0, 1), values_of(tmp_path / "plain", 0, 1)
    for name, value in plain.items():
        wanted = value if name.endswith("_bias") else value.t()
        assert made[name].shape == wanted.shape
        assert torch.allclose(made[name].float(), wanted.float(), atol=0.02 * float(value.abs().max()))
        assert torch.equal(made[name], wanted) == name.endswith("_bias")


def test_weights_of_errors_are_kept_in_the_store_so_that_it_grows_and_is_proven_without_statistics(
    qwen_checkpoint: Path, plain_store: Path, tmp_path: Path
) -> None:
    importance, whole, grown = importance_of(plain_store), tmp_path / "whole", tmp_path / "grown"
    make(qwen_checkpoint, whole, "int4", importance)
    make(qwen_checkpoint, grown, "int4", importance, SelectionRequest(count=2))
    make(qwen_checkpoint, grown, None)
    assert contents(grown) == contents(whole)
    assert read_manifest(whole).made == read_manifest(grown).made
    verify_against(whole, Checkpoint.open(qwen_checkpoint))
    make(qwen_checkpoint, tmp_path / "alike", "int4")
    plain = values_of(plain_store, 0, 0)["gate_up_proj"].float()

    def error(store: Path) -> float:
        squares = (values_of(store, 0, 0)["gate_up_proj"].float() - plain).square().sum(dim=0).numpy()
        return float((squares * importance.of_matrix(0, 0, "gate_up_proj")).sum())

    assert error(whole) < 0.95 * error(tmp_path / "alike")


def test_a_killed_extraction_continues_only_with_the_same_making(
    qwen_checkpoint: Path, plain_store: Path, tmp_path: Path
) -> None:
    importance, store = importance_of(plain_store), tmp_path / "store"
    interrupted(qwen_checkpoint, store, SelectionRequest(), 3, "int4", importance)
    for other in (("int4", None), ("int4", importance_of(plain_store, 1)), ("int4-g64", importance)):
        with pytest.raises(TargetError, match="half-made extraction"):
            prepare(Checkpoint.open(qwen_checkpoint), store, SelectionRequest(), *other)  # type: ignore[arg-type]
    work = prepare(Checkpoint.open(qwen_checkpoint), store, SelectionRequest(), "int4", importance)
    assert 0 < len(work.done) < len(work.outputs)
    work.run()
    make(qwen_checkpoint, tmp_path / "whole", "int4", importance)
    assert contents(store) == contents(tmp_path / "whole")


def test_experts_that_a_store_lacks_are_made_when_they_are_fetched(
    qwen_checkpoint: Path, plain_store: Path, tmp_path: Path
) -> None:
    importance = importance_of(plain_store)
    make(qwen_checkpoint, tmp_path / "part", "nvfp4", importance, SelectionRequest(count=2))
    make(qwen_checkpoint, tmp_path / "whole", "nvfp4", importance)
    spans = []
    for path in (tmp_path / "part", tmp_path / "whole"):
        with Store.open(path) as store:
            if path.name == "part":
                assert attach_source(store) == ""
            spans.append(torch.empty(store.layer_spec(1).span_bytes, dtype=torch.uint8))
            store.read_expert(1, 5, spans[-1])
    assert torch.equal(*spans)
    for content in (b"no weights", importance_of(plain_store, 1).content):
        (tmp_path / "part" / FILE_NAME).write_bytes(content)
        with pytest.raises(ExtractError, match="has not the weights"):
            make(qwen_checkpoint, tmp_path / "part", None)


def test_shrinking_keeps_the_making(qwen_checkpoint: Path, tmp_path: Path) -> None:
    make(qwen_checkpoint, tmp_path / "store", "int4")
    shrink_store(tmp_path / "store", [5])
    assert read_manifest(tmp_path / "store").made is not None
    make(qwen_checkpoint, tmp_path / "store", None)
    verify_against(tmp_path / "store", Checkpoint.open(qwen_checkpoint))


def test_a_checkpoint_in_few_bits_is_made_again_and_that_is_said(packed_checkpoint: Path, tmp_path: Path) -> None:
    notes = make(packed_checkpoint, tmp_path / "store", "mxfp4")
    assert any("decoded from the encoding that they are shipped in, and made mxfp4" in note for note in notes)
    verify_against(tmp_path / "store", Checkpoint.open(packed_checkpoint))


def test_a_store_has_one_making(qwen_checkpoint: Path, plain_store: Path, tmp_path: Path) -> None:
    make(qwen_checkpoint, tmp_path / "store", "int4")
    for other in ("fp8", "int4-g64", "16bit", "shipped"):
        with pytest.raises(TargetError, match=f"--experts-dtype int4, wanted {other}"):
            make(qwen_checkpoint, tmp_path / "store", other)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="made with other --stats"):
        make(qwen_checkpoint, tmp_path / "store", "int4", importance_of(plain_store))
    with pytest.raises(SelectionError, match="--experts-dtype is shipped: leave it out"):
        make(qwen_checkpoint, tmp_path / "other", None, importance_of(plain_store))
    manifest = read_manifest(tmp_path / "store")
    assert manifest.made is not None
    write_manifest(tmp_path / "store", replace(manifest, made=replace(manifest.made, experts_dtype="int3")))
    with pytest.raises(CheckpointError, match="were made int3, which this program cannot make"):
        make(qwen_checkpoint, tmp_path / "store", None)


def test_another_checkpoint_differs_in_the_bits_that_are_made_of_it(qwen_checkpoint: Path, tmp_path: Path) -> None:
    make(qwen_checkpoint, tmp_path / "store", "fp8")
    other = tmp_path / "other"
    other.mkdir()
    for path in qwen_checkpoint.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    file = other / json.loads((other / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 2}, file)
    with pytest.raises(MismatchError, match="layer 0 expert 2"):
        verify_against(tmp_path / "store", Checkpoint.open(other))
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    with pytest.raises(CheckpointError, match="gate_up_proj of expert 2 of MoE layer 0 cannot be made fp8"):
        make(other, tmp_path / "nan", "fp8")
    with Store.open(tmp_path / "store") as store:
        assert "fingerprint" in attach_source(store, str(other))
        with pytest.raises(ExpertUnavailableError):
            store.read_expert(0, 6, torch.empty(store.layer_spec(0).span_bytes, dtype=torch.uint8))


def test_groups_become_smaller_where_they_do_not_divide_the_columns() -> None:
    assert encoding_of("int4-g64", 2880).group == 64
    assert encoding_of("fp8", 2880).group == 64
    assert encoding_of("int4", 48).group == 16
    with pytest.raises(ExtractError, match="int4 cannot hold rows of 36 columns"):
        encoding_of("int4", 36)


def test_few_picks_tell_channels_less_and_none_weigh_all_alike() -> None:
    channels = ChannelSquares(1, 3)
    with pytest.raises(ExtractError, match="saw no tokens in some layer"):
        Importance.of(channels)
    channels.add_input(0, np.array([1.0, 2.0]))
    channels.add_inner(0, 0, np.array([0.0, 2.0]) * PRIOR_PICKS, PRIOR_PICKS)
    channels.add_inner(0, 1, np.array([0.0, 2.0]) * 1000, 1000)
    importance = Importance.of(channels)
    first, often, unseen = (importance.of_matrix(0, expert, "down_proj") for expert in range(3))
    assert first[1] / first[0] == pytest.approx(3)
    assert often[1] / often[0] > 100
    assert unseen.tolist() == [1.0, 1.0]
    assert importance.of_matrix(0, 2, "gate_up_proj").tolist() == [1.0, 2.0]
