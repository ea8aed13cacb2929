"""The products of a decode step that every token passes, for one token or for more, and how its kernels are launched.

One token's product holds whole weight rows and takes the norm along; for more the norm is a kernel of its own, or part
of the one before. Invariant: compiling goes through the same call as launching, so what is compiled is what runs.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from server.model.device.kernels import trunk
from server.model.device.step.options import StepOptions, divisor, pow2
from server.model.device.step.weights import DecodeShape, MlpWeights

MOST_ROW_ELEMENTS = 16 << 10
"""Weights of whole rows that one program of a product for one token holds in registers."""


class Products:
    """Launches of a step for `batch` entries.

    Attributes:
        compiles: kernels are compiled instead of launched.
    """

    def __init__(self, shape: DecodeShape, batch: int, options: StepOptions) -> None:
        self._shape, self._batch, self._options = shape, batch, options
        self.compiles = False

    def run(self, stage: str, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launches a kernel unless its stage is left out."""
        if stage in self._options.skip:
            return
        if self._options.pdl:
            constants["launch_pdl"] = True
        if self.compiles:
            kernel.warmup(*args, grid=grid, PDL=self._options.pdl, **constants)
        else:
            kernel[grid](*args, PDL=self._options.pdl, **constants)

    def dense(
        self, stage: str, x: Tensor, norm: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        out: Tensor, rows: int,
    ) -> None:  # fmt: skip
        """out = norm(x) · weightᵀ + bias + residual; the norm is applied here only for a single token."""
        num_rows, width = weight.shape
        tuning = self._options.tuning
        if self._batch == 1:
            rows = max(1, min(rows, MOST_ROW_ELEMENTS // pow2(width)))
            self.run(
                stage, trunk.gemv, (triton.cdiv(num_rows, rows),),
                x, x if norm is None else norm, weight, x if bias is None else bias,
                x if residual is None else residual,
                out, self._shape.eps, num_rows, K=width, KP=pow2(width), BN=rows, NORM=norm is not None,
                BIAS=bias is not None, RESIDUAL=residual is not None, num_warps=tuning.gemv_warps,
            )  # fmt: skip
            return
        tile = tuning.gemm_rows if num_rows >= 8192 or num_rows >= 132 * tuning.gemm_rows else 16
        self.run(
            stage, trunk.gemm, (triton.cdiv(num_rows, tile),),
            x, weight, x if bias is None else bias, x if residual is None else residual, out, num_rows,
            B=self._batch, BP=max(16, pow2(self._batch)), K=width, BN=tile, BK=divisor(width, tuning.gemm_columns),
            BIAS=bias is not None, RESIDUAL=residual is not None,
            num_warps=4 if tile >= 32 else 2, num_stages=tuning.gemm_stages,
        )  # fmt: skip

    def gated(
        self, stage: str, mlp: MlpWeights, x: Tensor, norm: Tensor, normed: Tensor, inner: Tensor
    ) -> Tensor:  # fmt: skip
        """silu(gate · y) * (up · y) [B, I], a view of `inner`; y is norm(x) for a single token, else `normed`."""
        num_rows, width = mlp.up.shape[0] // 2, mlp.up.shape[1]
        out = inner.view(-1)[: self._batch * num_rows].view(self._batch, num_rows)
        tuning = self._options.tuning
        if self._batch == 1:
            rows = max(1, min(tuning.up_rows, MOST_ROW_ELEMENTS // 2 // pow2(width)))
            self.run(
                stage, trunk.gated_gemv, (triton.cdiv(num_rows, rows),),
                x, norm, mlp.up, out, self._shape.eps, num_rows,
                K=width, KP=pow2(width), BN=rows, NORM=True, num_warps=tuning.gemv_warps,
            )  # fmt: skip
            return out
        self.run(
            stage, trunk.gated_gemm, (triton.cdiv(num_rows, 16),),
            normed, mlp.up, out, num_rows,
            B=self._batch, BP=max(16, pow2(self._batch)), K=width, BN=16, BK=divisor(width, tuning.gemm_columns),
            num_warps=2, num_stages=tuning.expert_stages,
        )  # fmt: skip
        return out

    def norm_rows(self, x: Tensor, norm: Tensor, normed: Tensor) -> None:
        """normed = norm(x) for more tokens than one, whose products do not take it along."""
        if self._batch > 1:
            self.run(
                "dense", trunk.norm_rows, (self._batch,), x, norm, normed, self._shape.eps,
                H=self._shape.hidden, HP=pow2(self._shape.hidden), num_warps=8,
            )  # fmt: skip
