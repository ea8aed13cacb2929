"""The rows of an encoded matrix: packed from its codes and scales, read again, and decoded to values.

Invariant: `pack_rows` and `unpack_rows` are inverse to each other, so extraction loses nothing, and `decode_rows` gives
the values of the library that defines the format, before it rounds them to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expert_store.encoding import CODE_BITS, RowEncoding
from expert_store.manifest import LayerSpec

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of plain weights by their safetensors names."""
FIELD_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
    "U8": torch.uint8,
    "I16": torch.int16,
}
"""Dtypes of a row's fields by their safetensors names; exponents (E8M0) are kept as bytes."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of four-bit floating point codes."""


@dataclass(frozen=True, slots=True)
class RowFields:
    """The numbers of a matrix [O, N] in G groups a row.

    Attributes:
        codes: uint8 [O, N], one code each.
        scales: [O, G] in the encoding's dtype.
        zeros: [O, G], None if the encoding has none.
        overall: float32 [O], None if the encoding has none.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    overall: Tensor | None = None


def pack_rows(encoding: RowEncoding, fields: RowFields) -> Tensor:
    """uint8 [O, row_bytes] of a matrix's numbers. Raises ValueError if they are not those of the encoding."""
    num_rows, columns = fields.codes.shape
    codes = fields.codes
    if CODE_BITS[encoding.codes] == 4:
        codes = pack_nibbles(codes)
    values = {"codes": codes, "scales": fields.scales, "zeros": fields.zeros}
    values["overall"] = None if fields.overall is None else fields.overall[:, None]
    rows = torch.zeros(num_rows, encoding.row_bytes(columns), dtype=torch.uint8)
    for name, (at, count) in encoding.fields(columns).items():
        value = values[name]
        dtype = _dtype_of(encoding, name)
        if value is None or value.shape != (num_rows, count) or value.dtype != dtype:
            found = None if value is None else (value.dtype, tuple(value.shape))
            raise ValueError(f"{name} of {encoding} is {found}, wanted {dtype} of shape {(num_rows, count)}")
        if dtype.itemsize > 1:  # a view as bytes needs a stride of one; `contiguous` keeps another one of one column
            value = value.clone(memory_format=torch.contiguous_format)
        rows[:, at : at + count * dtype.itemsize] = value.view(torch.uint8)
    return rows


def unpack_rows(encoding: RowEncoding, columns: int, rows: Tensor) -> RowFields:
    """The numbers in `rows`, uint8 [O, row_bytes]; copies."""
    found = {}
    for name, (at, count) in encoding.fields(columns).items():
        dtype = _dtype_of(encoding, name)
        found[name] = rows[:, at : at + count * dtype.itemsize].contiguous().view(dtype)
    codes = found["codes"]
    if CODE_BITS[encoding.codes] == 4:
        codes = unpack_nibbles(codes)
    overall = found.get("overall")
    return RowFields(codes, found["scales"], found.get("zeros"), None if overall is None else overall[:, 0])


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [R, C / 2] of four-bit codes, uint8 [R, C]; of two in a byte the low nibble comes first."""
    pairs = codes.contiguous().view(torch.int16)  # whole words are much faster than every second byte
    return ((pairs >> 4) | pairs).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [R, C], the codes in `packed`, uint8 [R, C / 2]."""
    pairs = packed.to(torch.int16)
    return (((pairs << 4) | pairs) & 0x0F0F).view(torch.uint8)


def decode_rows(encoding: RowEncoding, columns: int, rows: Tensor) -> Tensor:
    """float32 [O, N], the values of `rows`, uint8 [O, row_bytes]."""
    return decode_fields(encoding, unpack_rows(encoding, columns, rows))


def scale_factors(encoding: RowEncoding, fields: RowFields) -> Tensor:
    """float32 [O, G], what the codes of each group of columns are multiplied by."""
    scales = fields.scales.float()
    if encoding.scales == "F8_E8M0":  # the byte 255 is infinite, as in the kernels and the formats' libraries
        scales = (scales - 127.0).exp2()
    if fields.overall is not None:
        scales = scales * fields.overall[:, None] if encoding.overall == "factor" else scales / fields.overall[:, None]
    return scales


def decode_fields(encoding: RowEncoding, fields: RowFields) -> Tensor:
    """float32 [O, N], the values of a matrix's numbers."""
    scales = scale_factors(encoding, fields)
    values = _code_values(encoding, fields.codes).reshape(len(scales), -1, encoding.group)
    if encoding.middle:
        zeros = encoding.middle if fields.zeros is None else fields.zeros.float().unsqueeze(-1)
        values = values - zeros
    return (values * scales.unsqueeze(-1)).flatten(1)


def span_values(layer: LayerSpec, span: Tensor) -> dict[str, Tensor]:
    """The values of an expert's tensors by name, [*shape] each; `span` is uint8 [span_bytes] in host memory.

    Encoded ones are float32, others views of `span` in their own dtype.
    """
    values = {}
    for tensor in layer.tensors:
        part = span[tensor.offset : tensor.offset + tensor.bytes]
        if tensor.encoding is None:
            values[tensor.name] = part.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
        else:
            values[tensor.name] = decode_rows(tensor.encoding, tensor.shape[1], part.view(tensor.shape[0], -1))
    return values


def plain_values(layer: LayerSpec, span: Tensor, *, transposed: bool) -> dict[str, Tensor]:
    """`span_values` in the dtype to compute in, and in the model's order of rows: encoded matrices, whose output rows
    come first, are turned if those of the model are `transposed`."""
    values = span_values(layer, span)
    for tensor in layer.tensors:
        if tensor.encoding is not None:
            value = values[tensor.name]
            values[tensor.name] = (value.t() if transposed else value).to(TORCH_DTYPES[tensor.dtype])
    return values


def _code_values(encoding: RowEncoding, codes: Tensor) -> Tensor:
    if encoding.codes == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    if encoding.codes == "fp4":
        return torch.tensor(E2M1, device=codes.device)[codes.int()]
    return codes.float()


def _dtype_of(encoding: RowEncoding, name: str) -> torch.dtype:
    if name == "codes":
        return torch.uint8
    return torch.float32 if name == "overall" else FIELD_DTYPES[getattr(encoding, name)]
