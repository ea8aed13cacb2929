"""Quantises a matrix: for every group of columns the scale and zero point of least squared error.

An error counts as much as calibration saw of its input channel (`importance`), or the same everywhere. The search tries
a few ranges for each group, fits the scale of the best to its codes by least squares, and keeps the result if it is
better. Invariant: the numbers depend on the arguments alone, on any machine and for any number of threads. All
arithmetic is numpy's elementwise float32 (IEEE: one rounding each, one thread), and sums are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.encoding import CODE_BITS, RowEncoding
from expert_store.rows import E2M1, FIELD_DTYPES, RowFields

Float = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 15
"""Values that are quantised together: with the arrays beside them they stay in a core's cache."""
NUM_FITS = 2
"""Times that a scale is fitted to its codes."""
_SMALLEST = {"F32": 2.0**-100, "BF16": 2.0**-100, "F16": 2.0**-24, "F8_E4M3": 2.0**-9, "F8_E8M0": 2.0**-100}
"""Scales of groups of zeros; no number becomes so small that a processor may take it for 0."""
_LARGEST = {"F32": 2.0**100, "BF16": 2.0**100, "F16": 65504.0, "F8_E4M3": 448.0, "F8_E8M0": 2.0**100}
_MANTISSA_BITS = {"fp8": (3, -6), "fp4": (1, 0)}
"""Bits of the mantissa, and the least exponent with all of them."""
_MOST = {"fp8": 448.0, "fp4": 6.0}
_RATIOS = {
    "int4": (1.0, 0.94, 0.88, 0.82, 0.75),
    "int8": (1.0, 0.97),
    "fp8": (1.0, 1.15, 1.32, 1.52, 1.74),
    "fp4": (1.5, 1.33, 1.17, 1.08, 1.0, 0.93, 0.86, 0.79),
}
"""Ranges to try, as shares of the largest value in a group."""
_POWERS = (1.0, 2.0)
"""The same where scales are powers of two, which are rounded down."""


