"""Encoded rows: their bytes, the way there and back, and the values that they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_store.encoding import CODE_BITS, RowEncoding
from expert_store.rows import E2M1, FIELD_DTYPES, RowFields, decode_rows, pack_rows, unpack_rows

ENCODINGS = {
    "fp8 by row": RowEncoding("fp8", 64, "F32"),
    "fp8 in blocks": RowEncoding("fp8", 32, "F32"),
    "mxfp4": RowEncoding("fp4", 32, "F8_E8M0"),
    "nvfp4, modelopt": RowEncoding("fp4", 16, "F8_E4M3", overall="factor"),
    "nvfp4, compressed-tensors": RowEncoding("fp4", 16, "F8_E4M3", overall="divisor"),
    "int4": RowEncoding("int4", 32, "F16", zeros="U8"),
    "int4, symmetric": RowEncoding("int4", 64, "BF16"),
    "int8": RowEncoding("int8", 32, "BF16", zeros="I16"),
}


def fields_of(encoding: RowEncoding, rows: int, columns: int, seed: int = 0) -> RowFields:
    """Random numbers of a matrix, without NaN."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // encoding.group
    most = 1 << CODE_BITS[encoding.codes]
    codes = torch.randint(0, most, (rows, columns), generator=generator, dtype=torch.uint8)
    if encoding.codes == "fp8":
        codes[(codes & 127) == 127] = 0
    if encoding.scales == "F8_E8M0":
        scales = torch.randint(120, 131, (rows, groups), generator=generator, dtype=torch.uint8)
    else:
        scales = (0.01 + torch.rand(rows, groups, generator=generator)).to(FIELD_DTYPES[encoding.scales])
    zeros = None
    if encoding.zeros is not None:
        zeros = torch.randint(0, most + 1, (rows, groups), generator=generator).to(FIELD_DTYPES[encoding.zeros])
    overall = 0.5 + torch.rand(rows, generator=generator) if encoding.overall else None
    return RowFields(codes, scales, zeros, overall)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 1000))
def test_rows_give_back_the_numbers_they_were_packed_from(
    encoding: RowEncoding, rows: int, groups: int, seed: int
) -> None:
    columns = 64 * groups
    fields = fields_of(encoding, rows, columns, seed)
    packed = pack_rows(encoding, fields)
    assert packed.shape == (rows, encoding.row_bytes(columns))
    assert encoding.row_bytes(columns) % 16 == 0
    again = unpack_rows(encoding, columns, packed)
    for name in ("codes", "scales", "zeros", "overall"):
        wanted, got = getattr(fields, name), getattr(again, name)
        assert (wanted is None) == (got is None)
        assert wanted is None or (wanted.dtype == got.dtype and torch.equal(wanted.float(), got.float()))


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_values_are_code_less_zero_point_times_scale(encoding: RowEncoding) -> None:
    fields = fields_of(encoding, 3, 64)
    values = decode_rows(encoding, 64, pack_rows(encoding, fields))
    for row in range(3):
        for column in range(64):
            code, group = int(fields.codes[row, column]), column // encoding.group
            scale = fields.scales[row, group].float()
            if encoding.scales == "F8_E8M0":
                scale = torch.tensor(2.0 ** (int(scale) - 127))
            if fields.overall is not None:
                overall = fields.overall[row]
                scale = scale * overall if encoding.overall == "factor" else scale / overall
            if encoding.codes == "fp8":
                number = float(torch.tensor([code], dtype=torch.uint8).view(torch.float8_e4m3fn).float())
            elif encoding.codes == "fp4":
                number = E2M1[code]
            else:
                number = code - (encoding.middle if fields.zeros is None else int(fields.zeros[row, group]))
            assert float(values[row, column]) == float(torch.tensor(float(number)) * scale)


def test_a_row_is_as_long_as_the_documentation_says() -> None:
    assert RowEncoding("int4", 64, "F16", zeros="U8").row_bytes(2048) == 1024 + 64 + 32
    assert RowEncoding("fp4", 32, "F8_E8M0").bits(2048) == pytest.approx(4.25)
    assert RowEncoding("fp8", 128, "F32").bits(2048) == pytest.approx(8.25)


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 96 columns in groups of 64"):
        RowEncoding("int4", 64, "F16").row_bytes(96)


def test_numbers_of_another_encoding_are_refused() -> None:
    fields = fields_of(ENCODINGS["int4"], 2, 64)
    with pytest.raises(ValueError, match=r"zeros of .* is None, wanted torch\.uint8"):
        pack_rows(ENCODINGS["int4"], RowFields(fields.codes, fields.scales))
