"""Encodings of linear layers that a checkpoint stores in fewer bits: their numbers by rows, and their values.

An encoding is recognised by the names, dtypes and shapes of its tensors, so layers in 16 bits need no rule, whether the
config lists them or not. O are output rows, N input columns, G groups of columns that share a scale. Invariants: every
tensor of a quantised layer is a part of its encoding, or is about activations alone, or is an error; numbers are the
checkpoint's, bit for bit; values equal those of the libraries that define the formats, bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from expert_store.encoding import ROW_GROUP_COLUMNS, RowEncoding
from extractor.checkpoint.tensor_file import TensorEntry, read_bytes
from extractor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from expert_store.rows import RowFields

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

_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word that holds each of its eight columns in AutoAWQ's layout."""

Parts = Mapping[str, TensorEntry]
Numbers = Callable[[Mapping[str, "Tensor"]], "RowFields"]
Codes = Literal["fp8", "int8", "fp4", "int4"]
Zeros = Literal["U8", "I16"]
Overall = Literal["factor", "divisor"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """A linear layer, or those of all experts in one tensor, as the checkpoint stores it.

    Attributes:
        parts: its tensors by role.
        shape: of the plain weight: [O, N], or with an axis of experts before, and [N, O] if `is_transposed`.
        rows: the encoding of its rows.
        numbers: from `parts` as tensors to the numbers of all rows. Where experts share a tensor, a range of experts,
            the same of every part, may be read by itself.
        obstacle: the reason why a store cannot hold such rows; empty if it can.
    """

    parts: Parts
    shape: tuple[int, ...]
    rows: RowEncoding
    numbers: Numbers
    obstacle: str
    is_transposed: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """O and N."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.is_transposed else (rows, columns)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The rows, uint8 [O, row_bytes] or those of a range of experts below each other, from `parts` as tensors."""
        from expert_store.rows import pack_rows

        return pack_rows(self.rows, self.numbers(tensors))

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The plain weight, or that of a range of experts, in the dtype that the format's library computes in."""
        import torch

        from expert_store.rows import decode_fields

        fields = self.numbers(tensors)
        if self.parts["codes"].dtype == "F8_E5M2":  # rows have E4M3 alone, where this code is a one
            factors = decode_fields(self.rows, replace(fields, codes=torch.full_like(fields.codes, 0x38)))
            values = fields.codes.view(torch.float8_e5m2).float() * factors
        else:
            values = decode_fields(self.rows, fields)
        if self.rows.middle:
            # The product of such an integer and a half-precision scale is exact in float32, so there is one rounding,
            # as in the libraries.
            values = values.to(fields.scales.dtype)
        if len(self.shape) > 2:
            values = values.view(-1, *self.matrix)
        return values.transpose(-2, -1) if self.is_transposed else values


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
        is_integer = codes.dtype == "I8" and scale is not None and scale.dtype in PLAIN_DTYPES
        return (_int8 if is_integer else _float4)(stem, parts)
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


# -- rows --------------------------------------------------------------------------------------------------------------


def _encoding_of(
    parts: Parts,
    shape: tuple[int, ...],
    codes: Codes,
    size: int,
    numbers: Numbers,
    zeros: Zeros | None = None,
    overall: Overall | None = None,
    is_transposed: bool = False,
) -> Encoding:
    """The encoding of `parts`, whose `numbers` have one scale for every `size` columns, the last ones maybe for fewer.

    Where groups are cut short at the edge, or have their columns all over the row, rows get smaller groups.
    """
    import torch

    from expert_store.rows import RowFields

    dtype = parts["scales"].dtype
    columns = shape[-2] if is_transposed else shape[-1]
    group = 1 if "indices" in parts else math.gcd(size, columns)
    names: dict[str, Any] = {"U8": "F8_E8M0"}
    rows = RowEncoding(codes, group, names.get(dtype, dtype), zeros, overall)

    def in_groups(tensors: Mapping[str, Tensor]) -> RowFields:
        fields = numbers(tensors)
        if group == size and "indices" not in tensors:
            return fields
        at = tensors["indices"].long() if "indices" in tensors else torch.arange(0, columns, group) // size
        points = None if fields.zeros is None else fields.zeros[:, at]
        return RowFields(fields.codes, fields.scales[:, at], points, fields.overall)

    return Encoding(parts, shape, rows, in_groups, _obstacle(parts, rows, columns), is_transposed)


def _obstacle(parts: Parts, rows: RowEncoding, columns: int) -> str:
    if "indices" in parts:
        return "its columns are in the order of activations"
    if parts["codes"].dtype == "F8_E5M2":
        return "its codes are E5M2"
    if parts["scales"].dtype == "F64":
        return "its scales are F64"
    if rows.group < ROW_GROUP_COLUMNS or columns % ROW_GROUP_COLUMNS:
        return f"{columns} columns are no whole groups of {ROW_GROUP_COLUMNS} or more"
    return ""


def _by_row(scales: Tensor, codes: Tensor, height: int) -> Tensor:
    """Scales of blocks of `height` rows of codes [..., O, N], repeated for each of the rows, [rows, G]."""
    *experts, rows, _ = codes.shape
    scales = _exponents(scales)
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(math.prod(experts) * rows, 1)
    if scales.dim() < codes.dim():
        scales = scales.unsqueeze(-1)
    scales = scales.repeat_interleave(height, dim=-2).narrow(-2, 0, rows)
    return scales.expand(*experts, rows, -1).reshape(-1, scales.shape[-1])


def _exponents(scales: Tensor) -> Tensor:
    """Scales, those that are powers of two as the bytes of their exponents."""
    import torch

    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


# -- one code a byte ---------------------------------------------------------------------------------------------------


def _float8(stem: str, parts: Parts, quantisation: Mapping[str, Any]) -> Encoding:
    scale = next((role for role in _SCALES if role in parts), "weight_scale")
    codes, scales = _take(stem, parts, "weight", scale)
    return _float8_of(stem, codes, scales, quantisation)


def _float8_of(stem: str, codes: TensorEntry, scales: TensorEntry, quantisation: Mapping[str, Any]) -> Encoding:
    height, width = _block(stem, codes, scales, quantisation.get("weight_block_size"))

    def numbers(tensors: Mapping[str, Tensor]) -> RowFields:
        import torch

        from expert_store.rows import RowFields

        values = tensors["codes"]
        return RowFields(values.view(torch.uint8).flatten(0, -2), _by_row(tensors["scales"], values, height))

    return _encoding_of({"codes": codes, "scales": scales}, codes.shape, "fp8", width, numbers)


def _int8(stem: str, parts: Parts) -> Encoding:
    """compressed-tensors' int-quantized: codes and zero points from −128 on, which rows count from 0 on."""
    codes, scales = _take(stem, parts, "weight", "weight_scale", optional=("weight_zero_point",))
    zeros = parts.get("weight_zero_point")
    if zeros is not None and (zeros.dtype, zeros.shape) != ("I8", scales.shape):
        raise _refusal(stem, parts, "need an int8 zero point for each scale")
    height, width = _block(stem, codes, scales, None)

    def numbers(tensors: Mapping[str, Tensor]) -> RowFields:
        import torch

        from expert_store.rows import RowFields

        values = tensors["codes"]
        points = _by_row(tensors["zeros"].view(torch.uint8) ^ 128, values, height) if "zeros" in tensors else None
        spread = _by_row(tensors["scales"], values, height)
        return RowFields(values.view(torch.uint8).flatten(0, -2) ^ 128, spread, points)

    named = _named(codes=codes, scales=scales, zeros=zeros)
    return _encoding_of(named, codes.shape, "int8", width, numbers, zeros=None if zeros is None else "U8")


def _block(stem: str, codes: TensorEntry, scales: TensorEntry, told: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    lengths, missing = codes.shape[-2:], len(codes.shape) - len(scales.shape)
    if len(lengths) == 2 and math.prod(scales.shape) == 1:
        return lengths[0], lengths[1]
    if len(lengths) < 2 or missing not in (0, 1):
        raise _refusal(stem, {"codes": codes, "scales": scales}, "are no matrix with scales for its rows")
    counts = (*scales.shape, 1)[-2:] if missing else scales.shape[-2:]
    blocks = []
    for length, count, size in zip(lengths, counts, told or (0, 0), strict=True):
        if size and -(-length // size) == count:
            blocks.append(min(size, length))
        elif count and length % count == 0:
            blocks.append(length // count)
        else:
            raise _refusal(stem, {"codes": codes, "scales": scales}, f"do not fit in blocks of {told or 'equal size'}")
    return blocks[0], blocks[1]


# -- four bits of floating point ---------------------------------------------------------------------------------------


def _float4(stem: str, parts: Parts) -> Encoding:
    """Two E2M1 codes a byte, the low nibble first: NVFP4 (groups of 16, a scale of all) and MXFP4 (groups of 32)."""
    packed = "weight_packed" if "weight_packed" in parts else "weight"
    scale = "scale" if "scale" in parts else "weight_scale"
    overalls: dict[str, Overall] = {"weight_global_scale": "divisor", "weight_scale_2": "factor"}
    role = next((role for role in overalls if role in parts), None)
    codes, scales, *of_all = _take(stem, parts, packed, scale, *([role] if role else []))
    columns = 2 * codes.shape[-1] if codes.shape else 0
    group = columns // scales.shape[-1] if scales.shape and scales.shape[-1] else 0
    wanted = (16, ("F8_E4M3",)) if role else (32, ("U8", "F8_E8M0"))
    if (group, scales.dtype in wanted[1]) != (wanted[0], True) or scales.shape[:-1] != codes.shape[:-1]:
        raise _refusal(stem, parts, f"are no four-bit codes with a {wanted[1][0]} scale for every {wanted[0]}")
    named = _named(codes=codes, scales=scales, overall=of_all[0] if of_all else None)
    return _encoding_of(
        named, (*codes.shape[:-1], columns), "fp4", group, _float4_numbers, overall=overalls[role] if role else None
    )


def _float4_numbers(tensors: Mapping[str, Tensor]) -> RowFields:
    import torch

    from expert_store.rows import RowFields, unpack_nibbles

    scales = _exponents(tensors["scales"]).flatten(0, -2)
    codes = tensors["codes"].view(torch.uint8).reshape(len(scales), -1)
    overall = None
    if "overall" in tensors:
        overall = tensors["overall"].float().reshape(-1)
        overall = overall.repeat_interleave(len(scales) // len(overall))
    return RowFields(unpack_nibbles(codes), scales, overall=overall)


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
    shape = (num_experts, 2 * groups * width, rows)
    named = {"codes": codes, "scales": scales}
    return _encoding_of(named, shape, "fp4", 2 * width, _float4_numbers, is_transposed=True)


# -- integers packed into words ----------------------------------------------------------------------------------------


def _packed(stem: str, parts: Parts) -> Encoding:
    """compressed-tensors' pack-quantized: codes along N in words, zero points along O, half their range added."""
    import torch

    optional = ("weight_zero_point", "weight_g_idx")
    codes, scales, shape = _take(stem, parts, "weight_packed", "weight_scale", "weight_shape", optional=optional)
    numbers_dtype = torch.int64 if shape.dtype == "I64" else torch.int32
    rows, columns = torch.frombuffer(read_bytes(shape, shape.offset, shape.bytes), dtype=numbers_dtype).tolist()[-2:]
    groups = scales.shape[-1] if len(scales.shape) == 2 else 1
    bits = next((bits for bits in (4, 8) if codes.shape == (rows, -(-columns * bits // 32))), 0)
    if not bits or not groups or columns % groups or scales.shape[0] != rows:
        raise _refusal(stem, parts, f"are no codes of 4 or 8 bits for [{rows}, {columns}] in groups of equal size")

    def numbers(tensors: Mapping[str, Tensor]) -> RowFields:
        from expert_store.rows import RowFields

        points = _unpack(tensors["zeros"].T, bits).T[:rows] if "zeros" in tensors else None
        return RowFields(_unpack(tensors["codes"], bits)[:, :columns], tensors["scales"].view(rows, -1), points)

    zeros = parts.get(optional[0])
    named = _named(codes=codes, scales=scales, zeros=zeros, indices=_order(stem, parts, optional[1], columns, groups))
    kind: Codes = "int4" if bits == 4 else "int8"
    return _encoding_of(named, (rows, columns), kind, columns // groups, numbers, zeros=None if zeros is None else "U8")


def _columns(stem: str, parts: Parts, quantisation: Mapping[str, Any]) -> Encoding:
    """GPTQ (codes along N in words) and AWQ (along O, nibbles out of order): all tensors are transposed."""
    codes, scales, zeros = _take(stem, parts, "qweight", "scales", "qzeros", optional=("g_idx",))
    (groups, rows), is_awq = scales.shape, codes.shape[1] != scales.shape[1]
    bits = 32 * zeros.shape[1] // rows
    columns = codes.shape[0] if is_awq else codes.shape[0] * 32 // bits if bits else 0
    fits = codes.shape[1] * (32 // bits if is_awq else 1) == rows and zeros.shape == (groups, rows * bits // 32)
    if bits not in (4, 8) or (is_awq and bits != 4) or not fits or columns % groups:
        raise _refusal(stem, parts, "are no codes of 4 or 8 bits as GPTQ or AWQ (gemm) pack them")
    # GPTQ's first format stores zero points less one
    less = 0 if is_awq or quantisation.get("checkpoint_format") == "gptq_v2" else 1

    def numbers(tensors: Mapping[str, Tensor]) -> RowFields:
        import torch

        from expert_store.rows import RowFields

        order = _AWQ_NIBBLES if is_awq else None
        values = _unpack(tensors["codes"], bits, order).T if is_awq else _unpack(tensors["codes"].T, bits)
        points = _unpack(tensors["zeros"], bits, order).T
        if less:
            points = points.to(torch.int16) + less if bits == 8 else points + less
        return RowFields(values, tensors["scales"].T, points)

    named = _named(codes=codes, scales=scales, zeros=zeros, indices=_order(stem, parts, "g_idx", columns, groups))
    kind: Codes = "int4" if bits == 4 else "int8"
    points: Zeros = "I16" if less and bits == 8 else "U8"  # 256 needs more than a byte
    return _encoding_of(named, (rows, columns), kind, columns // groups, numbers, zeros=points)


def _order(stem: str, parts: Parts, role: str, columns: int, groups: int) -> TensorEntry | None:
    """The tensor with each column's group; None where the groups follow one another, as they do without it."""
    entry = parts.get(role)
    if entry is None:
        return None
    import torch

    if (entry.dtype, entry.shape) != ("I32", (columns,)):
        raise _refusal(stem, parts, f"need an I32 in {role} for each of {columns} columns")
    found = torch.frombuffer(read_bytes(entry, entry.offset, entry.bytes), dtype=torch.int32)
    if torch.equal(found, torch.arange(columns, dtype=torch.int32) // (columns // groups)):
        return None
    if found.min() < 0 or found.max() >= groups:
        raise _refusal(stem, parts, f"have a group in {role} that is none of the {groups}")
    return entry


def _unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [R, W] → uint8 [R, W * 32 / bits], the lowest bits first, or each word's nibbles in `order`."""
    import torch

    from expert_store.rows import unpack_nibbles

    if order is not None:
        nibbles = [((words >> (4 * nibble)) & 15) << (4 * place) for place, nibble in enumerate(order)]
        words = functools.reduce(torch.bitwise_or, nibbles)
    packed = words.contiguous().view(torch.uint8)
    return unpack_nibbles(packed) if bits == 4 else packed
