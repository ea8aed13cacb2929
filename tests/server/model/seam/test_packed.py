"""Products with encoded rows: exact values, sums in float32, and rows that do not depend on one another."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from expert_store.encoding import RowEncoding
from expert_store.rows import decode_rows, pack_rows
from server.model.seam import packed, row_kernels
from server.model.seam.packed import packed_products
from server.model.seam.row_kernels import Run
from tests.expert_store.test_rows import ENCODINGS, fields_of

ODD = {
    "fp8 in the smallest groups": RowEncoding("fp8", 8, "BF16"),
    "nvfp4 in groups of 24": RowEncoding("fp4", 24, "F8_E4M3", overall="factor"),
    "int4 with wide zero points": RowEncoding("int4", 192, "F32", zeros="I16"),
    "int8 by row": RowEncoding("int8", 384, "F16"),
}
COLUMNS, OUTPUTS = 384, 77  # all groups divide the columns; the outputs are no whole chunks


def matrix_of(encoding: RowEncoding, seed: int = 0) -> Tensor:
    return pack_rows(encoding, fields_of(encoding, OUTPUTS, COLUMNS, seed))


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, matrix: Tensor, encoding: RowEncoding, *, apart: bool) -> Tensor:
    out = x.new_full((len(x), OUTPUTS), torch.nan)
    packed_products(x, [matrix], encoding, [Run(0, 0, len(x), 0)], out, apart=apart)
    return out


def kernels_of(encoding: RowEncoding) -> row_kernels.RowKernels:
    kernels = row_kernels.row_kernels(encoding, COLUMNS)
    if kernels is None:
        pytest.skip("this processor has no vectors of the kernels' kind")
    return kernels


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("encoding", [*ENCODINGS.values(), *ODD.values()], ids=[*ENCODINGS, *ODD])
def test_kernels_have_the_values_of_the_rows_bit_for_bit(encoding: RowEncoding) -> None:
    matrix = matrix_of(encoding)
    wanted = decode_rows(encoding, COLUMNS, matrix)
    assert torch.equal(kernels_of(encoding).decode(matrix), wanted)
    x = inputs(3)
    exact = x.double() @ wanted.double().t()
    for apart in (False, True):
        error = (product(x, matrix, encoding, apart=apart).double() - exact).abs().max() / exact.abs().max()
        assert float(error) < 1e-6


def test_every_code_of_eight_bits_has_its_value() -> None:
    encoding = RowEncoding("fp8", 8, "F32")
    fields = fields_of(encoding, 1, 256)
    fields.codes[0] = torch.arange(256)
    fields.codes[0, [127, 255]] = 0  # not a number
    matrix = pack_rows(encoding, fields)
    kernels = row_kernels.row_kernels(encoding, 256)
    assert kernels is None or torch.equal(kernels.decode(matrix), decode_rows(encoding, 256, matrix))


@pytest.mark.parametrize("exponent", [0, 1, 127, 240])
def test_scales_that_are_powers_of_two_reach_from_the_least_to_the_largest(exponent: int) -> None:
    encoding = ENCODINGS["mxfp4"]
    fields = fields_of(encoding, OUTPUTS, COLUMNS)
    fields.scales.fill_(exponent)
    matrix = pack_rows(encoding, fields)
    assert torch.equal(kernels_of(encoding).decode(matrix), decode_rows(encoding, COLUMNS, matrix))


@pytest.mark.parametrize("name", ["int4", "fp8 in blocks"])
def test_a_row_has_the_same_bits_alone_and_beside_others_whatever_the_threads(name: str, four_threads: None) -> None:
    encoding = ENCODINGS[name]
    matrix, x = matrix_of(encoding), inputs(20)
    together = product(x, matrix, encoding, apart=True)
    torch.set_num_threads(1)
    for at in range(20):
        assert torch.equal(product(x[at : at + 1], matrix, encoding, apart=True)[0], together[at])


@pytest.mark.parametrize("name", ["int4", "nvfp4, modelopt"])
def test_many_rows_agree_with_few(name: str) -> None:
    encoding = ENCODINGS[name]
    matrix, x = matrix_of(encoding), inputs(40)
    together, apart = (product(x, matrix, encoding, apart=each) for each in (False, True))
    assert not together.isnan().any()
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-3)


def test_a_product_is_rounded_once() -> None:
    encoding = ENCODINGS["int4"]
    matrix, x = matrix_of(encoding), inputs(5).bfloat16()
    got = product(x, matrix, encoding, apart=True)
    assert torch.equal(got, product(x.float(), matrix, encoding, apart=True).bfloat16())


@pytest.mark.parametrize("apart", [False, True])
def test_runs_read_and_write_their_own_rows_with_their_own_matrix(apart: bool) -> None:
    encoding = ENCODINGS["int8"]
    matrices, x = [matrix_of(encoding, seed) for seed in range(3)], inputs(30)
    runs = [Run(2, 20, 3, 2), Run(10, 0, 12, 0), Run(9, 12, 1, 1)]
    out = torch.full((25, OUTPUTS), -1.0)
    packed_products(x, matrices, encoding, runs, out, apart=apart)
    wanted = torch.full((25, OUTPUTS), -1.0)
    for start, to, num_rows, slot in runs:
        values = decode_rows(encoding, COLUMNS, matrices[slot])
        wanted[to : to + num_rows] = x[start : start + num_rows] @ values.t()
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("apart", [False, True])
def test_a_machine_without_kernels_decodes_the_rows_and_agrees(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = ENCODINGS["mxfp4"]
    matrix, x = matrix_of(encoding), inputs(11)
    wanted = product(x, matrix, encoding, apart=apart)
    monkeypatch.setattr(packed, "kernels_for", lambda *_: None)
    monkeypatch.setattr(packed, "BLOCK_BYTES", 4 * COLUMNS * 10)  # several blocks of rows, the last one smaller
    assert torch.allclose(product(x, matrix, encoding, apart=apart), wanted, rtol=1e-4, atol=1e-3)


def test_without_openmp_a_kernel_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch, four_threads: None) -> None:
    encoding = ENCODINGS["int4"]
    matrix, x = matrix_of(encoding), inputs(2)
    wanted = product(x, matrix, encoding, apart=True)
    monkeypatch.setattr(row_kernels, "_parallel", None)
    assert torch.equal(product(x, matrix, encoding, apart=True), wanted)


def test_a_processor_without_the_vectors_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels.binding, "get_host_cpu_features", dict)
    monkeypatch.setattr(row_kernels.binding, "get_process_triple", lambda: "x86_64-unknown-linux-gnu")
    assert row_kernels.row_kernels.__wrapped__(ENCODINGS["int4"], COLUMNS) is None
