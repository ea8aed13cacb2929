"""Quantised checkpoints extract into stores with the values that the libraries of their formats load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expert_store.manifest import expert_encodings
from expert_store.rows import span_values
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import CheckpointError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.model.seam.trunk import load_trunk
from tests.extractor.packed import compress, decompress, fp8_blocks, pack_fused_mxfp4, write_checkpoint
from tests.families.checkpoints import NUM_EXPERTS, is_experts, moe_blocks, random_model

BLOCK = 16


def fp8_in_blocks(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every projection in float8 with one scale per block of 16 × 16, as DeepSeek-V3's 128 × 128."""
    stored = {}
    projections = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
    for name, tensor in tensors.items():
        if name.endswith(projections) or "_proj_with_mqa" in name or "q_a_proj" in name:
            packed = fp8_blocks(tensor, BLOCK)
            stored |= {name: packed["weight"], f"{name}_scale_inv": packed["weight_scale_inv"].contiguous()}
        else:
            stored[name] = tensor
    return stored, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


Quantiser = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]


def quantised_checkpoint(family: str, quantise: Quantiser, directory: Path, **sizes: int) -> Path:
    random_model(family, **sizes).to(torch.bfloat16).save_pretrained(directory)
    return write_checkpoint(directory, directory, *quantise(load_file(directory / "model.safetensors")))


@pytest.mark.parametrize(
    ("family", "quantise", "sizes"),
    [
        ("deepseek_v3", fp8_in_blocks, {"moe_intermediate_size": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}),
        ("qwen3_moe", fp8_in_blocks, {"moe_intermediate_size": 32}),
        ("minimax_m2", fp8_in_blocks, {}),
        ("gpt_oss", pack_fused_mxfp4, {"intermediate_size": 32}),
    ],
    ids=["deepseek_v3-fp8", "qwen3_moe-fp8", "minimax_m2-fp8", "gpt_oss-mxfp4"],
)
@pytest.mark.filterwarnings("ignore")
def test_quantised_checkpoint_becomes_a_store_of_the_values_that_transformers_would_load(
    family: str, quantise: Quantiser, sizes: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = quantised_checkpoint(family, quantise, tmp_path / "checkpoint", **sizes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for experts_dtype in ("shipped", "16bit"):
        prepare(Checkpoint.open(checkpoint), tmp_path / experts_dtype, SelectionRequest(), experts_dtype).run()
        with Store.open(tmp_path / experts_dtype) as store:
            assert store.manifest.model.dtype == "BF16"
            encoded = {"gate_up_proj", "down_proj"} if experts_dtype == "shipped" else set()
            assert set(expert_encodings(store.manifest.layers)) == encoded
            expect_values(store, loaded)
    with Store.open(tmp_path / "16bit") as store:
        trunk = load_trunk(store.trunk_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert not hasattr(trunk.config, "quantization_config")
    routed = {name for name, module in loaded.named_modules() if is_experts(module)}
    wanted = {name: value for name, value in loaded.state_dict().items() if name.rpartition(".")[0] not in routed}
    ours = trunk.state_dict()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name


def expect_values(store: Store, loaded: Any) -> None:
    """Every expert of the store has the values that the model `loaded` has."""
    for layer, (_, _, experts) in enumerate(moe_blocks(loaded)):
        spec = store.manifest.layers[layer]
        for expert in range(NUM_EXPERTS):
            span = torch.empty(spec.span_bytes, dtype=torch.uint8)
            store.read_expert(layer, expert, span)
            for tensor in spec.tensors:
                values = span_values(spec, span)[tensor.name].to(torch.bfloat16)
                is_turned = experts.is_transposed and tensor.encoding is not None
                assert torch.equal(values.T if is_turned else values, getattr(experts, tensor.name)[expert])


def int4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts as compressed-tensors packs them: what is stored, and the plain tensors that it decompresses to."""
    return compressed_experts(tensors, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)


def fp8_everywhere(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts and attention in fp8 with a scale a row."""
    return compressed_experts(tensors, "float-quantized", "", num_bits=8, type="float", strategy="channel")


def compressed_experts(
    tensors: dict[str, Tensor], format_name: str, among: str = ".experts.", **weights: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if among not in name or not name.endswith("_proj.weight"):
            stored[name] = plain[name] = tensor
            continue
        packed = compress(tensor, format_name, **weights)
        plain[name] = decompress(packed, format_name, **weights).to(torch.bfloat16)
        stored |= {f"{name.removesuffix('weight')}{role}": value.contiguous() for role, value in packed.items()}
    return stored, plain


@pytest.mark.parametrize("packing", [int4, fp8_everywhere])
@pytest.mark.parametrize("told_in", ["config.json", "hf_quant_config.json"])
@pytest.mark.filterwarnings("ignore")
def test_compressed_checkpoint_becomes_the_store_of_the_plain_one(
    packing: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]], told_in: str, tmp_path: Path
) -> None:
    """Whatever file tells of the quantisation: names, dtypes and shapes of the tensors are enough."""
    random_model("qwen3_moe", moe_intermediate_size=32).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    stored, plain = packing(load_file(tmp_path / "plain" / "model.safetensors"))
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "compressed-tensors"}
    path = tmp_path / "packed" / told_in
    config = json.loads(path.read_text()) | {"quantization_config": quantisation} if path.exists() else quantisation
    path.write_text(json.dumps(config))
    manifests = []
    for name in ("plain", "packed"):
        prepare(Checkpoint.open(tmp_path / name), tmp_path / f"{name}-store", SelectionRequest(), "16bit").run()
        with Store.open(tmp_path / f"{name}-store") as store:
            manifests.append(store.manifest)
    assert manifests[0].deep_experts == manifests[1].deep_experts
    weights = [[file for file in manifest.trunk if file.name.endswith(".safetensors")] for manifest in manifests]
    assert weights[0] == weights[1]
    assert not (tmp_path / "packed-store" / "trunk" / "hf_quant_config.json").exists()
    assert "quantization_config" not in (tmp_path / "packed-store" / "trunk" / "config.json").read_text()


def test_blocks_at_the_edge_that_are_smaller_keep_their_own_scale(tmp_path: Path) -> None:
    """DeepSeek-V3's kv_a_proj has 576 rows in blocks of 128: the last block is half as high."""
    values = torch.randn(24, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (entry,) = Checkpoint.open(tmp_path).tensors.values()
    from extractor.checkpoint.quantised import read_part

    expected = torch.stack(
        [torch.stack([values[r, c].float() * scales[r // 16, c // 16] for c in range(40)]) for r in range(24)]
    )
    assert torch.equal(read_part(entry), expected.to(torch.bfloat16))


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"a \(weight F8_E4M3 \[4, 4\]\) need a\.weight_scale beside them"):
        _ = Checkpoint.open(tmp_path).tensors


def test_mxfp4_without_scales_is_refused(tmp_path: Path) -> None:
    save_file({"a_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(CheckpointError, match="need a_scales with one number for each block"):
        _ = Checkpoint.open(tmp_path).tensors
