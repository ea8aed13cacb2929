"""Quantised tensors of a checkpoint, presented as their dequantised plain tensors, and as encoded rows.

Other modules get plain tensors or rows. Invariant: a quantised tensor leaves this module with its own dtype, and its
scales beside it, only as the parts of an entry that `is_eight_bit`. `encodings.py` defines the formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from expert_store.manifest import DTYPE_BYTES
from extractor.checkpoint.encodings import TAKEN, Encoding, encodings_of
from extractor.checkpoint.tensor_file import ConvertedPiece, CopiedPiece, Piece, TensorEntry, read_bytes
from extractor.errors import UnsupportedFamilyError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq")
"""`quant_method` of the checkpoints that are taken."""

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json for the quantisation; older compressed-tensors releases used the second one."""
MODELOPT_CONFIG = "hf_quant_config.json"
"""File with the quantisation of modelopt's releases, which config.json may lack; the tensors' dtypes say the same."""

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class QuantisedEntry(TensorEntry):
    """A plain tensor that is stored as `encoding`; `dtype`, `shape` and `bytes` are the plain tensor's."""

    encoding: Encoding


def is_eight_bit(entry: TensorEntry) -> bool:
    """Whether `entry` is a matrix in E4M3 whose tensors say by themselves which scale a code has."""
    if not isinstance(entry, QuantisedEntry) or set(entry.encoding.parts) != {"codes", "scales"}:
        return False
    codes, scales = (entry.encoding.parts[role] for role in ("codes", "scales"))
    counts = zip(codes.shape, (*scales.shape, 1, 1)[: len(codes.shape)], strict=True)
    fits = len(codes.shape) == 2 and all(length % max(count, 1) == 0 for length, count in counts)
    return fits and codes.dtype == "F8_E4M3" and codes.name == entry.name and not entry.encoding.obstacle


def group_of(entry: TensorEntry) -> int:
    """Columns that share a scale in a matrix that `is_eight_bit`."""
    assert isinstance(entry, QuantisedEntry), f"{entry.name} is plain"
    return entry.encoding.rows.group


def quantisation_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, or of its text part; None if there is none."""
    for part in (config, config.get("text_config")):
        for key in CONFIG_KEYS:
            if isinstance(part, dict) and isinstance(part.get(key), dict):
                return dict(part[key])
    return None


def check_quantisation(config: Mapping[str, Any], where: str) -> None:
    """Refuse a quantisation that the tensors alone do not define. Raises UnsupportedFamilyError."""
    for key in CONFIG_KEYS:
        if not isinstance(config.get(key), dict | None):
            raise UnsupportedFamilyError(
                f"{where}: {key} in config.json is {config[key]!r}, wanted an object: use the model's own config.json"
            )
    quantisation = quantisation_of(config) or {}
    method = quantisation.get("quant_method", METHODS[0])
    beside = next((key for key in ("transform_config", "sparsity_config") if quantisation.get(key)), None)
    if method not in METHODS or beside:
        told = f"{method} with a {beside}" if beside else method
        raise UnsupportedFamilyError(
            f"{where} is quantised ({told}); taken are plain dtypes and {TAKEN}: use such a release of the model, "
            "or its bfloat16 one"
        )


def plain_tensors(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """`tensors` with every quantised tensor replaced by its plain tensor, and without scales.

    Raises CheckpointError; see `encodings_of`.
    """
    encodings, replaced = encodings_of(tensors, quantisation_of(config) or {})
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    plain = {name: entry for name, entry in tensors.items() if name not in replaced}
    for name, encoding in encodings.items():
        codes = encoding.parts["codes"]
        size = math.prod(encoding.shape) * DTYPE_BYTES[dtype]
        plain[name] = QuantisedEntry(name, codes.path, dtype, encoding.shape, codes.offset, size, encoding)
    return plain


def piece_of(entry: TensorEntry, part: int = 0, num_parts: int = 1) -> Piece:
    """The bytes of `entry`, or of the part `part` of its first axis cut into `num_parts` equal parts."""
    num_bytes = entry.bytes // num_parts
    if isinstance(entry, QuantisedEntry):
        return ConvertedPiece(num_bytes, partial(_dequantised_bytes, entry, part, num_parts))
    return CopiedPiece(entry, entry.offset + part * num_bytes, num_bytes)


def read_part(entry: TensorEntry, part: int = 0, num_parts: int = 1) -> Tensor:
    """The same as a tensor in host memory, [first axis / num_parts, ...]."""
    import torch

    if isinstance(entry, QuantisedEntry):
        return _dequantised(entry, part, num_parts)
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    dtypes |= {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    dtypes |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    num_bytes = entry.bytes // num_parts
    memory = read_bytes(entry, entry.offset + part * num_bytes, num_bytes)
    shape = (entry.shape[0] // num_parts, *entry.shape[1:]) if entry.shape else ()
    return torch.frombuffer(memory, dtype=dtypes[entry.dtype]).view(shape)


def rows_of(entry: TensorEntry, part: int = 0, num_parts: int = 1) -> ConvertedPiece:
    """The encoded rows of `entry`, which is quantised, or of one of `num_parts` experts in it."""
    assert isinstance(entry, QuantisedEntry), f"{entry.name} is plain"
    num_rows, columns = entry.encoding.matrix
    num_bytes = num_rows * entry.encoding.rows.row_bytes(columns)
    return ConvertedPiece(num_bytes, partial(_row_bytes, entry, part, num_parts))


def _row_bytes(entry: QuantisedEntry, part: int, num_parts: int) -> memoryview:
    return _bytes_of(_of_part(entry, entry.encoding.pack, part, num_parts))


def _dequantised_bytes(entry: QuantisedEntry, part: int, num_parts: int) -> memoryview:
    return _bytes_of(_dequantised(entry, part, num_parts))


def _dequantised(entry: QuantisedEntry, part: int, num_parts: int) -> Tensor:
    import torch

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[entry.dtype]
    return _of_part(entry, entry.encoding.decode, part, num_parts).to(dtype)


def _of_part(
    entry: QuantisedEntry, convert: Callable[[Mapping[str, Tensor]], Tensor], part: int, num_parts: int
) -> Tensor:
    """The part `part` of the first axis of what `convert` makes of the tensors that `entry` is stored as."""
    stored = entry.encoding.parts
    experts = entry.shape[0] if len(entry.shape) == 3 else 1  # experts in one tensor are converted apart
    apart = num_parts if num_parts > 1 and all(p.shape[:1] == (experts,) for p in stored.values()) else 1
    converted = convert({role: read_part(one, part if apart > 1 else 0, apart) for role, one in stored.items()})
    return converted if apart == num_parts else converted.chunk(num_parts)[part]


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
