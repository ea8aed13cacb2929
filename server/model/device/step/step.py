"""One decode step for a fixed batch size: the buffers between the kernels, and their launches in order.

`DecodeStep.launch()` enqueues a step on the current stream and touches no host memory, so it can be captured once per
batch size and replayed (`server.model.device.step.graph`). All inputs are device tensors that the owner fills before a
step: `inputs` [2, B], that is `rows` (KV row of each batch entry, -1: none) and `tokens`; `lengths` is advanced by
the step itself. What the host wants to know of a step lies in one tensor, `report`, so that one copy brings it. Batch
entries without a row leave no trace: they reach no expert, no KV memory and no statistics.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from expert_store.paging.kernels import LFU, LRU
from expert_store.paging.pages import DevicePages
from server.model.device.kernels import attention, experts, routing, trunk
from server.model.device.step.options import StepOptions, divisor, pow2
from server.model.device.step.products import Products
from server.model.device.step.router_kind import switches
from server.model.device.step.state import Report, RowState
from server.model.device.step.weights import DecodeShape, LayerWeights, TrunkWeights

STAGES = (
    "embed", "qkv", "attention", "output", "route", "shared", "dense", "gate_up", "down", "combine", "head", "greedy"
)  # fmt: skip
GREEDY_PARTS = 128
GREEDY_BLOCK = 2048
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
        self._products = Products(shape, batch, self.options)
        self._run, self._dense = self._products.run, self._products.dense
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
        self.num_parts = min(GREEDY_PARTS, pow2(triton.cdiv(shape.vocab, GREEDY_BLOCK)))
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
        """Compiles the step's kernels without launching any, for one layer as for all; see `compiling.in_parallel`."""
        self._products.compiles = True
        self._embed()
        moe = self._moe_layer.index(0)
        windows = {self._window(layer): layer for layer in range(self.shape.num_layers)}
        for layer in windows.values():
            self._attention(layer)
        for layer in sorted(self.shape.dense_layers)[:1]:
            self._dense_layer(layer)
        self._route(moe)
        self._shared(moe)
        self._experts(moe)
        self._head()
        self._products.compiles = False

    def launch(self) -> None:
        """Enqueues one step: reads `rows` and `tokens`, writes `logits` [B, V] fp32 and `report`; advances lengths (and
        with `greedy` writes the next tokens).
        """
        self._embed()
        for layer, moe in enumerate(self._moe_layer):
            self._attention(layer)
            if moe < 0:
                self._dense_layer(layer)
                continue
            self._route(layer)
            self._shared(layer)
            self._experts(layer)
        self._head()

    def _embed(self) -> None:
        shape, weights = self.shape, self.weights
        self._run(
            "embed", trunk.embed, (self.batch,),
            self.tokens, weights.embedding, weights.layers[0].input_norm, self.x, self.normed, self.pages.step,
            shape.eps,
            H=shape.hidden, HP=pow2(shape.hidden), NORM=self.batch > 1,
        )  # fmt: skip

    def _gated(self, stage: str, weights: LayerWeights) -> Tensor:
        assert weights.mlp is not None
        norm = weights.post_norm
        return self._products.gated(stage, weights.mlp, self.mid, norm, self.normed, self.inner)

    def _shared(self, layer: int) -> None:
        """The shared expert of a layer into `shared` [B, H], where it has one."""
        weights = self.weights.layers[layer]
        if weights.mlp is None:
            return
        inner = self._gated("shared", weights)
        self._dense("shared", inner, None, weights.mlp.down, None, None, self.shared, self.options.tuning.output_rows)

    def _dense_layer(self, layer: int) -> None:
        """All that follows attention in a layer without routed experts: `x`, and for more tokens its norm."""
        weights = self.weights.layers[layer]
        assert weights.mlp is not None
        self._products.norm_rows(self.mid, weights.post_norm, self.normed)
        inner = self._gated("dense", weights)
        rows = self.options.tuning.output_rows
        self._dense("dense", inner, None, weights.mlp.down, None, self.mid, self.x, rows)
        self._products.norm_rows(self.x, self._following_norm(layer), self.normed)

    def _following_norm(self, layer: int) -> Tensor:
        is_last = layer + 1 == self.shape.num_layers
        return self.weights.norm if is_last else self.weights.layers[layer + 1].input_norm

    def _window(self, layer: int) -> int:
        return self.shape.windows[layer] if self.shape.windows else 0

    def _attention(self, layer: int) -> None:
        shape, weights, state, tuning = self.shape, self.weights.layers[layer], self.state, self.options.tuning
        many = self.batch > 1
        self._dense(
            "qkv", self.normed if many else self.x, None if many else weights.input_norm, weights.qkv,
            weights.qkv_bias, None,
            self.qkv, tuning.qkv_rows,
        )  # fmt: skip
        group = shape.num_heads // shape.num_kv_heads
        splits = max(1, min(tuning.attention_splits, 256 // (self.batch * shape.num_kv_heads)))
        self._run(
            "attention", attention.attend, (splits, shape.num_kv_heads, self.batch),
            self.qkv, weights.q_norm, weights.k_norm, self.weights.cos, self.weights.sin, self.rows, state.lengths,
            state.keys[layer], state.values[layer], self.attended, self.part_max, self.part_sum, self.part_out,
            self.arrived[1:], shape.eps, shape.scaling or shape.head_dim**-0.5, shape.max_tokens,
            NUM_HEADS=shape.num_heads, NUM_KV=shape.num_kv_heads, D=shape.head_dim, GP=max(16, pow2(group)),
            G2=pow2(group), SPLITS=splits, BLOCK=tuning.attention_block,
            NORM=("none", "head", "row").index(shape.qk_norm), QP=pow2(shape.num_heads * shape.head_dim),
            KP=pow2(shape.num_kv_heads * shape.head_dim), ROTARY=shape.rotary or shape.head_dim,
            WINDOW=self._window(layer), num_warps=4, num_stages=2,
        )  # fmt: skip
        self._dense(
            "output", self.attended, None, weights.output, weights.output_bias, self.x, self.mid, tuning.output_rows
        )

    def _route(self, layer: int) -> None:
        shape, weights, pages, state = self.shape, self.weights.layers[layer], self.pages, self.state
        options, tuning = self.options, self.options.tuning
        forced = options.forced if options.forced is not None else self.log_ids
        gate, at = _gate(weights), self._moe_layer[layer]
        rows = max(tuning.gate_rows, min(16, pow2(self.batch) * tuning.gate_rows))
        warps = tuning.route_warps if self.batch <= 4 else 8
        self._run(
            "route", routing.route, (triton.cdiv(shape.num_experts, rows), self.batch),
            self.mid, weights.post_norm, gate, gate if weights.gate_bias is None else weights.gate_bias,
            gate if weights.selection_bias is None else weights.selection_bias, self.normed, self.router_logits,
            self.arrived, self.rows,
            state.masks, state.temperatures,
            forced, state.bias_range, self.log_ids, self.log_weights, self.log_demand, self.log_mass, at, pages.step,
            pages.page_table, pages.slot_owner, pages.last_use, pages.use_count, pages.pinned, pages.host_offset,
            pages.pool_offset, pages.stats, pages.header, pages.target, pages.source, pages.count, pages.pairs,
            pages.pair_target, pages.pair_source, self.pick_weights, pages.scratch, pages.shape.span_elements,
            shape.eps,
            options.resident_bias, forced.shape[0],
            B=self.batch, K=shape.top_k, E=shape.num_experts, S=pages.shape.num_slots, H=shape.hidden,
            L=shape.num_moe_layers,
            BP=pow2(self.batch), KP=pow2(shape.top_k),
            EP=max(pow2(shape.num_experts), THREADS * warps // pow2(self.batch)), SP=pow2(pages.shape.num_slots),
            HP=pow2(shape.hidden), PAIRS=pow2(self.batch * shape.top_k),
            STRIDE=pages.pairs.shape[1], BE=rows,
            POLICY=LFU.value if pages.policy == "lfu" else LRU.value, PAGED=pages.shape.paged, MASKED=options.masked,
            FORCED=options.forced is not None,
            BIASED=options.resident_bias != 0.0, GATE_BIAS=weights.gate_bias is not None,
            **switches(shape.router, shape.dtype),
            num_warps=warps,
        )  # fmt: skip

    def _experts(self, layer: int) -> None:
        shape, pages, tuning, batch = self.shape, self.pages, self.options.tuning, self.batch
        one = batch == 1
        distinct = min(shape.num_experts, batch * shape.top_k)
        fetchers = tuning.fetchers if pages.shape.paged else 0
        rows = tuning.up_rows if one else tuning.expert_rows
        slots = pages.slots
        down_fetches = one and tuning.down_fetches
        self._run(
            "gate_up", experts.gate_up, (fetchers + distinct * triton.cdiv(shape.intermediate, rows),),
            self.normed, slots, pages.header, pages.target, pages.source, pages.count, pages.pairs, self.act,
            K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), I=shape.intermediate, BP=max(16, pow2(batch)),
            BI=rows,
            BK=divisor(shape.hidden, tuning.expert_columns), STRIDE=pages.pairs.shape[1], FETCHERS=fetchers,
            COPY=tuning.copy_elements, ONE=one,
            DOWN=not down_fetches,
            num_warps=tuning.up_warps, num_stages=tuning.expert_stages,
        )  # fmt: skip
        mlp = self.weights.layers[layer].mlp
        switch = None if mlp is None else mlp.switch
        kind = 0 if mlp is None else 1 if switch is None else 2
        beside = (self.shared, self.mid if switch is None else switch)
        if one:
            down_rows = tuning.down_rows
            while down_rows > 1 and down_rows * shape.top_k * shape.intermediate > MOST_DOWN_ELEMENTS:
                down_rows //= 2
            self._run(
                "down", experts.down_one, (triton.cdiv(shape.hidden, down_rows),),
                self.act, slots, pages.pair_target, pages.pair_source, self.pick_weights, self.mid,
                *beside, self.normed, self.x,
                K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), I=shape.intermediate, BH=down_rows,
                BC=tuning.down_columns, SHARED=kind,
                PAGED=pages.shape.paged, FETCH=down_fetches, num_warps=tuning.down_warps,
            )  # fmt: skip
            return
        self._run(
            "down", experts.down_many, (distinct * triton.cdiv(shape.hidden, tuning.expert_rows),),
            self.act, slots, pages.header, pages.target, pages.count, pages.pairs, self.parts,
            H=shape.hidden, I=shape.intermediate, BP=max(16, pow2(batch)), BH=tuning.expert_rows,
            BK=divisor(shape.intermediate, tuning.expert_columns), STRIDE=pages.pairs.shape[1], num_warps=4,
            num_stages=tuning.expert_stages,
        )  # fmt: skip
        self._run(
            "combine", experts.combine, (batch,),
            self.parts, self.pick_weights, self.mid, *beside, self._following_norm(layer), self.x, self.normed,
            shape.eps,
            K=shape.top_k, H=shape.hidden, HP=pow2(shape.hidden), SHARED=kind, NORM=True, num_warps=8,
        )  # fmt: skip

    def _head(self) -> None:
        shape, weights, many = self.shape, self.weights, self.batch > 1
        self._dense(
            "head", self.normed if many else self.x, None if many else weights.norm, weights.head, None, None,
            self.logits,
            self.options.tuning.head_rows,
        )  # fmt: skip
        block = pow2(triton.cdiv(shape.vocab, self.num_parts))
        self._run(
            "greedy", trunk.finish, (self.num_parts, self.batch),
            self.logits, self.rows, self.tokens, self.state.lengths, self.part_best, self.part_total, self.part_token,
            self.arrived_rows, self.best_token, self.best_logit, self.normaliser, shape.vocab,
            PARTS=self.num_parts, BLOCK=block, GREEDY=self.options.greedy, num_warps=4,
        )  # fmt: skip


def _gate(weights: LayerWeights) -> Tensor:
    assert weights.gate is not None, "the layer has no routed experts"
    return weights.gate
