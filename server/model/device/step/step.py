"""One decode step for a fixed batch size: the buffers between the kernels, and their launches in order.

`DecodeStep.launch()` enqueues a step on the current stream and touches no host memory, so it can be captured once per
batch size and replayed (`step.graphs`). All inputs are device tensors that the owner fills before a step: `inputs`
[2, B], that is `rows` (KV row of each batch entry, -1: none) and `tokens`; the step itself advances `lengths`. All that
the host reads of a step lies in one tensor, `report`, so that one copy is enough. Invariants: batch entries without a
row reach no expert, no KV memory and no statistics; compiling makes the same calls as launching, so the kernels that
were compiled are those that run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from expert_store.paging.kernels import LFU, LRU
from expert_store.paging.pages import DevicePages
from server.model.device.kernels import attention, experts, routing, trunk
from server.model.device.step.router_kind import switches
from server.model.device.step.state import Report, RowState
from server.model.device.step.tuning import StepOptions, divisor, pow2
from server.model.device.step.weights import DecodeShape, LayerWeights, MlpWeights, TrunkWeights

FINISH_PARTS = 128
FINISH_BLOCK = 2048
MOST_ROW_ELEMENTS = 16 << 10
"""Weights of whole rows that one program of a product for one token holds in registers."""
THREADS = 32
"""Threads of a warp. Triton 3.6 computes a tensor with fewer elements than a program has threads wherever it is needed
again, loads included, and then fails to compile the router: its [batch, experts] are padded to one element a thread."""
MOST_DOWN_ELEMENTS = 28 << 10
"""Weights that one program of `down_one` holds in registers; more would halve how many programs an SM can hold."""


class DecodeStep:
    """The kernels of one step for `batch` entries; reads weights and pages, mutates rows and pages."""

    def __init__(
        self,
        shape: DecodeShape,
        weights: TrunkWeights,
        pages: DevicePages,
        state: RowState,
        batch: int,
        options: StepOptions | None = None,
    ) -> None:
        self.shape, self.weights, self.pages, self.state, self.batch = shape, weights, pages, state, batch
        self.options = options or StepOptions()
        self._distinct = min(shape.num_experts, batch * shape.top_k)
        self._compiles = False  # kernels are compiled instead of launched
        device = weights.embedding.device
        hidden, top_k, layers = shape.hidden, shape.top_k, shape.num_moe_layers
        moe = iter(range(layers))
        self._moe_layer = [-1 if layer in shape.dense_layers else next(moe) for layer in range(shape.num_layers)]
        heads, splits = shape.num_heads, self.options.tuning.attention_splits

        def fresh(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.inputs = torch.tensor([[-1], [0]], dtype=torch.int32).repeat(1, batch).to(device)
        self.rows, self.tokens = self.inputs[0], self.inputs[1]
        self.x, self.mid, self.normed = fresh(batch, hidden), fresh(batch, hidden), fresh(batch, hidden)
        self.qkv = fresh(batch, shape.qkv)
        self.attended = fresh(batch, heads * shape.head_dim)
        self.part_max = fresh(batch, heads, splits, dtype=torch.float32)
        self.part_sum = fresh(batch, heads, splits, dtype=torch.float32)
        self.part_out = fresh(batch, heads, splits, shape.head_dim, dtype=torch.float32)
        self.arrived = fresh(batch * shape.num_kv_heads + 1, dtype=torch.int32)
        self.router_logits = fresh(batch, shape.num_experts, dtype=torch.float32)
        self.pick_weights = fresh(batch, top_k, dtype=torch.float32)
        self.act = fresh(batch * top_k, shape.intermediate)
        self.inner = fresh(batch, max(shape.dense_intermediate, shape.shared_intermediate))
        self.shared = fresh(batch, hidden) if shape.shared_intermediate else self.mid
        self.parts = fresh(batch * top_k, hidden, dtype=torch.float32) if batch > 1 else self.mid
        self.num_parts = min(FINISH_PARTS, pow2(triton.cdiv(shape.vocab, FINISH_BLOCK)))
        self.part_best = fresh(batch, self.num_parts, dtype=torch.float32)
        self.part_total = fresh(batch, self.num_parts, dtype=torch.float32)
        self.part_token = fresh(batch, self.num_parts, dtype=torch.int32)
        self.arrived_rows = fresh(batch, dtype=torch.int32)
        self.logits = fresh(batch, shape.vocab, dtype=torch.float32)
        self.report = fresh(Report.num_entries(layers, batch, top_k), dtype=torch.int32)
        log = Report.of(self.report, layers, batch, top_k)
        self.best_token, self.best_logit, self.normaliser = log.best_token, log.best_logit, log.normaliser
        self.log_ids, self.log_weights, self.log_demand, self.log_mass = log.ids, log.weights, log.demand, log.mass

    def compile(self) -> None:
        """Compiles the step's kernels without launching any, for one layer as for all; see `graphs.in_parallel`."""
        self._compiles = True
        self.embed()
        windows = {self._window(layer): layer for layer in range(self.shape.num_layers)}
        for layer in windows.values():
            self.attend(layer)
        for layer in [self._moe_layer.index(0), *sorted(self.shape.dense_layers)[:1]]:
            self._layer(layer)
        self.head()
        self.finish()
        self._compiles = False

    def launch(self) -> None:
        """Enqueues one step: reads `rows` and `tokens`, writes `logits` [B, V] fp32 and `report`; advances lengths."""
        self.embed()
        for layer in range(self.shape.num_layers):
            self._layer(layer)
        self.head()
        self.finish()

    # -- stages, in order ----------------------------------------------------------------------------------------------

    def _layer(self, layer: int) -> None:
        self.qkv_product(layer)
        self.attend(layer)
        self.output_product(layer)
        if self._moe_layer[layer] < 0:
            self.dense_layer(layer)
            return
        self.route(layer)
        self.shared_expert(layer)
        self.gate_up(layer)
        self.down(layer)
        if self.batch > 1:
            self.combine(layer)

    def embed(self) -> None:
        """Tokens' embeddings into `x`; begins a new step of the pages."""
        shape, weights = self.shape, self.weights
        self._run(
            trunk.embed, (self.batch,),
            self.tokens, weights.embedding, weights.layers[0].input_norm, self.x, self.normed, self.pages.step,
            shape.eps,
            H=shape.hidden, HP=pow2(shape.hidden), NORM=self.batch > 1,
        )  # fmt: skip

    def shared_expert(self, layer: int) -> None:
        """The shared expert of a layer into `shared` [B, H], where it has one."""
        mlp = self.weights.layers[layer].mlp
        if mlp is not None:
            inner = self._gated(layer, mlp)
            self._dense(inner, None, mlp.down, None, None, self.shared, self.options.tuning.output_rows)

    def dense_layer(self, layer: int) -> None:
        """All that follows attention in a layer without routed experts: `x`, and for more tokens its norm."""
        weights = self.weights.layers[layer]
        assert weights.mlp is not None
        self._norm_rows(self.mid, weights.post_norm)
        inner = self._gated(layer, weights.mlp)
        self._dense(inner, None, weights.mlp.down, None, self.mid, self.x, self.options.tuning.output_rows)
        self._norm_rows(self.x, self._following_norm(layer))

    def _following_norm(self, layer: int) -> Tensor:
        is_last = layer + 1 == self.shape.num_layers
        return self.weights.norm if is_last else self.weights.layers[layer + 1].input_norm

    def _window(self, layer: int) -> int:
        return self.shape.windows[layer] if self.shape.windows else 0

    def qkv_product(self, layer: int) -> None:
        """Queries, keys and values of the new tokens into `qkv`."""
        weights, many = self.weights.layers[layer], self.batch > 1
        self._dense(
            self.normed if many else self.x, None if many else weights.input_norm, weights.qkv, weights.qkv_bias, None,
            self.qkv, self.options.tuning.qkv_rows,
        )  # fmt: skip

    def attend(self, layer: int) -> None:
        """Attention over each row's KV memory, which gets the new token, into `attended`."""
        shape, weights, state, tuning = self.shape, self.weights.layers[layer], self.state, self.options.tuning
        group = shape.num_heads // shape.num_kv_heads
        splits = max(1, min(tuning.attention_splits, 256 // (self.batch * shape.num_kv_heads)))
        self._run(
            attention.attend, (splits, shape.num_kv_heads, self.batch),
            self.qkv, weights.q_norm, weights.k_norm, self.weights.cos, self.weights.sin, self.rows, state.lengths,
            state.keys[layer], state.values[layer], self.attended, self.part_max, self.part_sum, self.part_out,
            self.arrived[1:], shape.eps, shape.scaling or shape.head_dim**-0.5, shape.max_tokens,
            NUM_HEADS=shape.num_heads, NUM_KV=shape.num_kv_heads, D=shape.head_dim, GP=max(16, pow2(group)),
            G2=pow2(group), SPLITS=splits, BLOCK=tuning.attention_block,
            NORM=("none", "head", "row").index(shape.qk_norm), QP=pow2(shape.num_heads * shape.head_dim),
            KP=pow2(shape.num_kv_heads * shape.head_dim), ROTARY=shape.rotary or shape.head_dim,
            WINDOW=self._window(layer), num_warps=4, num_stages=2,
        )  # fmt: skip

    def output_product(self, layer: int) -> None:
        """Attention's output product with the residual, into `mid`."""
        weights = self.weights.layers[layer]
        self._dense(
            self.attended, None, weights.output, weights.output_bias, self.x, self.mid, self.options.tuning.output_rows
        )

    def route(self, layer: int) -> None:
        """Each token's experts and their weights, and the layer's work list."""
        shape, weights, pages, state = self.shape, self.weights.layers[layer], self.pages, self.state
        options, tuning = self.options, self.options.tuning
        gate, at = _gate(weights), self._moe_layer[layer]
        rows = max(tuning.gate_rows, min(16, pow2(self.batch) * tuning.gate_rows))
        warps = tuning.route_warps if self.batch <= 4 else 8
        self._run(
            routing.route, (triton.cdiv(shape.num_experts, rows), self.batch),
            self.mid, weights.post_norm, gate, gate if weights.gate_bias is None else weights.gate_bias,
            gate if weights.selection_bias is None else weights.selection_bias, self.normed, self.router_logits,
            self.arrived, self.rows,
            state.masks, state.temperatures,
            state.bias_range, self.log_ids, self.log_weights, self.log_demand, self.log_mass, at, pages.step,
            pages.page_table, pages.slot_owner, pages.last_use, pages.use_count, pages.kept, pages.host_offset,
            pages.pool_offset, pages.stats, pages.header, pages.target, pages.source, pages.count, pages.pairs,
            pages.pair_target, pages.pair_source, self.pick_weights, pages.scratch, pages.shape.span_elements,
            shape.eps,
            options.resident_bias,
            B=self.batch, K=shape.top_k, E=shape.num_experts, S=pages.shape.num_slots, H=shape.hidden,
            L=shape.num_moe_layers,
            BP=pow2(self.batch), KP=pow2(shape.top_k),
            EP=max(pow2(shape.num_experts), THREADS * warps // pow2(self.batch)), SP=pow2(pages.shape.num_slots),
            HP=pow2(shape.hidden), PAIRS=pow2(self.batch * shape.top_k),
            STRIDE=pages.pairs.shape[1], BE=rows,
            POLICY=LFU.value if pages.policy == "lfu" else LRU.value, PAGED=pages.shape.paged, MASKED=options.masked,
            BIASED=options.resident_bias != 0.0, GATE_BIAS=weights.gate_bias is not None,
            **switches(shape.router, shape.dtype),
            num_warps=warps,
        )  # fmt: skip

    def gate_up(self, layer: int) -> None:
        """The picked experts' first product into `act`; fetches the spans that are in no slot."""
        shape, pages, tuning, one = self.shape, self.pages, self.options.tuning, self.batch == 1
        fetchers = tuning.fetchers if pages.shape.paged else 0
        rows = tuning.up_rows if one else tuning.expert_rows
        self._run(
            experts.gate_up, (fetchers + self._distinct * triton.cdiv(shape.intermediate, rows),),
            self.normed, pages.slots, pages.header, pages.target, pages.source, pages.count, pages.pairs, self.act,
            K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), I=shape.intermediate, BP=max(16, pow2(self.batch)),
            BI=rows,
            BK=divisor(shape.hidden, tuning.expert_columns), STRIDE=pages.pairs.shape[1], FETCHERS=fetchers,
            COPY=tuning.copy_elements, ONE=one, DOWN=not (one and tuning.down_fetches),
            num_warps=tuning.up_warps, num_stages=tuning.expert_stages,
        )  # fmt: skip

    def down(self, layer: int) -> None:
        """The picked experts' second product: of one token all of the layer's result, of more their `parts`."""
        shape, pages, tuning = self.shape, self.pages, self.options.tuning
        if self.batch > 1:
            self._run(
                experts.down_many, (self._distinct * triton.cdiv(shape.hidden, tuning.expert_rows),),
                self.act, pages.slots, pages.header, pages.target, pages.count, pages.pairs, self.parts,
                H=shape.hidden, I=shape.intermediate, BP=max(16, pow2(self.batch)), BH=tuning.expert_rows,
                BK=divisor(shape.intermediate, tuning.expert_columns), STRIDE=pages.pairs.shape[1], num_warps=4,
                num_stages=tuning.expert_stages,
            )  # fmt: skip
            return
        rows = tuning.down_rows
        while rows > 1 and rows * shape.top_k * shape.intermediate > MOST_DOWN_ELEMENTS:
            rows //= 2
        kind, *beside = self._beside(layer)
        self._run(
            experts.down_one, (triton.cdiv(shape.hidden, rows),),
            self.act, pages.slots, pages.pair_target, pages.pair_source, self.pick_weights, self.mid,
            *beside, self.normed, self.x,
            K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), I=shape.intermediate, BH=rows,
            BC=tuning.down_columns, SHARED=kind,
            PAGED=pages.shape.paged, FETCH=tuning.down_fetches, num_warps=tuning.down_warps,
        )  # fmt: skip

    def combine(self, layer: int) -> None:
        """The weighted sum of `parts` with what lies beside it, and its norm."""
        shape = self.shape
        kind, *beside = self._beside(layer)
        self._run(
            experts.combine, (self.batch,),
            self.parts, self.pick_weights, self.mid, *beside, self._following_norm(layer), self.x, self.normed,
            shape.eps,
            K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), SHARED=kind, NORM=True, num_warps=8,
        )  # fmt: skip

    def head(self) -> None:
        """Logits of the new tokens."""
        weights, many = self.weights, self.batch > 1
        self._dense(
            self.normed if many else self.x, None if many else weights.norm, weights.head, None, None, self.logits,
            self.options.tuning.head_rows,
        )  # fmt: skip

    def finish(self) -> None:
        """The most likely token of each row, its logit and the logits' logsumexp; lengths advance."""
        shape = self.shape
        self._run(
            trunk.finish, (self.num_parts, self.batch),
            self.logits, self.rows, self.state.lengths, self.part_best, self.part_total, self.part_token,
            self.arrived_rows, self.best_token, self.best_logit, self.normaliser, shape.vocab,
            PARTS=self.num_parts, BLOCK=pow2(triton.cdiv(shape.vocab, self.num_parts)), num_warps=4,
        )  # fmt: skip

    # -- inside --------------------------------------------------------------------------------------------------------

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launches a kernel, or only compiles it."""
        if self.options.pdl:
            constants["launch_pdl"] = True
        if self._compiles:
            kernel.warmup(*args, grid=grid, PDL=self.options.pdl, **constants)
        else:
            kernel[grid](*args, PDL=self.options.pdl, **constants)

    def _dense(
        self, x: Tensor, norm: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        out: Tensor, rows: int,
    ) -> None:  # fmt: skip
        """out = norm(x) · weightᵀ + bias + residual; the norm is applied here only for a single token."""
        num_rows, width = weight.shape
        tuning = self.options.tuning
        if self.batch == 1:
            rows = max(1, min(rows, MOST_ROW_ELEMENTS // pow2(width)))
            self._run(
                trunk.gemv, (triton.cdiv(num_rows, rows),),
                x, x if norm is None else norm, weight, x if bias is None else bias,
                x if residual is None else residual,
                out, self.shape.eps, num_rows, K=width, KP=pow2(width), BN=rows, NORM=norm is not None,
                BIAS=bias is not None, RESIDUAL=residual is not None, num_warps=tuning.gemv_warps,
            )  # fmt: skip
            return
        tile = tuning.gemm_rows if num_rows >= 8192 or num_rows >= 132 * tuning.gemm_rows else 16
        self._run(
            trunk.gemm, (triton.cdiv(num_rows, tile),),
            x, weight, x if bias is None else bias, x if residual is None else residual, out, num_rows,
            B=self.batch, BP=max(16, pow2(self.batch)), K=width, BN=tile, BK=divisor(width, tuning.gemm_columns),
            BIAS=bias is not None, RESIDUAL=residual is not None,
            num_warps=4 if tile >= 32 else 2, num_stages=tuning.gemm_stages,
        )  # fmt: skip

    def _gated(self, layer: int, mlp: MlpWeights) -> Tensor:
        """silu(gate · y) * (up · y) [B, I], a view of `inner`; y is what the layer's products after attention read."""
        num_rows, width = mlp.up.shape[0] // 2, mlp.up.shape[1]
        out = self.inner.view(-1)[: self.batch * num_rows].view(self.batch, num_rows)
        tuning = self.options.tuning
        if self.batch == 1:
            rows = max(1, min(tuning.up_rows, MOST_ROW_ELEMENTS // 2 // pow2(width)))
            self._run(
                trunk.gated_gemv, (triton.cdiv(num_rows, rows),),
                self.mid, self.weights.layers[layer].post_norm, mlp.up, out, self.shape.eps, num_rows,
                K=width, KP=pow2(width), BN=rows, NORM=True, num_warps=tuning.gemv_warps,
            )  # fmt: skip
            return out
        self._run(
            trunk.gated_gemm, (triton.cdiv(num_rows, 16),),
            self.normed, mlp.up, out, num_rows,
            B=self.batch, BP=max(16, pow2(self.batch)), K=width, BN=16, BK=divisor(width, tuning.gemm_columns),
            num_warps=2, num_stages=tuning.expert_stages,
        )  # fmt: skip
        return out

    def _norm_rows(self, x: Tensor, norm: Tensor) -> None:
        """`normed` = norm(x) for more tokens than one, whose products do not take it along."""
        if self.batch > 1:
            self._run(
                trunk.norm_rows, (self.batch,), x, norm, self.normed, self.shape.eps,
                H=self.shape.hidden, HP=pow2(self.shape.hidden), num_warps=8,
            )  # fmt: skip

    def _beside(self, layer: int) -> tuple[int, Tensor, Tensor]:
        """What a layer adds to its routed experts: the kernels' SHARED, the shared expert's result, its switch."""
        mlp = self.weights.layers[layer].mlp
        switch = None if mlp is None else mlp.switch
        kind = 0 if mlp is None else 1 if switch is None else 2
        return kind, self.shared, self.mid if switch is None else switch


def _gate(weights: LayerWeights) -> Tensor:
    assert weights.gate is not None, "the layer has no routed experts"
    return weights.gate
