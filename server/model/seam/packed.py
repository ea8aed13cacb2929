"""Products with encoded rows: experts are multiplied in the bytes that their slots hold.

Invariant: a product has the exact float32 values of the rows, adds in float32, and is rounded once, to its output's
dtype. On a CPU the kernels of `row_kernels` do it; elsewhere the values are decoded and multiplied by torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expert_store.encoding import RowEncoding
from expert_store.rows import decode_rows
from server.model.seam.row_kernels import RowKernels, Run, row_kernels

FEW_ROWS = 8
"""Up to so many rows of a prompt are multiplied as a decode step's; more have the values decoded once for all."""
BLOCK_BYTES = 2 << 20
"""So many bytes of values are decoded at a time on a CPU, to be multiplied while they are in its cache."""


def kernels_for(encoding: RowEncoding, columns: int, device: torch.device) -> RowKernels | None:
    """The kernels that `packed_products` uses on a device, compiled on the first call; None where torch does it all."""
    return row_kernels(encoding, columns) if device.type == "cpu" else None


def packed_products(
    x: Tensor, rows: Sequence[Tensor], encoding: RowEncoding, runs: Sequence[Run], out: Tensor, *, apart: bool
) -> None:
    """Multiply each run's rows of x [.., N] by the matrix of its slot, and write them into out [.., O].

    Args:
        rows: for each slot its encoded matrix, uint8 [O, row bytes], contiguous.
        apart: a row of `out` must have the bits that it has alone.
    """
    first, end = min(run.to for run in runs), max(run.to + run.num_rows for run in runs)
    runs = [run._replace(to=run.to - first) for run in runs]
    factors = x.float().contiguous()
    sums = torch.empty(end - first, out.shape[1], dtype=torch.float32, device=x.device)
    kernels = kernels_for(encoding, x.shape[1], x.device)
    few: list[Run] = []
    for run in runs:
        if kernels is not None and (apart or run.num_rows <= FEW_ROWS):
            few.append(run)
            continue
        inputs, outputs = factors[run.start : run.start + run.num_rows], sums[run.to : run.to + run.num_rows]
        _decode_and_multiply(inputs, rows[run.slot], encoding, kernels, outputs, apart)
    if kernels is not None and few:
        kernels.multiply(factors, rows, few, sums)
    if sum(run.num_rows for run in runs) == end - first:
        out[first:end] = sums
        return
    for run in runs:
        at = slice(run.to, run.to + run.num_rows)
        out[first:end][at] = sums[at]


def _decode_and_multiply(
    x: Tensor, matrix: Tensor, encoding: RowEncoding, kernels: RowKernels | None, out: Tensor, apart: bool
) -> None:
    columns = x.shape[1]
    block = max(1, BLOCK_BYTES // (4 * columns)) if x.device.type == "cpu" else len(matrix)
    for start in range(0, len(matrix), block):
        rows = matrix[start : start + block]
        values = decode_rows(encoding, columns, rows) if kernels is None else kernels.decode(rows)
        part = out[:, start : start + block]
        if apart or len(x) == 1:
            for row, result in zip(x, part, strict=True):
                torch.mv(values, row, out=result)
        else:
            torch.mm(x, values.t(), out=part)
