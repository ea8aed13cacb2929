"""One decode step for a fixed batch size: the buffers between the kernels, and their launches in order.

`DecodeStep.launch()` enqueues a step on the current stream and touches no host memory, so it can be captured once per
batch size and replayed (`step.graphs`). All inputs are device tensors that the owner fills before a step: `inputs`
[3, B], that is `rows` (KV row of each batch entry, -1: none), `tokens` and `adapters` (from 1 on, 0: none; read by
adapted steps alone); the step itself advances `lengths`. All results for the host are in one tensor, `report`, so that
one copy is enough. Invariants: batch entries without a row
change no expert slot, no KV memory and no statistics; if the step is `batch_invariant`, an entry's bits depend neither
on the other entries nor on their number, since every batch size runs the same kernels with the same tiles; compiling
makes the same calls as launching, so the compiled kernels are those that run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from expert_store.paging.kernels import LFU, LRU
from expert_store.paging.pages import DevicePages
from server.model.device.kernels import attention, experts, packed, packed_tiles, routing, trunk
from server.model.device.step.launch import launch
from server.model.device.step.mixers.latent import LatentAttention
from server.model.device.step.mixers.states import state_rule
from server.model.device.step.packed import expert_constants, plane_constants, row_constants
from server.model.device.step.parts import LatentKind, OutputGate, StateKind
from server.model.device.step.router_kind import switches
from server.model.device.step.state import Report, RowState
from server.model.device.step.tuning import StepOptions, divisor, pow2
from server.model.device.step.weights import (
    DecodeShape,
    LayerChanges,
    LayerWeights,
    LowRank,
    Matrix,
    MlpWeights,
    QkNorm,
    ScaledMatrix,
    TrunkWeights,
)

FINISH_PARTS = 128
FINISH_BLOCK = 2048
MOST_ROW_ELEMENTS = 16 << 10
"""Weights of whole rows that one program of a product holds in registers."""
THREADS = 32
"""Threads of a warp. Triton 3.6 recomputes a tensor with fewer elements than a program has threads at each use, loads
included, and then fails to compile the router. So a row's experts are padded to one for each thread."""
MOST_DOWN_ELEMENTS = 28 << 10
"""Weights that one program of `down` holds in registers; more would halve the number of programs of an SM."""
MOST_TILE = 8 << 10
"""Elements of keys, or of values, that one product of attention takes."""
MOST_JOINED = 16 << 10
"""Elements of heads' splits that a program of attention joins together."""
WARP_WORDS = 2 << 10
"""Words of codes, of four bytes, that one warp of a packed product holds in registers, beside their scales."""
MOST_TILE_BYTES = 64 << 10
"""Activations of a tile's tokens that a program holds in shared memory, of which the smallest GPUs have 99 KiB."""
JOIN_BLOCK = 256
"""Elements of a row that one program of `join_picks` sums."""

MANY_ROWS = 8
"""Where KV memory has more rows than these, products go by tensor cores in every step: slower for one row, faster from
some four on. A row's bits are the same for every batch size either way, but not those of the other way."""

MOST_IN_WIDE_TILES = 32
"""Where KV memory has more rows than these, tiles of products have half as many columns: 72 KiB of shared memory, not
144."""


