"""Experts as shipped: a store of encoded rows is extracted, continued, grown and proven like any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expert_store.encoding import RowEncoding
from expert_store.errors import ExpertUnavailableError
from expert_store.manifest import expert_bits, expert_encodings, read_manifest
from expert_store.rows import span_values
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.quantised import read_part
from extractor.checkpoint.source import attach_source
from extractor.encoding.names import ExpertsDtype
from extractor.errors import MismatchError, TargetError
from extractor.planning.selection import SelectionRequest
from extractor.writing.inspection import print_summary, store_summary
from extractor.writing.prepare import prepare
from extractor.writing.shrink import shrink_store
from extractor.writing.verify import verify_against, verify_store
from tests.extractor.packed import PACKINGS, fp8_blocks, save_packed_checkpoint, write_checkpoint
from tests.extractor.writing.test_extract import contents, extract, interrupted

EXPERTS = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
INT4 = RowEncoding("int4", 32, "BF16", "U8")


def shipped(checkpoint: Path, store: Path, experts_dtype: ExpertsDtype | None = None) -> tuple[str, ...]:
    """Extract everything; the notes of what was dequantised."""
    work = prepare(Checkpoint.open(checkpoint), store, SelectionRequest(), experts_dtype)
    work.run()
    return work.notes


def read_values(store: Store, layer: int, expert: int) -> dict[str, Tensor]:
    """An expert's values, rounded to the dtype of the scales where these are in half precision, as libraries do."""
    spec = store.manifest.layers[layer]
    span = torch.empty(spec.span_bytes, dtype=torch.uint8)
    store.read_expert(layer, expert, span)
    halves = {tensor.name for tensor in spec.tensors if tensor.encoding is not None and tensor.encoding.scales == "F16"}
    return {name: values.half() if name in halves else values for name, values in span_values(spec, span).items()}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_store_has_the_checkpoints_values_in_the_checkpoints_bits(packing: str, tmp_path: Path) -> None:
    checkpoint = save_packed_checkpoint(tmp_path / "checkpoint", packing)
    notes = shipped(checkpoint, tmp_path / "store")
    plain = Checkpoint.open(checkpoint).tensors
    with Store.open(tmp_path / "store") as store:
        gate_up, down = store.manifest.layers[0].tensors
        assert (gate_up.shape, down.shape) == ((64, 64), (64, 32))
        assert (gate_up.encoding is None) == (PACKINGS[packing].rows is None) == bool(notes)
        assert down.encoding is not None
        assert expert_bits(store.manifest.layers) < 16
        for layer, model_layer in enumerate((0, 2)):
            values = read_values(store, layer, 3)
            gate, up, wanted = (
                read_part(plain[EXPERTS.format(model_layer, 3, name)]) for name in ("gate", "up", "down")
            )
            assert torch.equal(values["gate_up_proj"].to(torch.bfloat16), torch.cat([gate, up]))
            assert torch.equal(values["down_proj"].to(torch.bfloat16), wanted)
    assert verify_against(tmp_path / "store", Checkpoint.open(checkpoint)) == verify_store(tmp_path / "store")


