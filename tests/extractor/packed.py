"""Checkpoints in every encoding that is taken, made from plain ones: small models for tests of what comes after.

`PACKINGS` names the encodings; `pack_checkpoint` writes a copy of a checkpoint with its experts in one of them, rounded
sensibly, so that a good model stays one. `pack_fused_mxfp4` is for gpt-oss, whose experts share tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from expert_store.encoding import RowEncoding
from tests.extractor.checkpoints import make_model, write_tokenizer

GPTQ_NIBBLES = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds each of its eight columns."""


@dataclass(frozen=True)
class Packing:
    """A way to ship a linear layer.

    Attributes:
        pack: from a weight [O, N] to the layer's tensors by role.
        quantisation: the config's.
        rows: the encoding of the rows in a store, for N = 256; None where it is dequantised.
    """

    pack: Callable[[Tensor], dict[str, Tensor]]
    quantisation: dict[str, Any]
    rows: RowEncoding | None


def scheme_of(**weights: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def compress(weight: Tensor, format_name: str, **arguments: Any) -> dict[str, Tensor]:
    """A weight [O, N] as compressed-tensors stores it."""
    scheme = scheme_of(**arguments)
    args = scheme.weights
    assert args is not None
    rows, columns = weight.shape
    group = min(args.group_size or columns, columns)
    shape = (1, 1, -1) if args.strategy == "tensor" else (rows, columns // group, group)
    groups = weight.float().reshape(shape)
    top = {("float", 8): 448.0, ("float", 4): 6.0}.get((str(args.type), args.num_bits), 2.0 ** (args.num_bits - 1) - 1)
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    state: dict[str, Tensor] = {"weight": weight.to(torch.bfloat16)}
    if args.symmetric:
        scale = groups.abs().amax(-1) / top
    else:
        scale = (most - least) / (2 * top + 1)
        state["weight_zero_point"] = (-(top + 1) - least / scale).round().clamp(-top - 1, top).to(torch.int8)
    if args.strategy == "tensor_group":
        overall = 448 / scale.max().clamp(min=1e-9)
        scale = (scale * overall).to(torch.float8_e4m3fn)
        state["weight_global_scale"] = overall.reshape(1)
    state["weight_scale"] = scale.to(torch.bfloat16)
    return dict(BaseCompressor.get_value_from_registry(format_name).compress(state, scheme))


def decompress(stored: dict[str, Tensor], format_name: str, **arguments: Any) -> Tensor:
    """The weight that compressed-tensors makes of a layer's tensors."""
    state = BaseCompressor.get_value_from_registry(format_name).decompress(dict(stored), scheme_of(**arguments))
    return state["weight"]


def fp8_blocks(weight: Tensor, block: int = 128) -> dict[str, Tensor]:
    """E4M3 with a scale for each block of `block` × `block`; those at the edges are smaller."""
    rows, columns = weight.shape
    padded = torch.zeros(rows + -rows % block, columns + -columns % block)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // block, block, -1, block)
    scales = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-9) / 448
    codes = (blocks / scales).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales[:, 0, :, 0]}


