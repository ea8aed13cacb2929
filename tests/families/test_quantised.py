"""Quantised checkpoints extract into plain stores, value for value as the libraries of their formats load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import CheckpointError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.model.seam.trunk import load_trunk
from tests.families.checkpoints import NUM_EXPERTS, is_experts, moe_blocks, random_model

BLOCK = 16


def fp8_blocks(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every projection in float8 with one scale per block of 16 × 16, as DeepSeek-V3's 128 × 128."""
    stored = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight") and "_proj_with_mqa" not in name and "q_a_proj" not in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = tensor.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scales = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        stored[name] = (blocks / scales).reshape(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales.reshape(rows // BLOCK, columns // BLOCK).contiguous()
    return stored, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Experts in four bits with one exponent per 32 values; random blocks serve, no rounding is under test."""
    stored = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(120, 128, shape, generator=generator, dtype=torch.uint8)
    return stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


Quantiser = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]


def quantised_checkpoint(family: str, quantise: Quantiser, directory: Path, **sizes: int) -> Path:
    random_model(family, **sizes).to(torch.bfloat16).save_pretrained(directory)
    stored, quantisation = quantise(load_file(directory / "model.safetensors"))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return directory


@pytest.mark.parametrize(
    ("family", "quantise", "sizes"),
    [
        ("deepseek_v3", fp8_blocks, {"moe_intermediate_size": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}),
        ("qwen3_moe", fp8_blocks, {"moe_intermediate_size": 32}),
        ("minimax_m2", fp8_blocks, {}),
        ("gpt_oss", mxfp4, {"intermediate_size": 32}),
    ],
    ids=["deepseek_v3-fp8", "qwen3_moe-fp8", "minimax_m2-fp8", "gpt_oss-mxfp4"],
)
@pytest.mark.filterwarnings("ignore")
def test_quantised_checkpoint_becomes_the_plain_store_that_transformers_would_load(
    family: str, quantise: Quantiser, sizes: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = quantised_checkpoint(family, quantise, tmp_path / "checkpoint", **sizes)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest()).run()
    with Store.open(tmp_path / "store") as store:
        assert store.manifest.model.dtype == "BF16"
        for layer, (_, _, experts) in enumerate(moe_blocks(loaded)):
            spec = store.manifest.layers[layer]
            for expert in range(NUM_EXPERTS):
                span = torch.empty(spec.span_bytes, dtype=torch.uint8)
                store.read_expert(layer, expert, span)
                for tensor in spec.tensors:
                    stored = span[tensor.offset : tensor.offset + tensor.bytes].view(torch.bfloat16).view(tensor.shape)
                    assert torch.equal(stored, getattr(experts, tensor.name)[expert])
        trunk = load_trunk(store.trunk_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert not hasattr(trunk.config, "quantization_config")
    routed = {name for name, module in loaded.named_modules() if is_experts(module)}
    wanted = {name: value for name, value in loaded.state_dict().items() if name.rpartition(".")[0] not in routed}
    ours = trunk.state_dict()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name


def int4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts as compressed-tensors packs them: what is stored, and the plain tensors that it decompresses to."""
    return compressed_experts(tensors, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)


def fp8_everywhere(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts and attention in fp8 with a scale a row."""
    return compressed_experts(tensors, "float-quantized", "", num_bits=8, type="float", strategy="channel")


def compressed_experts(
    tensors: dict[str, Tensor], format_name: str, among: str = ".experts.", **weights: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    compressor = BaseCompressor.get_value_from_registry(format_name)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    stored, plain = {}, {}
    for name, tensor in tensors.items():
        if among not in name or not name.endswith("_proj.weight"):
            stored[name] = plain[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        groups = tensor.float().reshape(len(tensor), -1, weights.get("group_size", tensor.shape[1]))
        scale = (groups.abs().amax(-1) / (7 if weights["num_bits"] == 4 else 448)).to(torch.bfloat16)
        packed = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
        plain[name] = compressor.decompress(dict(packed), scheme)["weight"].to(torch.bfloat16)
        stored |= {f"{stem}.{role}": value.contiguous() for role, value in packed.items()}
    return stored, plain


@pytest.mark.parametrize("compress", [int4, fp8_everywhere])
@pytest.mark.parametrize("told_in", ["config.json", "hf_quant_config.json"])
@pytest.mark.filterwarnings("ignore")
def test_compressed_checkpoint_becomes_the_store_of_the_plain_one(
    compress: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]], told_in: str, tmp_path: Path
) -> None:
    """Whatever file tells of the quantisation: names, dtypes and shapes of the tensors are enough."""
    random_model("qwen3_moe", moe_intermediate_size=32).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    stored, plain = compress(load_file(tmp_path / "plain" / "model.safetensors"))
    shutil.copytree(tmp_path / "plain", tmp_path / "packed")
    save_file(plain, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "compressed-tensors"}
    path = tmp_path / "packed" / told_in
    config = json.loads(path.read_text()) | {"quantization_config": quantisation} if path.exists() else quantisation
    path.write_text(json.dumps(config))
    manifests = []
    for name in ("plain", "packed"):
        prepare(Checkpoint.open(tmp_path / name), tmp_path / f"{name}-store", SelectionRequest()).run()
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