def test_the_manifest_and_the_summary_tell_encoding_and_bits(
    packed_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipped(packed_checkpoint, tmp_path / "store") == ()
    manifest = read_manifest(tmp_path / "store")
    assert [tensor.encoding for tensor in manifest.layers[1].tensors] == [INT4, INT4]
    assert manifest.model.dtype == "BF16"
    summary = store_summary(tmp_path / "store")
    assert summary["encodings"] == dict.fromkeys(("gate_up_proj", "down_proj"), "int4 in groups of 32 with zero points")
    assert [(item["encoding"]["codes"], item["bits"]) for item in summary["tensors"]] == [("int4", 6.0), ("int4", 8.0)]
    print_summary(summary)
    text = capsys.readouterr().out
    assert "down_proj [64, 32] int4 in groups of 32 with zero points" in text
    assert "6.667 of the experts, 16 of the trunk" in text


def test_with_16bit_experts_are_dequantised(packed_checkpoint: Path, tmp_path: Path) -> None:
    shipped(packed_checkpoint, tmp_path / "packed")
    shipped(packed_checkpoint, tmp_path / "plain", "16bit")
    assert '"version": 1' in (tmp_path / "plain/manifest.json").read_text()
    with Store.open(tmp_path / "plain") as plain, Store.open(tmp_path / "packed") as packed:
        assert expert_encodings(plain.manifest.layers) == {}
        for name, values in read_values(packed, 0, 5).items():
            assert torch.equal(values.to(torch.bfloat16), read_values(plain, 0, 5)[name])
    assert verify_against(tmp_path / "plain", Checkpoint.open(packed_checkpoint)) > 0


def test_a_plain_checkpoint_gives_the_same_store_either_way(qwen_checkpoint: Path, tmp_path: Path) -> None:
    shipped(qwen_checkpoint, tmp_path / "store", "shipped")
    shipped(qwen_checkpoint, tmp_path / "16bit", "16bit")
    assert contents(tmp_path / "store") == contents(tmp_path / "16bit")
    shipped(qwen_checkpoint, tmp_path / "store", "16bit")


@pytest.mark.parametrize(("first", "second"), [("shipped", "16bit"), ("16bit", "shipped")])
def test_a_store_keeps_its_encoding(
    first: ExpertsDtype, second: ExpertsDtype, packed_checkpoint: Path, tmp_path: Path
) -> None:
    prepare(Checkpoint.open(packed_checkpoint), tmp_path / "store", SelectionRequest(count=2), first).run()
    before = read_manifest(tmp_path / "store")
    with pytest.raises(TargetError, match=f"holds experts with --experts-dtype {first}, wanted {second}"):
        shipped(packed_checkpoint, tmp_path / "store", second)
    shipped(packed_checkpoint, tmp_path / "store")
    grown = read_manifest(tmp_path / "store")
    assert grown.layers == before.layers
    assert grown.deep_experts[:2] == before.deep_experts
    assert len(grown.deep_experts) == 6


def test_a_half_made_store_is_continued_in_its_encoding_alone(packed_checkpoint: Path, tmp_path: Path) -> None:
    shipped(packed_checkpoint, tmp_path / "whole")
    interrupted(packed_checkpoint, tmp_path / "store", SelectionRequest(), after=4)
    with pytest.raises(TargetError, match="half-made extraction of another checkpoint, selection or encoding"):
        prepare(Checkpoint.open(packed_checkpoint), tmp_path / "store", SelectionRequest(), "16bit")
    work = prepare(Checkpoint.open(packed_checkpoint), tmp_path / "store", SelectionRequest())
    assert len(work.done) == 4
    work.run()
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_growing_and_shrinking_keep_the_bytes(packed_checkpoint: Path, tmp_path: Path) -> None:
    shipped(packed_checkpoint, tmp_path / "whole")
    extract(packed_checkpoint, tmp_path / "store", SelectionRequest(experts="1,4"))
    extract(packed_checkpoint, tmp_path / "store")
    shrink_store(tmp_path / "store", [0])
    with Store.open(tmp_path / "store") as store, Store.open(tmp_path / "whole") as whole:
        store.verify()
        assert store.available.sum() == 10
        for expert in (0, 2, 3, 4, 5):
            for name, values in read_values(store, 1, expert).items():
                assert torch.equal(values, read_values(whole, 1, expert)[name])


@pytest.mark.parametrize("experts_dtype", ["shipped", "16bit"])
def test_an_expert_read_from_the_source_has_the_stores_bytes(
    experts_dtype: ExpertsDtype, packed_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(packed_checkpoint)
    prepare(checkpoint, tmp_path / "whole", SelectionRequest(), experts_dtype).run()
    prepare(checkpoint, tmp_path / "part", SelectionRequest(count=1), experts_dtype).run()
    with Store.open(tmp_path / "part") as part, Store.open(tmp_path / "whole") as whole:
        with pytest.raises(ExpertUnavailableError):
            read_values(part, 0, 4)
        assert attach_source(part) == ""
        for name, values in read_values(part, 0, 4).items():
            assert torch.equal(values, read_values(whole, 0, 4)[name])


def test_a_changed_scale_is_found(packed_checkpoint: Path, tmp_path: Path) -> None:
    shipped(packed_checkpoint, tmp_path / "store")
    tensors = load_file(packed_checkpoint / "model.safetensors")
    name = "model.layers.2.mlp.experts.4.up_proj.weight_scale"
    tensors[name][1, 0] *= 2
    changed = write_checkpoint(packed_checkpoint, tmp_path / "changed", tensors, {"quant_method": "compressed-tensors"})
    with pytest.raises(MismatchError, match=r"the layers 1 differ \(layer 1 expert 4\)"):
        verify_against(tmp_path / "store", Checkpoint.open(changed))


def another_encoding(tensors: dict[str, Tensor], stem: str) -> None:
    tensors.update({f"{stem}.{role}": value for role, value in PACKINGS["int8 g32"].pack(torch.randn(32, 64)).items()})
    del tensors[f"{stem}.weight_zero_point"]


def in_16_bits(tensors: dict[str, Tensor], stem: str) -> None:
    for role in ("packed", "scale", "shape", "zero_point"):
        del tensors[f"{stem}.weight_{role}"]
    tensors[f"{stem}.weight"] = torch.randn(32, 64).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            another_encoding,
            "its tensors have several encodings: int4 in groups of 32 with zero points (model.layers.2.mlp.experts.5."
            "up_proj.weight), int8 in groups of 32 (model.layers.2.mlp.experts.4.gate_proj.weight)",
        ),
        (in_16_bits, "1 of its 24 tensors are plain (model.layers.2.mlp.experts.4.gate_proj.weight)"),
    ],
)
def test_a_parameter_without_one_encoding_is_dequantised_and_told(
    change: Callable[[dict[str, Tensor], str], None], reason: str, packed_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(packed_checkpoint / "model.safetensors")
    change(tensors, "model.layers.2.mlp.experts.4.gate_proj")
    mixed = write_checkpoint(packed_checkpoint, tmp_path / "mixed", tensors, {"quant_method": "compressed-tensors"})
    assert shipped(mixed, tmp_path / "store") == (f"gate_up_proj of the experts is dequantised to BF16: {reason}",)
    with Store.open(tmp_path / "store") as store:
        assert set(expert_encodings(store.manifest.layers)) == {"down_proj"}
        plain = Checkpoint.open(mixed).tensors
        gate = read_part(plain["model.layers.2.mlp.experts.4.gate_proj.weight"])
        assert torch.equal(read_values(store, 1, 4)["gate_up_proj"][:32], gate)


def test_quantised_tensors_outside_the_experts_are_dequantised_and_told_if_they_are_not_fp8(tmp_path: Path) -> None:
    checkpoint = save_packed_checkpoint(tmp_path / "int4", "int4 channel", among="_proj.weight")
    (note,) = shipped(checkpoint, tmp_path / "store")
    assert note.startswith("15 tensors outside the experts, such as model.layers.0.self_attn.")
    assert note.endswith("are dequantised to BF16: only linear layers in FP8 are taken as they are there")
    checkpoint = save_packed_checkpoint(tmp_path / "fp8", "fp8 channel", among="_proj.weight")
    assert shipped(checkpoint, tmp_path / "fp8-store") == ()
    assert read_manifest(tmp_path / "fp8-store").trunk_dtype == "shipped"


@pytest.mark.parametrize("block", [16, 64])
def test_experts_of_a_layer_in_one_tensor_keep_their_bits(block: int, tmp_path: Path) -> None:
    """As transformers saves FP8 experts: [E, O, N] with scales [E, …] of blocks, here of 16 and of a whole matrix."""
    checkpoint = save_packed_checkpoint(tmp_path / "apart", "fp8 channel")
    tensors = {
        name: value
        for name, value in load_file(tmp_path / "apart-plain" / "model.safetensors").items()
        if ".experts." not in name
    }
    wanted = {}
    for layer in (0, 2):
        for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
            experts = [fp8_blocks(torch.randn(rows, columns), block) for _ in range(6)]
            at = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[at] = torch.stack([one["weight"] for one in experts])
            tensors[f"{at}_scale_inv"] = torch.stack([one["weight_scale_inv"] for one in experts])
            scales = experts[4]["weight_scale_inv"].repeat_interleave(block, 0).repeat_interleave(block, 1)
            wanted[layer, name] = experts[4]["weight"].float() * scales[:rows, :columns]
    fused = write_checkpoint(
        checkpoint,
        tmp_path / "fused",
        tensors,
        {"quant_method": "fp8", "weight_block_size": [block, block]},
    )
    assert shipped(fused, tmp_path / "store") == ()
    with Store.open(tmp_path / "store") as store:
        gate_up, down = store.manifest.layers[0].tensors
        assert gate_up.encoding == RowEncoding("fp8", block, "F32")
        assert down.encoding == RowEncoding("fp8", min(block, 32), "F32")
        for layer, model_layer in enumerate((0, 2)):
            for name, values in read_values(store, layer, 4).items():
                assert torch.equal(values, wanted[model_layer, name])
    assert verify_against(tmp_path / "store", Checkpoint.open(fused)) > 0
