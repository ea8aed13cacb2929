"""Tensors that a checkpoint stores quantised, seen as the plain tensors that they dequantise to.

FP8 with a scale per block (as DeepSeek-V3 ships) and MXFP4 (as gpt-oss ships). Everything after this module sees plain
tensors; the values are those of transformers' own dequantisation (`integrations/finegrained_fp8.py`,
`integrations/mxfp4.py`). Invariant: a quantised tensor never leaves this module under its own dtype, and its scales not
at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from expert_store.records import DTYPE_BYTES
from extractor.checkpoint.pieces import ConvertedPiece, CopiedPiece, Piece
from extractor.checkpoint.tensor_file import TensorEntry
from extractor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("fp8", "mxfp4")
"""`quant_method` of the checkpoints that are dequantised."""

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCALE_SUFFIXES = ("weight_scale_inv", "scale", "qscale_weight")
_MXFP4_VALUES_PER_BYTE = 2


@dataclass(frozen=True, slots=True)
class QuantisedEntry(TensorEntry):
    """A plain tensor that is stored as `values` and `scales`; `dtype`, `shape` and `bytes` are the plain tensor's.

    `block` are the rows and columns that share a scale (FP8), as the config says.
    """

    method: Literal["fp8", "mxfp4"]
    values: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, or of its text part; None where there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("quantization_config"), dict):
            return dict(part["quantization_config"])
    return None


def plain_tensors(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """`tensors` with every quantised one replaced by the plain tensor that it stands for, and without scales.

    Raises CheckpointError when a quantised tensor has no scales, or scales of a shape that does not fit.
    """
    quantisation = quantisation_of(config)
    if quantisation is None or quantisation.get("quant_method") not in METHODS:
        return dict(tensors)
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    fold = _fold_mxfp4 if quantisation["quant_method"] == "mxfp4" else _fold_fp8
    return fold(tensors, dtype, quantisation)


def piece_of(entry: TensorEntry, part: int = 0, num_parts: int = 1) -> Piece:
    """The bytes of `entry`, or of the part `part` of its first axis cut into `num_parts` equal parts."""
    num_bytes = entry.bytes // num_parts
    if isinstance(entry, QuantisedEntry):
        return ConvertedPiece(num_bytes, partial(_dequantise, entry, part, num_parts))
    return CopiedPiece(entry, entry.offset + part * num_bytes, num_bytes)


def read_part(entry: TensorEntry, part: int = 0, num_parts: int = 1) -> Tensor:
    """The same as a tensor in host memory, [first axis / num_parts, ...]."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    dtypes |= {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
    if isinstance(entry, QuantisedEntry):
        memory: bytearray | memoryview = _dequantise(entry, part, num_parts)
    else:
        num_bytes = entry.bytes // num_parts
        memory = _read(entry, entry.offset + part * num_bytes, num_bytes)
    shape = (entry.shape[0] // num_parts, *entry.shape[1:]) if entry.shape else ()
    return torch.frombuffer(memory, dtype=dtypes[entry.dtype]).view(shape)


def _fold_fp8(tensors: Mapping[str, TensorEntry], dtype: str, quantisation: dict[str, Any]) -> dict[str, TensorEntry]:
    rows, columns = quantisation.get("weight_block_size") or (0, 0)
    plain, consumed = dict(tensors), set[str]()
    for name, values in tensors.items():
        if values.dtype != "F8_E4M3":
            continue
        stem = name.removesuffix("weight")
        scale = next((stem + suffix for suffix in _SCALE_SUFFIXES if stem + suffix in tensors), f"{name}_scale_inv")
        if scale not in tensors:
            raise CheckpointError(
                f"{values.path}: {name} is stored in fp8 and has no scales {scale}; download it again"
            )
        consumed |= {scale, f"{stem}activation_scale"}
        size = math.prod(values.shape) * DTYPE_BYTES[dtype]
        plain[name] = QuantisedEntry(
            name, values.path, dtype, values.shape, values.offset, size, "fp8", values, tensors[scale], (rows, columns)
        )
    return {name: entry for name, entry in plain.items() if name not in consumed}


def _fold_mxfp4(tensors: Mapping[str, TensorEntry], dtype: str, quantisation: dict[str, Any]) -> dict[str, TensorEntry]:
    plain = {}
    for name, values in tensors.items():
        stem = name.removesuffix("_blocks")
        if stem == name:
            if not (name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors):
                plain[name] = values
            continue
        scales = tensors.get(f"{stem}_scales")
        if scales is None or scales.shape != values.shape[:-1] or len(values.shape) != 4:
            raise CheckpointError(
                f"{values.path}: {name} {list(values.shape)} is stored in mxfp4 and needs scales {stem}_scales of one "
                f"number per block; got {list(scales.shape) if scales else 'none'}: download it again"
            )
        num_experts, rows, groups, width = values.shape
        shape = (num_experts, groups * width * _MXFP4_VALUES_PER_BYTE, rows)
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        plain[stem] = QuantisedEntry(
            stem, values.path, dtype, shape, values.offset, size, "mxfp4", values, scales, (1, 2 * width)
        )
    return plain


def _dequantise(entry: QuantisedEntry, part: int, num_parts: int) -> memoryview:
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entry.dtype]
    if entry.method == "mxfp4":
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = (read_part(tensor, part, num_parts) for tensor in (entry.values, entry.scales))
        plain = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    else:
        fused = num_parts > 1 and len(entry.shape) == 3
        values = read_part(entry.values, part if fused else 0, num_parts if fused else 1).to(torch.float32)
        scales = read_part(entry.scales, part if fused else 0, num_parts if fused else 1)
        plain = (values * _spread(entry, scales, values)).to(dtype)
        if num_parts > 1 and not fused:
            plain = plain.chunk(num_parts)[part]
    return memoryview(plain.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _spread(entry: QuantisedEntry, scales: Tensor, values: Tensor) -> Tensor:
    """The scale of every value, float32, in a shape that broadcasts with `values`."""
    import torch

    scales = (scales.float() - 127.0).exp2() if scales.dtype == torch.uint8 else scales.float()
    if scales.numel() == 1:
        return scales.reshape(())
    for axis, block in zip((-2, -1), entry.block, strict=True):
        length, count = values.shape[axis], scales.shape[axis]
        if block == 0 or -(-length // block) != count:
            if length % count:
                raise CheckpointError(
                    f"{entry.path}: {entry.name} {list(entry.shape)} does not go with its scales "
                    f"{list(entry.scales.shape)} in blocks of {list(entry.block)}; download it again"
                )
            block = length // count
        scales = scales.repeat_interleave(block, dim=axis).narrow(axis, 0, length)
    return scales


def _read(entry: TensorEntry, offset: int, num_bytes: int) -> bytearray:
    memory = bytearray(num_bytes)
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < num_bytes:
            count = os.preadv(descriptor, [memoryview(memory)[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{entry.path} became shorter while it was read; download it again")
            done += count
    finally:
        os.close(descriptor)
    return memory
