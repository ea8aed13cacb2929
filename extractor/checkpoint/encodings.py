"""Encodings of linear layers that a checkpoint stores in fewer bits, and their decoding to values.

An encoding is recognised by the names, dtypes and shapes of its tensors, so layers in 16 bits need no rule, whether the
config lists them or not. O are output rows, N input columns, G groups of columns that share a scale. Decoded values
equal those of the libraries that define the formats, bit for bit. Invariant: every tensor of a quantised layer is a
part of its encoding, or is about activations alone, or is an error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extractor.checkpoint.tensor_file import TensorEntry, read_bytes
from extractor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TAKEN = "fp8, int8, int4 (compressed-tensors, GPTQ, AWQ), NVFP4 and MXFP4"
"""The encodings, for messages."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
_ROLES = (
    *("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("weight_scale_2", "pre_quant_scale", "qweight", "qzeros", "scales", "g_idx", *_SCALES),
)
"""The last part of the names of tensors that describe a layer's weights."""
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "activation_scale", "qscale_act", "k_scale", "v_scale")
"""The last part of the names of tensors that quantise activations, keys or values, which stay in 16 bits here."""
_ORDINARY = {"weight", "scale", "scales"}
"""Roles that a model's own parameters may have too, if there are no codes beside them."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds each of its eight columns in AutoAWQ's layout."""