def modelopt_nvfp4(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' numbers under modelopt's names, with a factor in place of the divisor."""
    stored = compress(weight, "nvfp4-pack-quantized", **NVFP4)
    return {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": 1 / stored["weight_global_scale"].reshape(()),
        "input_scale": torch.tensor(0.25),
    }


def pack_words(codes: Tensor, bits: int = 4, order: tuple[int, ...] = GPTQ_NIBBLES) -> Tensor:
    """Codes [R, C] → int32 [R, C * bits / 32], column i of each word in its field order[i]."""
    fields = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // fields, dtype=torch.int64)
    for column, field in enumerate(order[:fields]):
        words |= codes[:, column::fields].long() << (bits * field)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def integers(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [O, N], zero points [O, G] from 1 on, half-precision scales [O, G]."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, min(group, columns))
    least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scales = ((most - least) / top).clamp(min=1e-6).half()
    zeros = (-least / scales.float()).round().clamp(1, top)
    codes = (groups / scales.float() + zeros).round().clamp(0, top)
    return codes.view(rows, columns).int(), zeros[..., 0].int(), scales[..., 0]


def gptq(weight: Tensor, bits: int = 4, group: int = 32, act_order: bool = False, less: int = 1) -> dict[str, Tensor]:
    """GPTQ's tensors; in the order of activations the columns are in a random one. Zero points are stored less one."""
    columns = weight.shape[1]
    g_idx = torch.arange(columns, dtype=torch.int32) // min(group, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0)) if act_order else torch.arange(columns)
    codes, zeros, scales = integers(weight[:, order], bits, group)
    back = order.argsort()
    return {
        "qweight": pack_words(codes[:, back], bits).T,
        "qzeros": pack_words(zeros.T - less, bits),
        "scales": scales.T,
        "g_idx": g_idx[back],
    }


def awq(weight: Tensor, group: int = 32) -> dict[str, Tensor]:
    codes, zeros, scales = integers(weight, 4, group)
    return {
        "qweight": pack_words(codes.T, 4, AWQ_NIBBLES),
        "qzeros": pack_words(zeros.T, 4, AWQ_NIBBLES),
        "scales": scales.T,
    }


def _compressed(rows: RowEncoding, format_name: str, **weights: Any) -> Packing:
    quantisation = {"quant_method": "compressed-tensors", "format": format_name}
    return Packing(partial(compress, format_name=format_name, **weights), quantisation, rows)


def _int(bits: int, group: int | None, symmetric: bool) -> Packing:
    rows = RowEncoding("int4" if bits == 4 else "int8", group or 256, "BF16", None if symmetric else "U8")
    return _compressed(
        rows,
        "pack-quantized",
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )


NVFP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
}
MXFP4: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
PACKINGS: dict[str, Packing] = {
    "fp8 blocks": Packing(
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
        RowEncoding("fp8", 128, "F32"),
    ),
    "fp8 channel": _compressed(
        RowEncoding("fp8", 256, "BF16"), "float-quantized", num_bits=8, type="float", strategy="channel"
    ),
    "fp8 tensor": _compressed(
        RowEncoding("fp8", 256, "BF16"), "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "mxfp4": _compressed(RowEncoding("fp4", 32, "F8_E8M0"), "mxfp4-pack-quantized", **MXFP4),
    "nvfp4 compressed-tensors": _compressed(
        RowEncoding("fp4", 16, "F8_E4M3", overall="divisor"), "nvfp4-pack-quantized", **NVFP4
    ),
    "nvfp4 modelopt": Packing(
        modelopt_nvfp4, {"quant_method": "modelopt"}, RowEncoding("fp4", 16, "F8_E4M3", overall="factor")
    ),
    "int4 g32": _int(4, 32, symmetric=True),
    "int4 g32 asymmetric": _int(4, 32, symmetric=False),
    "int4 channel": _int(4, None, symmetric=True),
    "int8 g32": _int(8, 32, symmetric=True),
    "int8 channel": _compressed(
        RowEncoding("int8", 256, "BF16"),
        "int-quantized",
        num_bits=8,
        type="int",
        symmetric=True,
        strategy="channel",
    ),
    "gptq": Packing(gptq, {"quant_method": "gptq", "bits": 4}, RowEncoding("int4", 32, "F16", "U8")),
    "gptq 8 bit": Packing(
        partial(gptq, bits=8), {"quant_method": "gptq", "bits": 8}, RowEncoding("int8", 32, "F16", "I16")
    ),
    "gptq act-order": Packing(partial(gptq, act_order=True), {"quant_method": "gptq", "bits": 4}, None),
    "awq": Packing(awq, {"quant_method": "awq", "bits": 4}, RowEncoding("int4", 32, "F16", "U8")),
}
"""Ways to ship a linear layer, by name; the groups suit the bundled checkpoint, whose experts are 32 wide."""


def pack_checkpoint(source: Path, target: Path, packing: str, among: str = ".experts.") -> Path:
    """Write a copy of the checkpoint `source` to `target`, in which the projections named like `among` are packed."""
    chosen = PACKINGS[packing]
    stored = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if among in name and name.endswith("_proj.weight"):
                packed = chosen.pack(tensor)
                stored |= {f"{name.removesuffix('weight')}{role}": value for role, value in packed.items()}
            else:
                stored[name] = tensor
    return write_checkpoint(source, target, stored, chosen.quantisation)


def write_checkpoint(source: Path, target: Path, stored: dict[str, Tensor], quantisation: dict[str, Any]) -> Path:
    """Write a checkpoint of these tensors with the side files of `source`, which may be the same directory."""
    if target != source:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {name: tensor.contiguous().clone() for name, tensor in stored.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": quantisation}
    (target / "config.json").write_text(json.dumps(config))
    return target


def pack_fused_mxfp4(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """gpt-oss's tensors with experts in four bits, an exponent for 32 values, and the quantisation of its config."""
    stored = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        packed = [compress(expert.T, "mxfp4-pack-quantized", **MXFP4) for expert in tensor]
        codes = torch.stack([one["weight_packed"] for one in packed])
        stored[f"{name}_blocks"] = codes.view(*codes.shape[:2], -1, 16)
        stored[f"{name}_scales"] = torch.stack([one["weight_scale"] for one in packed])
    return stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def save_packed_checkpoint(directory: Path, packing: str, among: str = ".experts.") -> Path:
    """Write a random qwen3_moe checkpoint that is shipped packed: MoE layers 0 and 2, 6 experts, top-2, H 64, I 32."""
    plain = directory.with_name(f"{directory.name}-plain")
    model = make_model("qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    model.save_pretrained(plain)
    write_tokenizer(plain)
    return pack_checkpoint(plain, directory, packing, among)
