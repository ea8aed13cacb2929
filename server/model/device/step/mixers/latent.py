"""Launches of latent attention for the new tokens of a step, and the buffers between its kernels.

Queries come from one product, or from two with a norm between; `kernels.latent` has the rest. Invariant: KV memory
holds a token's latent after its norm and its key after its rotation, as transformers' cache does, so prompts that
transformers computes and steps write the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from server.model.device.kernels import latent
from server.model.device.step.parts import LatentKind
from server.model.device.step.state import RowState
from server.model.device.step.tuning import Tuning, divisor, pow2
from server.model.device.step.weights import DecodeShape, LayerChanges, LayerWeights

HEADS = 16
"""Heads of a program, the least rows of a product by tensor cores."""
SHARED_BYTES = 80 << 10
"""Latents and queries that a program holds at a time; more would not fit on small GPUs."""


class LatentAttention:
    """Latent attention of a step's entries; mutates KV memory.

    Args:
        kinds: those of the model's layers.
        rows, adapters: [B], KV row and adapter of each entry; adapters are read if the step `is_adapted`.
        run: launches a kernel; of `DecodeStep`, as the next.
        product: multiplies all entries with a weight.
    """

    def __init__(
        self, shape: DecodeShape, state: RowState, tuning: Tuning, kinds: Sequence[LatentKind], rows: Tensor,
        adapters: Tensor, is_adapted: bool, run: Callable[..., None], product: Callable[..., None],
    ) -> None:  # fmt: skip
        self._shape, self._state, self._tuning = shape, state, tuning
        self._rows, self._run, self._product, self._batch = rows, run, product, len(rows)
        self._adapters, self._is_adapted = adapters, is_adapted
        queries = max(kind.num_heads * kind.query if kind.query_rank else 0 for kind in kinds)
        heads, summed = max(kind.num_heads for kind in kinds), max(kind.summed for kind in kinds)

        def fresh(elements: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(self._batch * elements, dtype=dtype, device=rows.device)

        self._queries, self._absorbed = fresh(queries, shape.dtype), fresh(summed, shape.dtype)
        sizes = (heads, heads, summed)  # of the results of splits, see `kernels.latent.attend_latent`
        self._parts = [fresh(tuning.latent_splits * size, torch.float32) for size in sizes]

    def attend(self, kind: LatentKind, weights: LayerWeights, qkv: Tensor, memory: Tensor, out: Tensor) -> None:
        """Attention of one layer over each row's blocks of its KV memory, which gets the new token, into out [B,
        width]; qkv [B, qkv] has queries or their latents, then the new latents and keys, then output gates."""
        assert weights.latent is not None, "the layer's attention has no latents"
        shape, state, tuning, expand = self._shape, self._state, self._tuning, weights.latent.expand
        queries, new = qkv[:, : kind.queries], qkv[:, kind.queries :]
        if weights.latent.queries is not None:
            latents, size = queries, kind.num_heads * kind.query
            queries = self._queries[: self._batch * size].view(self._batch, size)
            weight, rows = weights.latent.queries, tuning.qkv_rows
            change = (weights.changes or LayerChanges()).latents
            self._product(latents, weights.q_norm, weight, None, None, queries, rows, change, kind.eps)
        heads, splits, columns = kind.num_heads, tuning.latent_splits, divisor(kind.rank, tuning.latent_columns)
        room = SHARED_BYTES // (kind.rank * memory.element_size()) - HEADS
        tile = min(tuning.latent_tile, pow2(room + 1) // 2)
        sizes = {"HEADS": heads, "NOPE": kind.nope, "RANK": kind.rank}
        self._run(
            latent.absorb, (heads, kind.rank // columns),
            queries, expand, self._absorbed, B=self._batch, **sizes, NP=pow2(kind.nope),
            ROTARY=kind.head_dim, VALUE=kind.value_dim, STRIDE=queries.stride(0), BR=columns, num_warps=4,
        )  # fmt: skip
        self._run(
            latent.attend_latent, (splits, triton.cdiv(heads, HEADS), self._batch),
            queries, self._absorbed, new, weights.k_norm, weights.cos, weights.sin, self._rows, self._adapters,
            state.lengths, state.table, memory, *self._parts, kind.eps, shape.scaling or kind.query**-0.5,
            shape.max_blocks,
            **sizes, GP=HEADS, ROTARY=kind.head_dim, NEIGHBOURS=kind.pairs != "halves",
            HALVES=kind.pairs != "neighbours", SPLITS=splits, TILE=tile, BLOCK=shape.block_tokens,
            Q_STRIDE=queries.stride(0), NEW_STRIDE=new.stride(0), ADAPTED=self._is_adapted,
            num_warps=tuning.latent_warps, num_stages=2,
        )  # fmt: skip
        self._run(
            latent.expand_values, (heads, triton.cdiv(kind.value_dim, tuning.latent_rows)),
            *self._parts, expand, new[:, kind.token_elements :] if kind.gated else new, self._rows, state.lengths, out,
            B=self._batch, **sizes, VALUE=kind.value_dim, SPLITS=splits, TILE=tile, BV=tuning.latent_rows,
            GATED=kind.gated, STRIDE=new.stride(0), num_warps=4,
        )  # fmt: skip