Parts = Mapping[str, TensorEntry]
Decode = Callable[[Mapping[str, "Tensor"]], "Tensor"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """A linear layer, or those of all experts in one tensor, as the checkpoint stores it.

    Attributes:
        parts: its tensors by role.
        shape: of the plain weight: [O, N], or with an axis of experts before as transformers has it.
        decode: from `parts` as tensors to the plain weight, in the dtype that the format's library computes in. Where
            experts share a tensor, a range of experts, the same of every part, may be decoded by itself.
    """

    parts: Parts
    shape: tuple[int, ...]
    decode: Decode


def encodings_of(tensors: Parts, quantisation: Mapping[str, Any]) -> tuple[dict[str, Encoding], set[str]]:
    """The encoded weights among `tensors` by the name of the plain weight, and the names of all tensors they replace.

    Args:
        tensors: of a checkpoint, by name.
        quantisation: its quantization_config; it says what names, dtypes and shapes leave open.

    Raises:
        CheckpointError: a weight is packed in no encoding known here; its scales are missing, left over or do not fit.
    """
    layers: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    found, replaced = {}, set[str]()
    for name, entry in tensors.items():
        stem, _, role = name.rpartition(".")
        if role in _ROLES:
            layers[stem][role] = entry
        elif name.endswith("_blocks") or entry.dtype in _FLOAT8:
            found[name.removesuffix("_blocks")] = _fused(name, entry, tensors, quantisation)
    for stem, parts in layers.items():
        encoding = _encoding(stem, parts, quantisation)
        if encoding is not None:
            found[f"{stem}.weight"] = encoding
            replaced |= {f"{stem}.{role}" for role in (*parts, *_OF_ACTIVATIONS)}
            replaced |= {f"{stem.rpartition('.')[0]}.{role}" for role in ("k_scale", "v_scale")}
    replaced |= {part.name for encoding in found.values() for part in encoding.parts.values()}
    return found, replaced & set(tensors)


def _encoding(stem: str, parts: Parts, quantisation: Mapping[str, Any]) -> Encoding | None:
    """The encoding of one layer's tensors; None if they are plain."""
    codes = parts.get("weight")
    if codes is not None and codes.dtype in _FLOAT8:
        return _float8(stem, parts, quantisation)
    if "weight_packed" in parts:
        return (_packed if parts["weight_packed"].dtype == "I32" else _float4)(stem, parts)
    if "qweight" in parts:
        return _columns(stem, parts, quantisation)
    if codes is not None and codes.dtype in ("I8", "U8"):
        scale = parts.get("weight_scale")
        return _int8(stem, parts) if scale is not None and scale.dtype in PLAIN_DTYPES else _float4(stem, parts)
    if set(parts) <= _ORDINARY and (codes is None or codes.dtype in PLAIN_DTYPES):
        return None
    raise _refusal(stem, parts, "are of no encoding known here")


def _refusal(stem: str, parts: Parts, problem: str) -> CheckpointError:
    told = ", ".join(f"{role} {entry.dtype} {list(entry.shape)}" for role, entry in sorted(parts.items()))
    path = next(iter(parts.values())).path
    return CheckpointError(
        f"{path}: the tensors of {stem} ({told}) {problem}; taken are {TAKEN} weights: use such a release of the "
        "model, or its bfloat16 one"
    )


def _take(stem: str, parts: Parts, *roles: str, optional: tuple[str, ...] = ()) -> list[TensorEntry]:
    """The parts of the given roles; refuses a layer that lacks one, or has more than them and the optional ones."""
    for role in roles:
        if role not in parts:
            raise _refusal(stem, parts, f"need {stem}.{role} beside them")
    beyond = set(parts) - {*roles, *optional}
    if beyond:
        raise _refusal(stem, parts, f"leave {stem}.{min(beyond)} over")
    return [parts[role] for role in roles]


def _named(**parts: TensorEntry | None) -> dict[str, TensorEntry]:
    return {role: entry for role, entry in parts.items() if entry is not None}


# -- one code a byte ---------------------------------------------------------------------------------------------------


def _float8(stem: str, parts: Parts, quantisation: Mapping[str, Any]) -> Encoding:
    scale = next((role for role in _SCALES if role in parts), "weight_scale")
    codes, scales = _take(stem, parts, "weight", scale)
    return _float8_of(stem, codes, scales, quantisation)


def _float8_of(stem: str, codes: TensorEntry, scales: TensorEntry, quantisation: Mapping[str, Any]) -> Encoding:
    block = _block(stem, codes, scales, quantisation.get("weight_block_size"))

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors["codes"].float()
        return values * _spread(tensors["scales"], values, block)

    return Encoding({"codes": codes, "scales": scales}, codes.shape, decode)


def _int8(stem: str, parts: Parts) -> Encoding:
    codes, scales = _take(stem, parts, "weight", "weight_scale", optional=("weight_zero_point",))
    block = _block(stem, codes, scales, None)

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors["codes"].float()
        if "zeros" in tensors:
            values -= _spread(tensors["zeros"].float(), values, block)
        return (values * _spread(tensors["scales"], values, block)).to(tensors["scales"].dtype)

    return Encoding(_named(codes=codes, scales=scales, zeros=parts.get("weight_zero_point")), codes.shape, decode)


def _block(stem: str, codes: TensorEntry, scales: TensorEntry, told: Any) -> tuple[int, int]:
    """Rows and columns that share a scale; (0, 0) for one scale in all."""
    if math.prod(scales.shape) == 1:
        return 0, 0
    lengths = codes.shape[-2:]
    counts = scales.shape[-2:] if len(scales.shape) == len(codes.shape) else (*scales.shape[-1:], 1)
    blocks = []
    for length, count, size in zip(lengths, counts, told or (0, 0), strict=True):
        if size and -(-length // size) == count:
            blocks.append(size)
        elif count and length % count == 0:
            blocks.append(length // count)
        else:
            raise _refusal(stem, {"codes": codes, "scales": scales}, f"do not fit in blocks of {told or 'equal size'}")
    return blocks[0], blocks[1]


def _spread(scales: Tensor, values: Tensor, block: tuple[int, int]) -> Tensor:
    """The scale of every value, float32, in a shape that broadcasts with `values`."""
    scales = _exponents(scales)
    if block == (0, 0):
        return scales.reshape(())
    if scales.dim() < values.dim():
        scales = scales.unsqueeze(-1)
    for axis, size in zip((-2, -1), block, strict=True):
        if scales.shape[axis] > 1:
            scales = scales.repeat_interleave(size, dim=axis).narrow(axis, 0, values.shape[axis])
    return scales


def _exponents(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are powers of two (E8M0, bias 127)."""
    import torch

    return (scales.float() - 127.0).exp2() if scales.dtype == torch.uint8 else scales.float()


# -- four bits of floating point ---------------------------------------------------------------------------------------


def _float4(stem: str, parts: Parts) -> Encoding:
    """Two E2M1 codes a byte, the low nibble first: NVFP4 (groups of 16, a scale of all) and MXFP4 (groups of 32)."""
    packed = "weight_packed" if "weight_packed" in parts else "weight"
    scale = "scale" if "scale" in parts else "weight_scale"
    overall = next((role for role in ("weight_global_scale", "weight_scale_2") if role in parts), None)
    codes, scales, *of_all = _take(stem, parts, packed, scale, *([overall] if overall else []))
    columns = 2 * codes.shape[-1]
    group = columns // scales.shape[-1] if scales.shape and scales.shape[-1] else 0
    wanted = (16, ("F8_E4M3",)) if overall else (32, ("U8", "F8_E8M0"))
    if (group, scales.dtype in wanted[1]) != (wanted[0], True) or scales.shape[:-1] != codes.shape[:-1]:
        raise _refusal(stem, parts, f"are no four-bit codes with a {wanted[1][0]} scale for every {wanted[0]}")

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        factors = _exponents(tensors["scales"])
        if overall == "weight_global_scale":
            factors = factors / tensors["overall"].float()
        elif overall:
            factors = factors * tensors["overall"].float()
        return _e2m1(tensors["codes"]) * factors.repeat_interleave(group, dim=-1)

    named = _named(codes=codes, scales=scales, overall=of_all[0] if of_all else None)
    return Encoding(named, (*codes.shape[:-1], columns), decode)


def _e2m1(codes: Tensor) -> Tensor:
    """bytes [..., n] → float32 [..., 2n]."""
    import torch

    values = torch.tensor(_E2M1)
    codes = codes.view(torch.uint8)
    return values[torch.stack((codes & 15, codes >> 4), dim=-1).long()].flatten(-2)


def _fused(name: str, codes: TensorEntry, tensors: Parts, quantisation: Mapping[str, Any]) -> Encoding:
    """All experts of a layer in one tensor: fp8 with scales beside it, or gpt-oss's blocks of MXFP4."""
    if not name.endswith("_blocks"):
        scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in tensors), None)
        if scale is None:
            raise _refusal(name, {"codes": codes}, f"need {name}_scale_inv beside them")
        return _float8_of(name, codes, tensors[scale], quantisation)
    stem = name.removesuffix("_blocks")
    scales = tensors.get(f"{stem}_scales")
    if scales is None or scales.shape != codes.shape[:-1] or len(codes.shape) != 4:
        beside = {"scales": scales} if scales is not None else {}
        raise _refusal(stem, {"blocks": codes, **beside}, f"need {stem}_scales with one number for each block")
    num_experts, rows, groups, width = codes.shape

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        return convert_moe_packed_tensors(parts["codes"], parts["scales"])

    return Encoding({"codes": codes, "scales": scales}, (num_experts, 2 * groups * width, rows), decode)


# -- integers packed into words ----------------------------------------------------------------------------------------


def _packed(stem: str, parts: Parts) -> Encoding:
    """compressed-tensors' pack-quantized: codes along N in words, zero points along O, half their range added."""
    import torch

    optional = ("weight_zero_point", "weight_g_idx")
    codes, scales, shape = _take(stem, parts, "weight_packed", "weight_scale", "weight_shape", optional=optional)
    numbers = torch.int64 if shape.dtype == "I64" else torch.int32
    rows, columns = torch.frombuffer(read_bytes(shape, shape.offset, shape.bytes), dtype=numbers).tolist()[-2:]
    groups = scales.shape[-1] if len(scales.shape) == 2 else 1
    bits = next((bits for bits in (4, 8) if codes.shape == (rows, -(-columns * bits // 32))), 0)
    if not bits or columns % groups or scales.shape[0] != rows:
        raise _refusal(stem, parts, f"are no codes of 4 or 8 bits for [{rows}, {columns}] in groups of equal size")

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        group = tensors["indices"].long() if "indices" in tensors else torch.arange(columns) // (columns // groups)
        middle = 2 ** (bits - 1)
        zeros = _unpack(tensors["zeros"].T, bits).T[:rows, group] if "zeros" in tensors else middle
        return _scaled(_unpack(tensors["codes"], bits)[:, :columns] - zeros, tensors["scales"].view(rows, -1), group)

    named = _named(codes=codes, scales=scales, zeros=parts.get(optional[0]), indices=parts.get(optional[1]))
    return Encoding(named, (rows, columns), decode)


def _columns(stem: str, parts: Parts, quantisation: Mapping[str, Any]) -> Encoding:
    """GPTQ (codes along N in words) and AWQ (along O, nibbles out of order): all tensors are transposed."""
    import torch

    codes, scales, zeros = _take(stem, parts, "qweight", "scales", "qzeros", optional=("g_idx",))
    indices = parts.get("g_idx")
    (groups, rows), is_awq = scales.shape, codes.shape[1] != scales.shape[1]
    bits = 32 * zeros.shape[1] // rows
    columns = codes.shape[0] if is_awq else codes.shape[0] * 32 // bits if bits else 0
    fits = codes.shape[1] * (32 // bits if is_awq else 1) == rows and zeros.shape == (groups, rows * bits // 32)
    if bits not in (4, 8) or (is_awq and bits != 4) or not fits or columns % groups:
        raise _refusal(stem, parts, "are no codes of 4 or 8 bits as GPTQ or AWQ (gemm) pack them")
    # GPTQ's first format stores zero points less one
    less = 0 if is_awq or quantisation.get("checkpoint_format") == "gptq_v2" else 1

    def decode(tensors: Mapping[str, Tensor]) -> Tensor:
        group = tensors["indices"].long() if "indices" in tensors else torch.arange(columns) // (columns // groups)
        order = _AWQ_NIBBLES if is_awq else None
        values = _unpack(tensors["codes"], bits, order) if is_awq else _unpack(tensors["codes"].T, bits).T
        points = _unpack(tensors["zeros"], bits, order) + less
        return _scaled((values - points[group]).T, tensors["scales"].T, group)

    named = _named(codes=codes, scales=scales, zeros=zeros, indices=indices)
    return Encoding(named, (rows, columns), decode)


def _unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [R, W] → int32 [R, W * 32 / bits], the lowest bits first, or each word's fields in `order`."""
    import torch

    shifts = torch.tensor(order or tuple(range(32 // bits))) * bits
    fields = torch.bitwise_and(words.unsqueeze(-1) >> shifts, 2**bits - 1)
    return fields.flatten(-2)


def _scaled(values: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """values [O, N] times scales [O, G] of their groups, in the scales' dtype. The product of such an integer and a
    half-precision scale is exact in float32, so there is one rounding, as in the libraries."""
    return (values.float() * scales[:, group].float()).to(scales.dtype)
