import hashlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import extractor.encoding.quantise as module
from expert_store.encoding import RowEncoding
from expert_store.rows import decode_rows, pack_rows
from extractor.encoding.quantise import quantise

ENCODINGS = {
    "fp8": RowEncoding("fp8", 128, "F32"),
    "int8": RowEncoding("int8", 128, "F16"),
    "int4": RowEncoding("int4", 32, "F16", zeros="U8"),
    "int4-symmetric": RowEncoding("int4", 64, "BF16"),
    "mxfp4": RowEncoding("fp4", 32, "F8_E8M0"),
    "nvfp4": RowEncoding("fp4", 16, "F8_E4M3", overall="factor"),
}
MOST_ERROR = {"fp8": 0.025, "int8": 0.008, "int4": 0.08, "int4-symmetric": 0.11, "mxfp4": 0.12, "nvfp4": 0.09}
"""Relative error, root mean square, of normally distributed values. The theory's bounds for uniform steps are near."""


def matrix(rows: int = 48, columns: int = 256, seed: int = 0) -> Tensor:
    """Nearly normal values from sums of integers, so that every machine draws the same, with rows of unlike size."""
    drawn = np.random.default_rng(seed).integers(-1024, 1024, (8, rows, columns)).sum(axis=0)
    sizes = np.array([2.0 ** -(row % 7) for row in range(rows)])[:, None]
    return torch.from_numpy((drawn * sizes / 2**15).astype(np.float32)).bfloat16()


def rows_of(values: Tensor, encoding: RowEncoding, importance: np.ndarray | None = None) -> Tensor:
    return pack_rows(encoding, quantise(values, encoding, importance))


def decoded(values: Tensor, encoding: RowEncoding, importance: np.ndarray | None = None) -> Tensor:
    return decode_rows(encoding, values.shape[1], rows_of(values, encoding, importance))


def relative_error(values: Tensor, encoding: RowEncoding) -> float:
    return float((decoded(values, encoding) - values.float()).norm() / values.float().norm())


@pytest.mark.parametrize("name", ENCODINGS)
def test_values_are_near_the_matrix_in_every_encoding(name: str) -> None:
    assert relative_error(matrix(), ENCODINGS[name]) < MOST_ERROR[name]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("fp8", "a56520935a37d998"),
        ("int8", "8fa95844fdbdf3a0"),
        ("int4", "c87138570b5a2144"),
        ("int4-symmetric", "52f140ba44ee2b02"),
        ("mxfp4", "da5c5e24bf3fda42"),
        ("nvfp4", "377e5268537eaa20"),
    ],
)
def test_the_bits_are_the_same_on_every_machine(name: str, digest: str) -> None:
    weights = (np.arange(256) % 7 + 1.0) ** 2
    content = rows_of(matrix(), ENCODINGS[name]), rows_of(matrix(), ENCODINGS[name], weights)
    assert hashlib.sha256(b"".join(rows.numpy().tobytes() for rows in content)).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_bits_depend_neither_on_threads_nor_on_what_is_quantised_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, threads = matrix(), torch.get_num_threads()
    whole = rows_of(values, ENCODINGS[name])
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(rows_of(values, ENCODINGS[name]), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 512)
    assert torch.equal(rows_of(values, ENCODINGS[name]), whole)
    assert torch.equal(rows_of(values[5:9], ENCODINGS[name]), whole[5:9])


def least_errors(values: Tensor, encoding: RowEncoding) -> np.ndarray:
    """The least squared error of each group [G] over all scales and zero points on a fine grid, in float64."""
    x = values.double().numpy().reshape(-1, encoding.group)
    span = x.max(axis=1) - x.min(axis=1)
    best = np.full(len(x), np.inf)
    for ratio, zero in product(np.linspace(0.6, 1.1, 51), range(16)):
        scale = (span * ratio / 15)[:, None]
        codes = np.clip(np.rint(x / scale) + zero, 0, 15)
        best = np.minimum(best, np.square(x - (codes - zero) * scale).sum(axis=1))
    return best


def test_the_search_is_near_the_best_scales_and_zero_points_that_exist() -> None:
    values, encoding = matrix(rows=16), ENCODINGS["int4"]
    own = (decoded(values, encoding).double() - values.double()).square().view(-1, encoding.group).sum(dim=1).numpy()
    plain = replace(encoding, zeros=None)
    assert own.sum() < 1.06 * least_errors(values, encoding).sum()
    assert relative_error(values, encoding) < 0.95 * relative_error(values, plain)


@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in ("fp8", "int8")])
def test_columns_that_matter_more_come_out_nearer(name: str) -> None:
    values, weights = matrix(), np.where(np.arange(256) % 8 == 0, 100.0, 1.0)

    def error(importance: np.ndarray | None) -> tuple[float, float]:
        squares = np.square(decoded(values, ENCODINGS[name], importance).numpy() - values.float().numpy())
        return float((squares * weights).sum()), float(squares.sum())

    assert error(weights)[0] < 0.95 * error(None)[0]
    assert error(weights)[1] > error(None)[1]
    assert torch.equal(rows_of(values, ENCODINGS[name], 1e-9 * weights), rows_of(values, ENCODINGS[name], weights))


@pytest.mark.parametrize("name", ENCODINGS)
def test_groups_of_zeros_outliers_and_one_sign_are_decoded_near(name: str) -> None:
    values = torch.zeros(4, 256)
    values[1] = 1e-30
    values[2, ::32] = 2.0**15
    values[3] = 1.0 + torch.arange(256) / 256
    found = decoded(values, ENCODINGS[name])
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert (found[1].abs() < 1e-6).all()
    assert torch.allclose(found[2], values[2], rtol=0.08)
    assert torch.allclose(found[3], values[3], rtol=0.21)


def test_values_that_the_encoding_has_are_kept_bit_for_bit() -> None:
    fp4, fp8 = ENCODINGS["mxfp4"], ENCODINGS["fp8"]
    four_bits = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6]).repeat(2, 8) * torch.tensor([1.0, -1.0]).repeat(2, 32)
    assert torch.equal(decoded(four_bits, fp4), four_bits)
    eight_bits = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    eight_bits = torch.cat((eight_bits, eight_bits[:1]))[None]
    assert torch.equal(decoded(eight_bits, fp8), eight_bits)


def test_what_cannot_be_quantised_is_told() -> None:
    encoding = ENCODINGS["int4"]
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.full((2, 32), float("nan")), encoding)
    with pytest.raises(ValueError, match="rows of 48 columns in groups of 32"):
        quantise(torch.zeros(2, 48), encoding)
    with pytest.raises(ValueError, match="no divisor"):
        quantise(torch.zeros(2, 32), replace(ENCODINGS["nvfp4"], overall="divisor"))
    with pytest.raises(ValueError, match="wanted zero points of U8"):
        quantise(torch.zeros(2, 32), replace(encoding, zeros="I16"))
    for importance in (np.ones(31), np.full(32, -1.0), np.full(32, np.nan)):
        with pytest.raises(ValueError, match="wanted 32 finite numbers"):
            quantise(torch.zeros(2, 32), encoding, importance)