def quantise(matrix: Tensor, encoding: RowEncoding, importance: npt.NDArray[np.floating] | None = None) -> RowFields:
    """The numbers of `matrix` in an encoding.

    Args:
        matrix: [O, N] of a floating point dtype, in host memory.
        encoding: with whole groups in N columns; zero points, if any, are U8 and an overall scale is a factor.
        importance: [N], not negative: the weight of a squared error in each column; None weighs all alike.

    Raises:
        ValueError: the encoding does not fit the matrix or cannot be made, the matrix has values that are not finite,
            or the importance has another length.
    """
    num_rows, columns = matrix.shape
    encoding.fields(columns)
    if encoding.zeros not in (None, "U8") or encoding.overall == "divisor":
        raise ValueError(f"{encoding} cannot be made: wanted zero points of U8, or none, and no divisor")
    weight = None if importance is None else _weights(importance, columns, encoding.group)
    codes = np.empty((num_rows, columns), dtype=np.uint8)
    scales = np.empty((num_rows, columns // encoding.group), dtype=np.float32)
    zeros = np.empty_like(scales)
    overall = None
    values = matrix.float().numpy()
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    if encoding.overall is not None:
        largest = np.abs(values).max(axis=1) / np.float32(_MOST[encoding.codes] * _LARGEST[encoding.scales])
        overall = np.maximum(largest, np.float32(_SMALLEST["F32"]))
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        factor = None if overall is None else np.repeat(overall[rows], scales.shape[1])
        groups = _Groups(encoding, values[rows], weight, factor)
        scale, zero = groups.best()
        codes[rows] = groups.codes(scale, zero).reshape(-1, columns)
        scales[rows], zeros[rows] = scale.reshape(-1, scales.shape[1]), zero.reshape(-1, scales.shape[1])
    return RowFields(
        torch.from_numpy(codes),
        _stored(scales, encoding.scales),
        None if encoding.zeros is None else torch.from_numpy(zeros.astype(np.uint8)),
        None if overall is None else torch.from_numpy(overall),
    )


def _weights(importance: npt.NDArray[np.floating], columns: int, group: int) -> Float:
    """Relative weights of a row's columns, [group, groups], the largest 1."""
    if importance.shape != (columns,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"the importance has shape {importance.shape}, wanted {columns} finite numbers from 0 on")
    relative = (importance / max(float(importance.max()), 1e-300)).astype(np.float32)
    return np.ascontiguousarray(np.maximum(relative, np.float32(1e-6)).reshape(-1, group).T)


def _stored(scales: Float, dtype: str) -> Tensor:
    if dtype == "F8_E8M0":
        return torch.from_numpy((np.frexp(scales)[1] + 126).astype(np.uint8))
    return torch.from_numpy(scales).to(FIELD_DTYPES[dtype])


@dataclass
class _Best:
    error: Float
    scale: Float
    zero: Float


class _Groups:
    """G groups of some rows of a matrix, as columns [group, G], so that arithmetic runs over groups side by side.

    Args:
        values: [rows, N].
        weight: [group, N / group] of each row's columns, or None.
        overall: [G], the factor of the stored scales, or None.
    """

    def __init__(self, encoding: RowEncoding, values: Float, weight: Float | None, overall: Float | None) -> None:
        self._encoding, self._overall = encoding, overall
        self._x = np.ascontiguousarray(values.reshape(-1, encoding.group).T)
        self._weight = None if weight is None else np.tile(weight, (1, len(values)))
        self._y, self._bits = np.empty_like(self._x), np.empty(self._x.shape, dtype=np.int32)
        self._most = (1 << CODE_BITS[encoding.codes]) - 1
        self._is_float = encoding.codes in _MOST

    def best(self) -> tuple[Float, Float]:
        """Stored scales and zero points of least error, float32 [G] each."""
        best: _Best | None = None
        for scale, zero in self._candidates():
            best = self._better(best, scale, zero)
        assert best is not None
        if self._encoding.scales in ("F32", "F16", "BF16"):
            for _ in range(NUM_FITS):
                best = self._better(best, self._storable(self._fitted(best.scale, best.zero)), best.zero)
        return best.scale, best.zero

    def codes(self, scale: Float, zero: Float) -> npt.NDArray[np.uint8]:
        """uint8 [G, group]."""
        y = self._rounded(scale, zero)
        if self._encoding.codes == "fp8":
            return torch.from_numpy(y.T.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if self._encoding.codes == "fp4":
            table = np.zeros(13, dtype=np.uint8)
            table[[round(2 * value) for value in E2M1[:8]]] = range(8)
            return np.asarray(table[np.abs(2 * y).astype(np.intp)] | (np.signbit(y) << 3).astype(np.uint8)).T
        return (y + zero).astype(np.uint8).T

    def _candidates(self) -> Iterator[tuple[Float, Float]]:
        low, high = np.minimum(self._x.min(axis=0), 0), np.maximum(self._x.max(axis=0), 0)
        middle = np.full_like(low, self._encoding.middle)
        for number in _POWERS if self._encoding.scales == "F8_E8M0" else _RATIOS[self._encoding.codes]:
            ratio = np.float32(number)
            if self._encoding.zeros is not None:
                scale = self._storable((high - low) * ratio / np.float32(self._most))
                yield scale, np.clip(np.rint(-low * ratio / scale), 0, self._most)
            else:
                most = _MOST[self._encoding.codes] if self._is_float else self._encoding.middle - 1
                yield self._storable(np.maximum(high, -low) * ratio / np.float32(most)), middle

    def _storable(self, scale: Float) -> Float:
        """The scales that the encoding can store nearest to `scale`, without the overall factor."""
        dtype = self._encoding.scales
        if self._overall is not None:
            scale = scale / self._overall
        scale = np.clip(scale, np.float32(_SMALLEST[dtype]), np.float32(_LARGEST[dtype]))
        if dtype == "F8_E8M0":
            return np.asarray(np.ldexp(np.float32(1), np.frexp(scale)[1] - 1))
        return np.asarray(torch.from_numpy(scale).to(FIELD_DTYPES[dtype]).float().numpy())

    def _rounded(self, scale: Float, zero: Float) -> Float:
        """Codes less their zero points, or the values of floating point codes, [group, G]; in the buffer `_y`."""
        y = self._y
        if self._overall is not None:
            scale = scale * self._overall
        np.multiply(self._x, np.float32(1) / scale, out=y)
        if not self._is_float:
            np.rint(y, out=y)
            np.maximum(y, -zero, out=y)
            return np.minimum(y, self._most - zero, out=y)
        most, (bits, least) = np.float32(_MOST[self._encoding.codes]), _MANTISSA_BITS[self._encoding.codes]
        np.minimum(np.maximum(y, -most, out=y), most, out=y)
        # adding 1.5 · 2^(23 - bits) times a number's power of two leaves no room for more bits, so the sum is rounded
        magic = np.bitwise_and(y.view(np.int32), 0x7F800000, out=self._bits).view(np.float32)
        np.maximum(magic, np.float32(2.0**least), out=magic)
        magic *= np.float32(1.5 * 2.0 ** (23 - bits))
        y += magic
        y -= magic
        return y

    def _better(self, best: _Best | None, scale: Float, zero: Float) -> _Best:
        y = self._rounded(scale, zero)
        y *= scale if self._overall is None else scale * self._overall
        y -= self._x
        y *= y
        if self._weight is not None:
            y *= self._weight
        error = _sum(y)
        if best is None:
            return _Best(error, scale, zero)
        is_better = error < best.error
        chosen = ((error, best.error), (scale, best.scale), (zero, best.zero))
        return _Best(*(np.where(is_better, new, old) for new, old in chosen))

    def _fitted(self, scale: Float, zero: Float) -> Float:
        """The scale of least error for the codes that `scale` gives; where all codes are 0, `scale`."""
        y = self._rounded(scale, zero)
        weighted = y if self._weight is None else y * self._weight
        above, below = _sum(weighted * self._x), _sum(weighted * y)
        return np.divide(above, below, out=scale.copy(), where=(below > 0) & (above > 0))


def _sum(values: Float) -> Float:
    """Sums over the first axis, in an order that depends on its length alone; changes `values`."""
    count = len(values)
    while count > 1:
        half = count // 2
        values[:half] += values[count - half : count]
        count -= half
    return np.array(values[0])