class DecodeStep:
    """The kernels of one step for `batch` entries; reads weights and pages, mutates rows and pages.

    Args:
        weights: of the trunk; those of `AdaptedTrunk` if the step is `adapted`.
    """

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
        assert self.options.masked or not self.options.adapted, "an adapter is for masked rows"
        is_many = shape.max_rows > MANY_ROWS if self.options.batch_invariant else batch > 1
        self._product = self._tiled_product if is_many else self._row_product
        self._in_tiles = is_many and self._fits_tiles()
        self._compiles = False  # True: kernels are compiled instead of launched
        device = weights.embedding.device
        hidden, top_k, layers = shape.hidden, shape.top_k, shape.num_moe_layers
        moe = iter(range(layers))
        self._moe_layer = [-1 if layer in shape.dense_layers else next(moe) for layer in range(shape.num_layers)]

        def fresh(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.inputs = torch.tensor([[-1], [0], [0]], dtype=torch.int32).repeat(1, batch).to(device)
        self.rows, self.tokens, self.adapters = self.inputs
        self.x, self.mid, self.normed = fresh(batch, hidden), fresh(batch, hidden), fresh(batch, hidden)
        planes = torch.bfloat16 if shape.dtype == torch.bfloat16 else torch.float32  # fp16 has too few exponents
        self.planes = self.normed if shape.packed is None else fresh(batch, hidden, dtype=planes)
        self._attention_buffers(fresh)
        self.choices = fresh(batch, shape.num_experts, dtype=torch.int8)
        self.ranges = fresh(batch, dtype=torch.float32)
        self.router_logits, self.changed_logits = fresh(2, batch, shape.num_experts, dtype=torch.float32)
        self.low = fresh(batch * max(map(_most_rank, weights.layers)), dtype=torch.float32)
        self.pick_weights = fresh(batch, top_k, dtype=torch.float32)
        act_dtype = shape.dtype if shape.packed is None else planes
        self.act = fresh(batch * top_k, shape.intermediate, dtype=act_dtype)
        self.picks = fresh(batch * top_k if self._in_tiles else 0, hidden, dtype=torch.float32)
        self.inner = fresh(batch, max(shape.dense_intermediate, shape.shared_intermediate))
        self.shared = fresh(batch, hidden) if shape.shared_intermediate else self.mid
        self.branch, self.nothing = fresh(batch, hidden), fresh(batch, hidden)
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

    def _attention_buffers(self, fresh: Callable[..., Tensor]) -> None:
        """Makes the buffers of attention, of sizes that hold each layer's."""
        shape, batch, splits = self.shape, self.batch, self.options.tuning.attention_splits
        attentions = shape.each_attention
        heads, kv_heads = max(kind.num_heads for kind in attentions), max(kind.vectors[0][0] for kind in attentions)
        self.qkv, self.attended = fresh(batch, shape.qkv), fresh(batch, shape.attended)
        self.part_max = fresh(batch, heads, splits, dtype=torch.float32)
        self.part_sum = fresh(batch, heads, splits, dtype=torch.float32)
        self.part_out = fresh(batch, splits, shape.attended, dtype=torch.float32)
        self.arrived = fresh(1 + batch + batch * kv_heads, dtype=torch.int32)
        own = (shape, self.state, self.options.tuning)
        self._rule = state_rule(*own, self.rows, self._run, self._product)
        latents = [kind for kind in attentions if isinstance(kind, LatentKind)]
        self._latent = None
        if latents:
            adapters = (self.adapters, self.options.adapted)
            self._latent = LatentAttention(*own, latents, self.rows, *adapters, self._run, self._product)

    def _fits_tiles(self) -> bool:
        """Whether packed experts may go by tensor cores: a program holds a tile's activations in shared memory."""
        shape, size = self.shape, 2 if self.shape.dtype == torch.bfloat16 else 4
        widest = self.options.tuning.tile_tokens * max(shape.hidden, shape.intermediate) * size
        return shape.packed is not None and widest <= MOST_TILE_BYTES

    def compile(self) -> None:
        """Compiles the step's kernels without a launch, those of one layer of each kind. See `graphs.in_parallel`."""
        self._compiles = True
        self.embed()
        kinds = {
            (self._window(at), self.shape.attention(at), weights.sinks is None, weights.gate is None): at
            for at, weights in enumerate(self.weights.layers)
        }
        for layer in kinds.values():
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
        self.gate_up()
        self.down(layer)
        if self.weights.layers[layer].joins:
            self._join(layer)

    def embed(self) -> None:
        """Tokens' embeddings into `x`; begins a new step of the pages."""
        shape, weights = self.shape, self.weights
        self._run(
            trunk.embed, (self.batch,),
            self.tokens, weights.embedding, self.x, self.pages.step, H=shape.hidden, HP=pow2(shape.hidden),
            SCALE=self._embedding_factor,
        )  # fmt: skip

    @property
    def _embedding_factor(self) -> float:
        scales = self.shape.scales
        rounded = torch.tensor(scales.embedding, dtype=self.shape.dtype if scales.rounds_embedding else torch.float64)
        return float(rounded)

    def shared_expert(self, layer: int) -> None:
        """The shared expert of a layer into `shared` [B, H], if it has one."""
        mlp = self.weights.layers[layer].mlp
        if mlp is not None:
            inner, change = self._gated(layer, mlp), self._changes(layer).down
            self._product(inner, None, mlp.down, None, None, self.shared, self.options.tuning.output_rows, change)

    def dense_layer(self, layer: int) -> None:
        """The gated product of a layer without routed experts, into `x`."""
        mlp = self.weights.layers[layer].mlp
        assert mlp is not None
        inner, rows, change = self._gated(layer, mlp), self.options.tuning.output_rows, self._changes(layer).down
        if self.weights.layers[layer].joins:
            self._product(inner, None, mlp.down, None, None, self.branch, rows, change)
            self._join(layer)
        else:
            self._product(inner, None, mlp.down, None, self.mid, self.x, rows, change)

    def _changes(self, layer: int) -> LayerChanges:
        return self.weights.layers[layer].changes or LayerChanges()

    def _window(self, layer: int) -> int:
        return self.shape.windows[layer] if self.shape.windows else 0

    def qkv_product(self, layer: int) -> None:
        """Queries, keys, values and what else a layer takes of the new tokens' input into `qkv`."""
        weights, rows = self.weights.layers[layer], self.options.tuning.qkv_rows
        out = self._rows_of(self.qkv, self.shape.attention(layer).qkv)
        change = self._changes(layer).qkv
        self._product(self.x, weights.input_norm, weights.qkv, weights.qkv_bias, None, out, rows, change)

    def attend(self, layer: int) -> None:
        """Attention over each row's blocks of KV memory, or what stands in its place over the row's state, into
        `attended`; the memory, or the state, gets the new token."""
        shape, weights, state, tuning = self.shape, self.weights.layers[layer], self.state, self.options.tuning
        kind = shape.attention(layer)
        if isinstance(kind, StateKind):
            assert self._rule is not None
            self._rule.step(layer, kind, weights, self._rows_of(self.qkv, kind.qkv), self.attended)
            return
        if isinstance(kind, LatentKind):
            assert self._latent is not None
            qkv, out = self._rows_of(self.qkv, kind.qkv), self._rows_of(self.attended, kind.width)
            self._latent.attend(kind, weights, qkv, state.memory[layer], out)
            return
        group, splits = kind.num_heads // kind.num_kv_heads, tuning.attention_splits
        half, value = pow2(kind.head_dim // 2), pow2(kind.value_dim)
        self._run(
            attention.attend, (splits, kind.num_kv_heads, self.batch),
            self.qkv, weights.q_norm, weights.k_norm, weights.cos if weights.sinks is None else weights.sinks,
            weights.cos, weights.sin, self.rows, self.adapters, state.lengths,
            state.table, state.memory[layer], self.attended, self.part_max, self.part_sum, self.part_out,
            self.arrived[1 + self.batch :], shape.eps, shape.scaling or kind.head_dim**-0.5, shape.max_blocks,
            NUM_HEADS=kind.num_heads, NUM_KV=kind.num_kv_heads, D=kind.head_dim, HP=half, DV=kind.value_dim, VP=value,
            VALUES_AT=kind.values_at, VALUE_NORM=kind.value_norm, VALUE_SCALE=kind.value_scale, QKV=kind.qkv,
            GP=max(16, pow2(group)), JOINED=min(pow2(group), max(1, MOST_JOINED // (splits * value))),
            SPLITS=splits, TILE=min(tuning.attention_tile, max(16, MOST_TILE // max(2 * half, value))),
            BLOCK=shape.block_tokens, NORM=get_args(QkNorm).index(shape.qk_norm),
            QP=pow2(kind.num_heads * kind.head_dim), KP=pow2(kind.num_kv_heads * kind.head_dim),
            ROTARY=kind.rotary, WINDOW=self._window(layer),
            NEIGHBOURS=shape.neighbours, GATE=get_args(OutputGate).index(kind.gate),
            SINKS=weights.sinks is not None, ADAPTED=self.options.adapted, num_warps=4, num_stages=2,
        )  # fmt: skip

    def output_product(self, layer: int) -> None:
        """Attention's output product with the residual, into `mid`."""
        weights, rows = self.weights.layers[layer], self.options.tuning.output_rows
        attended, norm = self._rows_of(self.attended, self.shape.attention(layer).width), weights.attention_norm
        change = self._changes(layer).output
        if norm is None:
            self._product(attended, None, weights.output, weights.output_bias, self.x, self.mid, rows, change)
            return
        self._product(attended, None, weights.output, weights.output_bias, None, self.branch, rows, change)
        self._add(self.x, self.branch, self.mid, norm=norm)

    def _norm_of(self, norm: Tensor | None) -> int:
        """The kernels' constant NORM for a norm over the hidden state, or 1 for another tensor; 0 for none."""
        return 0 if norm is None else 2 if norm.ndim == 2 and len(norm) == 2 and self.shape.norm == "layer" else 1

    @property
    def _seen(self) -> Tensor:
        """The stream as experts, or a layer's product, read it."""
        return self.x if self.shape.is_parallel else self.mid

    def _join(self, layer: int) -> None:
        """Adds what the layer's experts, or its product, put into `branch` to the stream, changed as a whole."""
        weights = self.weights.layers[layer]
        beside = weights.mlp if weights.adds_apart else None
        self._add(
            self.mid, self.branch, self.x, norm=weights.branch_norm, branch_norm=weights.routed_norm,
            beside=None if beside is None else self.shared, beside_norm=None if beside is None else beside.after,
            factor=weights.factor,
        )  # fmt: skip

    def _add(
        self, residual: Tensor, branch: Tensor, out: Tensor, *, norm: Tensor | None, branch_norm: Tensor | None = None,
        beside: Tensor | None = None, beside_norm: Tensor | None = None, factor: Tensor | None = None,
    ) -> None:  # fmt: skip
        """See `kernels.trunk.join`."""
        shape = self.shape
        given = (branch_norm, beside, beside_norm, norm, factor)
        tensors = (branch if one is None else one for one in given)
        names = ("BRANCH_NORM", "BESIDE", "BESIDE_NORM", "NORM", "FACTOR")
        self._run(
            trunk.join, (self.batch,), residual, branch, *tensors, out, self.adapters, shape.eps,
            ADAPTED=self.options.adapted, H=shape.hidden, HP=pow2(shape.hidden), SCALE=shape.scales.residual,
            **{name: self._norm_of(one) for name, one in zip(names, given, strict=True)}, num_warps=8,
        )  # fmt: skip

    def route(self, layer: int) -> None:
        """Each token's experts and their weights, and the layer's work list."""
        shape, weights, pages, state = self.shape, self.weights.layers[layer], self.pages, self.state
        options, tuning = self.options, self.options.tuning
        gate, at, changes = _gate(weights), self._moe_layer[layer], self._changes(layer)
        norms = (gate if norm is None else norm for norm in (weights.post_norm, weights.gate_norm))
        rows, warps = tuning.gate_rows, tuning.route_warps
        self._run(
            routing.route, (triton.cdiv(shape.num_experts, rows), self.batch),
            self._seen, *norms, gate, gate if weights.gate_bias is None else weights.gate_bias,
            gate if weights.selection_bias is None else weights.selection_bias,
            gate if weights.expert_factors is None else weights.expert_factors, self.normed, self.planes,
            self.router_logits,
            self.arrived, self.choices, self.ranges, self.rows, state.masks, state.temperatures,
            state.bias_range, self.adapters, gate if changes.delta is None else changes.delta,
            self.ranges if changes.gains is None else changes.gains, self.changed_logits,
            self.log_ids, self.log_weights, self.log_demand, self.log_mass, at, pages.step,
            pages.page_table, pages.slot_owner, pages.last_use, pages.use_count, pages.kept, pages.host_offset,
            pages.pool_offset, pages.stats, pages.header, pages.target, pages.source, pages.count, pages.pairs,
            pages.pair_target, pages.pair_source, self.pick_weights, pages.scratch, pages.shape.span_elements,
            shape.eps,
            options.resident_bias,
            B=self.batch, K=shape.top_k, E=shape.num_experts, S=pages.shape.num_slots, H=shape.hidden,
            L=shape.num_moe_layers,
            BP=pow2(self.batch), KP=pow2(shape.top_k),
            EP=max(pow2(shape.num_experts), THREADS * warps), SP=pow2(pages.shape.num_slots),
            HP=pow2(shape.hidden), PAIRS=pow2(self.batch * shape.top_k),
            STRIDE=pages.pairs.shape[1], BE=rows,
            POLICY=LFU.value if pages.policy == "lfu" else LRU.value, PAGED=pages.shape.paged, MASKED=options.masked,
            BIASED=options.resident_bias != 0.0, **plane_constants(shape.packed),
            GATE_BIAS=weights.gate_bias is not None, NORM=self._norm_of(weights.post_norm),
            EXPERT_FACTORS=weights.expert_factors is not None, ADAPTED=options.adapted,
            **switches(shape.router, shape.dtype),
            num_warps=warps,
        )  # fmt: skip

    def gate_up(self) -> None:
        """The picked experts' first product into `act`; fetches the spans that are in no slot."""
        shape, pages, tuning, one = self.shape, self.pages, self.options.tuning, self.batch == 1
        fetchers = tuning.fetchers if shape.packed is None else tuning.packed_fetchers
        fetchers = fetchers if pages.shape.paged else 0
        distinct = min(shape.num_experts, self.batch * shape.top_k)
        work = (pages.slots, pages.header, pages.target, pages.source, pages.count, pages.pairs, self.act)
        sizes = {
            "K": shape.top_k, "H": shape.hidden, "I": shape.intermediate, "STRIDE": pages.pairs.shape[1],
            "FETCHERS": fetchers, "ONE": one, **expert_constants(shape.experts, packed=shape.packed is not None),
        }  # fmt: skip
        if shape.packed is None:
            rows = tuning.up_rows
            self._run(
                experts.gate_up, (fetchers + distinct * triton.cdiv(shape.intermediate, rows),), self.normed, *work,
                **sizes, HP=pow2(shape.hidden), BI=rows, COPY=tuning.copy_elements,
                DOWN=not self._down_fetches, num_warps=tuning.up_warps,
            )  # fmt: skip
            return
        layout, of_down = (
            row_constants(encoding, columns)
            for encoding, columns in zip(shape.packed, (shape.hidden, shape.intermediate), strict=True)
        )
        sizes |= {"REST": shape.span_elements - shape.up_words, "MOST": distinct}
        sizes |= {"VD": of_down["V"], "NEXT": of_down["CODES"]}
        if self._in_tiles:
            del sizes["ONE"]
            rows, splits = tuning.tile_up_rows, tuning.tile_up_splits
            tiles = triton.cdiv(shape.intermediate, rows)
            run = triton.cdiv(distinct * tiles, tuning.tile_up_programs)
            self._run(
                packed_tiles.gate_up_tiles, (fetchers + distinct * triton.cdiv(tiles, run),),
                self.planes, *work, self.normed, run, **sizes, BI=rows, COPY=pow2(rows * layout["RW"]),
                **self._tile_constants(layout, splits, tuning.tile_up_words), num_warps=splits,
                num_stages=tuning.tile_stages,
            )  # fmt: skip
            return
        words = 2 * shape.hidden // layout["V"]  # of a row of gate and of up
        rows, warps, runs = _packed_tile(words, layout["QW"], tuning.packed_up_rows)
        self._run(
            packed.gate_up, (fetchers + distinct * triton.cdiv(shape.intermediate, rows),), self.planes, *work,
            self.normed, packed.MAGIC, **sizes, **layout, BI=rows, RUNS=runs, COPY=pow2(rows * layout["RW"]),
            num_warps=warps,
        )  # fmt: skip

    def down(self, layer: int) -> None:
        """The picked experts' second product, weighted, with the shared expert and the residual, into `x`."""
        shape, pages, tuning = self.shape, self.pages, self.options.tuning
        weights = self.weights.layers[layer]
        mlp = None if weights.adds_apart else weights.mlp
        switch = None if mlp is None else mlp.switch
        picks = shape.top_k * shape.intermediate
        stream, out = (self.nothing, self.branch) if weights.joins else (self.mid, self.x)
        lora, rank = self._shrink(self.normed, None, self._changes(layer).expert, gated=True)
        beside = (stream, self.shared, stream if switch is None else switch, self.normed, *lora, out)
        sizes = {
            "K": shape.top_k, "H": shape.hidden, "HP": pow2(shape.hidden), "I": shape.intermediate,
            "SHARED": 0 if mlp is None else 1 if switch is None else 2, "PAGED": pages.shape.paged,
            "BIAS": expert_constants(shape.experts, packed=shape.packed is not None)["BIAS"],
            "SCALE": (1.0 if weights.joins else shape.scales.residual) * shape.scales.mixed,
            "ROUTED": shape.scales.routed,
            "ADAPTED": self.options.adapted, "RANK": rank,
        }  # fmt: skip
        if shape.packed is None:
            rows = tuning.down_rows
            while rows > 1 and rows * picks > MOST_DOWN_ELEMENTS:
                rows //= 2
            self._run(
                experts.down, (self.batch, triton.cdiv(shape.hidden, rows)),
                self.act, pages.slots, pages.pair_target, pages.pair_source, self.pick_weights, *beside, **sizes,
                BH=rows, BC=tuning.down_columns, FETCH=self._down_fetches,
                num_warps=tuning.down_warps,
            )  # fmt: skip
            return
        layout = row_constants(shape.packed[1], shape.intermediate)
        if self._in_tiles:
            self._down_tiles(sizes, layout, beside)
            return
        rows, warps, runs = _packed_tile(picks // layout["V"], layout["QW"], tuning.packed_down_rows)
        self._run(
            packed.down, (self.batch, triton.cdiv(shape.hidden, rows)),
            self.act, pages.slots, pages.pair_target, self.pick_weights, *beside, packed.MAGIC,
            **sizes, **layout, BH=rows, RUNS=runs, BEFORE=shape.down_at, num_warps=warps,
        )  # fmt: skip

    def _down_tiles(self, sizes: dict[str, Any], layout: dict[str, Any], beside: tuple[Tensor, ...]) -> None:
        """`down` by tensor cores: the product of each pick, then their sum."""
        shape, pages, tuning = self.shape, self.pages, self.options.tuning
        rows, splits = tuning.tile_down_rows, tuning.tile_down_splits
        distinct, tiles = min(shape.num_experts, self.batch * shape.top_k), triton.cdiv(shape.hidden, rows)
        run = triton.cdiv(distinct * tiles, tuning.tile_down_programs)
        self._run(
            packed_tiles.down_tiles, (distinct, triton.cdiv(tiles, run)),
            self.act, pages.slots, pages.header, pages.target, pages.count, pages.pairs, self.picks,
            run, H=shape.hidden, I=shape.intermediate, BH=rows, STRIDE=pages.pairs.shape[1], BEFORE=shape.down_at,
            BIAS=sizes["BIAS"], **self._tile_constants(layout, splits, tuning.tile_down_words),
            num_warps=tuning.tile_down_warps, num_stages=tuning.tile_stages,
        )  # fmt: skip
        names = ("K", "H", "HP", "SHARED", "SCALE", "ROUTED", "ADAPTED", "RANK")
        self._run(
            packed_tiles.join_picks, (self.batch, triton.cdiv(shape.hidden, JOIN_BLOCK)),
            self.picks, self.pick_weights, *beside, **{name: sizes[name] for name in names}, BH=JOIN_BLOCK, num_warps=4,
        )  # fmt: skip

    def _tile_constants(self, layout: dict[str, Any], splits: int, words: int) -> dict[str, Any]:
        """Constants of a product by tensor cores: the rows' layout, and runs of words that share a scale."""
        sizes = {"BT": self.options.tuning.tile_tokens, "S": splits, "BW": words}
        return layout | sizes | {"QW": divisor(layout["GW"], words)}

    @property
    def _down_fetches(self) -> bool:
        """Whether plain experts' second product fetches its own rows; it fetches no biases."""
        return self.batch == 1 and self.options.tuning.down_fetches and self.shape.experts.bias is None

    def head(self) -> None:
        """Logits of the new tokens."""
        weights = self.weights
        rows = self.options.tuning.head_rows
        self._product(self.x, weights.norm, weights.head, weights.head_bias, None, self.logits, rows)

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
        launch(kernel, grid, *args, compiles=self._compiles, PDL=self.options.pdl, **constants)

    def _row_product(
        self, x: Tensor, norm: Tensor | None, weight: Matrix, bias: Tensor | None, residual: Tensor | None,
        out: Tensor, rows: int, change: LowRank | None = None, eps: float | None = None,
    ) -> None:  # fmt: skip
        """out = norm(x) · weightᵀ + bias + residual, `rows` of the weight in each program; adapters may change the
        product. eps of the norm, None: that of the layers."""
        num_rows, width = weight.shape
        rows = max(1, min(rows, MOST_ROW_ELEMENTS // pow2(width)))
        eps = self.shape.eps if eps is None else eps
        lora, rank = self._shrink(x, norm, change, eps)
        codes, scales, group = _codes_of(weight)
        self._run(
            trunk.product, (triton.cdiv(num_rows, rows),),
            x, x if norm is None else norm, codes, scales, x if bias is None else bias,
            x if residual is None else residual, out, *lora, eps, num_rows,
            B=self.batch, K=width, KP=pow2(width), STRIDE=x.stride(0), BN=rows, GROUP=group, NORM=self._norm_of(norm),
            BIAS=bias is not None, RESIDUAL=residual is not None, **self._factors(out, residual),
            ADAPTED=self.options.adapted, RANK=rank,
            num_warps=self.options.tuning.product_warps,
        )  # fmt: skip

    def _shrink(
        self, x: Tensor, norm: Tensor | None, change: LowRank | None, eps: float = 0.0, *, gated: bool = False
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """The first half of a product's change, lora_a · norm(x), into `low`; returns what a product's kernel takes for
        the second half: adapters, lora_b and `low`, and the rank, 0 if the product is not changed. eps of the norm."""
        if change is None:
            return (self.adapters, x, x), 0
        rank, width = change.b.shape[2], change.a.shape[2]
        rows = max(1, min(rank, MOST_ROW_ELEMENTS // (2 if gated else 1) // pow2(width)))
        self._run(
            trunk.shrink, (rank // rows, self.batch),
            x, x if norm is None else norm, change.a, self.adapters, self.low, eps,
            K=width, KP=pow2(width), STRIDE=x.stride(0), RANK=rank, BR=rows, NORM=norm is not None, GATED=gated,
            num_warps=self.options.tuning.product_warps,
        )  # fmt: skip
        return (self.adapters, change.b, self.low), rank

    def _factors(self, out: Tensor, residual: Tensor | None) -> dict[str, float]:
        """The factor of a product, which logits and what joins the residual stream have, and the cap of logits."""
        scales = self.shape.scales
        if out is self.logits:
            return {"SCALE": scales.logits, "CAP": scales.cap}
        return {"SCALE": 1.0 if residual is None else scales.residual, "CAP": 0.0}

    def _tiled_product(
        self, x: Tensor, norm: Tensor | None, weight: Matrix, bias: Tensor | None, residual: Tensor | None,
        out: Tensor, rows: int, change: LowRank | None = None, eps: float | None = None,
    ) -> None:  # fmt: skip
        """The same by tensor cores, in tiles of weights and all rows of the batch; `rows` is for the other."""
        num_rows, width = weight.shape
        tuning = self.options.tuning
        if norm is not None:
            sizes = {"K": width, "KP": pow2(width), "STRIDE": x.stride(0), "NORM": self._norm_of(norm)}
            given = (x, norm, self.normed, self.adapters, self.shape.eps if eps is None else eps)
            self._run(trunk.norm_rows, (self.batch,), *given, **sizes, ADAPTED=self.options.adapted, num_warps=8)
            x = self._rows_of(self.normed, width)
        lora, rank = self._shrink(x, None, change)
        codes, scales, group = _codes_of(weight)
        tile = tuning.tiled_rows if num_rows >= 132 * tuning.tiled_rows else 16
        tile_bytes = tuning.tiled_bytes // (1 if self.shape.max_rows <= MOST_IN_WIDE_TILES else 2)
        self._run(
            trunk.tiled_product, (triton.cdiv(num_rows, tile),),
            x, codes, scales, x if bias is None else bias, x if residual is None else residual, out, *lora, num_rows,
            B=self.batch, BP=max(16, pow2(self.batch)), K=width, STRIDE=x.stride(0), BN=tile,
            BK=divisor(width, min(tile_bytes // codes.element_size(), group or width)), GROUP=group,
            BIAS=bias is not None, RESIDUAL=residual is not None, **self._factors(out, residual), RANK=rank,
            num_warps=4 if tile >= 32 else 2, num_stages=tuning.tiled_stages,
        )  # fmt: skip

    def _rows_of(self, buffer: Tensor, width: int) -> Tensor:
        """The first elements of a buffer as [B, width]."""
        return buffer.view(-1)[: self.batch * width].view(self.batch, width)

    def _gated(self, layer: int, mlp: MlpWeights) -> Tensor:
        """The gated product [B, I] of gate · y and up · y, a view of `inner`; y is the norm of `mid`."""
        num_rows, width = mlp.up.shape[0] // 2, mlp.up.shape[1]
        out = self._rows_of(self.inner, num_rows)
        norm = self.weights.layers[layer].post_norm if mlp.norm is None else mlp.norm
        rows = max(1, min(self.options.tuning.up_rows, MOST_ROW_ELEMENTS // 2 // pow2(width)))
        lora, rank = self._shrink(self._seen, norm, self._changes(layer).up, self.shape.eps)
        self._run(
            trunk.gated_product, (triton.cdiv(num_rows, rows),),
            self._seen, mlp.up if norm is None else norm, mlp.up, out, *lora, self.shape.eps, num_rows,
            B=self.batch, K=width, KP=pow2(width), BN=rows, NORM=self._norm_of(norm),
            GATE=self.shape.mlp_gate.constants, ADAPTED=self.options.adapted, RANK=rank,
            num_warps=self.options.tuning.product_warps,
        )  # fmt: skip
        return out


def _codes_of(weight: Matrix) -> tuple[Tensor, Tensor, int]:
    """Weights, their scales and the columns that share one; 0: they have none."""
    if isinstance(weight, ScaledMatrix):
        return weight.codes, weight.scales, min(weight.group, pow2(weight.codes.shape[1]))
    return weight, weight, 0


def _packed_tile(words: int, run_words: int, rows: int) -> tuple[int, int, int]:
    """Rows of a program of a packed product, its warps, and the runs that it takes at a time: a warp holds a whole row
    if it can."""
    while rows > 1 and rows * words > WARP_WORDS:
        rows //= 2
    warps = min(8, pow2(triton.cdiv(rows * words, WARP_WORDS)))
    return rows, warps, min(THREADS * warps, pow2(words // run_words))


def _most_rank(weights: LayerWeights) -> int:
    """The largest rank by which adapters change a product of the layer; 0: none does."""
    changes = weights.changes or LayerChanges()
    products = (changes.qkv, changes.latents, changes.output, changes.up, changes.down, changes.expert)
    return max((one.b.shape[2] for one in products if one is not None), default=0)


def _gate(weights: LayerWeights) -> Tensor:
    assert weights.gate is not None, "the layer has no routed experts"
    return weights.gate
