"""Compiles the kernels of steps and draws for GPUs that need not be there, and says which ones cannot be.

Run as a program, since Triton decides at its import whether kernels are interpreted: arguments are the compute
capability and names of shapes below. It prints a line for each step that it compiled. All tensors are on the meta
device; what differs from a GPU's step is the driver alone, which only tells Triton for what to compile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from expert_store.encoding import RowEncoding
from expert_store.paging.pages import DevicePages, PagesShape
from server.model.device.step.graphs import in_parallel
from server.model.device.step.mixers.states import StateLayer
from server.model.device.step.parts import (
    GELU,
    AttentionKind,
    ConvolutionKind,
    DeltaKind,
    ExpertKind,
    GateKind,
    LatentKind,
    MambaKind,
    Scales,
    StateKind,
)
from server.model.device.step.router_kind import RouterKind
from server.model.device.step.sampling import DrawKind, DrawRoom, TokenDraw
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import (
    ConvolutionWeights,
    DecodeShape,
    DeltaWeights,
    LatentWeights,
    LayerChanges,
    LayerKind,
    LayerWeights,
    LowRank,
    MambaWeights,
    Matrix,
    MlpWeights,
    ScaledMatrix,
    TrunkWeights,
)


@dataclass(frozen=True)
class Case:
    """A shape, its slots a layer, and the (batch, masked, resident_bias, policy) that it is compiled for.

    `rank`: by which adapters change each product in masked steps; 0: there are none.
    """

    shape: DecodeShape
    slots: int
    steps: tuple[tuple[int, bool, float, str], ...]
    rank: int = 0


TINY = DecodeShape(
    num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=32, vocab=96, num_experts=12, top_k=3,
    intermediate=32, max_rows=8, max_tokens=64, dtype=torch.float32,
)  # fmt: skip
BUNDLED = DecodeShape(
    num_layers=8, hidden=256, num_heads=4, num_kv_heads=2, head_dim=64, vocab=4096, num_experts=64, top_k=8,
    intermediate=128, max_rows=32, max_tokens=512,
)  # fmt: skip
QWEN3 = DecodeShape(
    num_layers=48, hidden=2048, num_heads=32, num_kv_heads=4, head_dim=128, vocab=151936, num_experts=128, top_k=8,
    intermediate=768, max_rows=32, max_tokens=1024,
)  # fmt: skip
TRACED = replace(QWEN3, num_layers=26, num_experts=64, top_k=6, intermediate=1408)
MIXTRAL = replace(QWEN3, num_kv_heads=8, num_experts=8, top_k=2, intermediate=1024, qk_norm="none", windows=(64,) * 48)
GLM4 = replace(
    QWEN3, num_layers=2, num_heads=96, num_kv_heads=8, hidden=4096, num_experts=160, intermediate=1408, rotary=64,
    dense_layers=frozenset({0}), dense_intermediate=10944, shared_intermediate=1408,
    router=RouterKind(
        scores="sigmoid", eps=1e-20, selection_bias="e_score_correction_bias", groups=8, kept_groups=4, scale=2.5,
        exact_logits=True, exact_weights=True,
    ),
)  # fmt: skip
MINIMAX = replace(
    GLM4, num_heads=48, hidden=3072, num_experts=256, intermediate=1536, qk_norm="row", dense_layers=frozenset(),
    shared_intermediate=0, router=RouterKind(scores="sigmoid", selection_bias="bias", exact_weights=True),
)  # fmt: skip
QWEN2 = replace(
    QWEN3, num_layers=2, num_heads=16, num_kv_heads=16, num_experts=60, top_k=4, intermediate=1408,
    shared_intermediate=5632, qk_norm="none", router=RouterKind(renormalise=False),
)  # fmt: skip

PACKED = {
    name: replace(QWEN3, packed=encodings)
    for name, encodings in {
        "int4": (RowEncoding("int4", 64, "F16", zeros="U8"), RowEncoding("int4", 32, "F16", zeros="U8")),
        "fp8": (RowEncoding("fp8", 128, "F32"), RowEncoding("fp8", 128, "F32")),
        "mxfp4": (RowEncoding("fp4", 32, "F8_E8M0"), RowEncoding("fp4", 32, "F8_E8M0")),
        "nvfp4": tuple(RowEncoding("fp4", 16, "F8_E4M3", overall=how) for how in ("factor", "divisor")),
        "int8": (RowEncoding("int8", 128, "BF16", zeros="I16"), RowEncoding("int8", 768, "BF16")),
    }.items()
}

GPT_OSS = replace(
    QWEN3, num_layers=2, num_heads=64, num_kv_heads=8, head_dim=64, hidden=2880, vocab=201088, num_experts=32, top_k=4,
    intermediate=2880, qk_norm="none", windows=(128, 0), router=RouterKind(exact_scores=False),
    experts=ExpertKind(GateKind(1.702, 7.0, 1.0), alternates=True, bias=torch.bfloat16),
)  # fmt: skip

ERNIE = replace(
    QWEN2, num_heads=20, num_kv_heads=4, hidden=2560, num_experts=64, top_k=6, intermediate=1536,
    shared_intermediate=3072, neighbours=True, dense_layers=frozenset({0}), dense_intermediate=12288,
    router=RouterKind(floor=1e-12, selection_bias="moe_statics.e_score_correction_bias", exact_logits=True),
)  # fmt: skip
HUNYUAN = replace(
    QWEN3, num_layers=2, num_heads=32, num_kv_heads=8, hidden=4096, num_experts=64, intermediate=3072,
    shared_intermediate=3072, qk_norm="head, rotated", scales=Scales(12.0, 0.22, 0.125, 2.0),
)  # fmt: skip

MIMO = replace(
    MINIMAX, num_layers=2, num_heads=64, hidden=4096, qk_norm="none", windows=(0, 129),
    attentions=tuple(AttentionKind(64, kv_heads, 192, 128, 64, value_scale=0.707) for kv_heads in (4, 8)),
)  # fmt: skip

DELTAS = replace(TINY, attentions=(DeltaKind(2, 4, 16, 32, 4), AttentionKind(4, 2, 32, 32, 16, gate="sigmoid")))
CHANNELS = replace(
    TINY, dtype=torch.float16, qk_norm="none", scaling=0.1, dense_layers=frozenset({0}), dense_intermediate=64,
    attentions=(
        DeltaKind(4, 4, 32, 32, 4, by_channel=True, sigmoid=True, rank=16),
        LatentKind(5, 16, 24, 32, 48, pairs="halves", gated=True),
    ),
)  # fmt: skip
LATENTS = replace(
    TINY, attentions=(LatentKind(5, 16, 24, 32, 40, 48),) * 2, qk_norm="none", scaling=0.1,
    dense_layers=frozenset({0}), dense_intermediate=64, shared_intermediate=32,
)  # fmt: skip
HALF = replace(TINY, dtype=torch.bfloat16)
CONVOLUTIONS = replace(HALF, attentions=(ConvolutionKind(48, 3), TINY.attention(0)))
MAMBAS = replace(HALF, attentions=(MambaKind(2, 6, 16, 32, 4, least=1e-3, norms=2), TINY.attention(0)))
DEEPSEEK_V3 = replace(
    GLM4, num_layers=2, hidden=7168, vocab=129280, attentions=(LatentKind(128, 512, 128, 64, 128, 1536),) * 2,
    qk_norm="none", scaling=0.13, num_experts=256, intermediate=2048, dense_layers=frozenset({0}),
    dense_intermediate=18432, shared_intermediate=2048, router=replace(GLM4.router, groups=8, kept_groups=4, scale=2.5),
)  # fmt: skip
DEEPSEEK_V2_LITE = replace(
    DEEPSEEK_V3, hidden=2048, vocab=102400, num_experts=64, top_k=6, intermediate=1408,
    attentions=(LatentKind(16, 512, 128, 64, 128, 0, "neighbours"),) * 2, dense_intermediate=10944,
    shared_intermediate=2816, router=RouterKind(renormalise=False, exact_logits=True, exact_weights=True),
)  # fmt: skip
GLM4_LITE = replace(
    DEEPSEEK_V3, hidden=2048, vocab=154880, num_experts=64, top_k=4, intermediate=1536,
    attentions=(LatentKind(20, 512, 192, 64, 256, 768),) * 2, dense_intermediate=10240, shared_intermediate=1536,
    router=replace(GLM4.router, groups=1, kept_groups=1, scale=1.8),
)  # fmt: skip
GEMMA = replace(
    QWEN3, num_layers=2, hidden=2816, vocab=262144, intermediate=704, shared_intermediate=2112, windows=(1024, 0),
    attentions=(
        AttentionKind(16, 8, 256, 256, 256, value_norm=True),
        AttentionKind(16, 2, 512, 512, 512, values_are_keys=True, value_norm=True),
    ),
    experts=ExpertKind(GELU), mlp_gate=GELU, scales=Scales(53.0, rounds_embedding=True, cap=30.0),
    router=RouterKind(own_norm=2816**-0.5, expert_factors="per_expert_scale", exact_weights=True),
)  # fmt: skip

QWEN36 = replace(
    QWEN3, num_layers=4, vocab=248320, num_experts=256, intermediate=512, shared_intermediate=512,
    attentions=(*[DeltaKind(16, 32, 128, 128, 4)] * 3, AttentionKind(16, 2, 256, 256, 64, gate="sigmoid")),
)  # fmt: skip
"""Qwen3.6-35B-A3B."""
KIMI_LINEAR = replace(
    DEEPSEEK_V3, num_layers=4, hidden=2304, vocab=163840, num_experts=256, intermediate=1024,
    attentions=(
        *[DeltaKind(32, 32, 128, 128, 4, by_channel=True, sigmoid=True, rank=128)] * 3,
        LatentKind(32, 512, 128, 64, 128, pairs="halves"),
    ),
    dense_intermediate=9216, shared_intermediate=1024,
    router=replace(GLM4.router, groups=1, kept_groups=1, scale=2.446),
)  # fmt: skip
LING = replace(
    KIMI_LINEAR, hidden=2560, vocab=157184, num_experts=512, intermediate=768, dense_intermediate=6144,
    attentions=(
        *[DeltaKind(32, 32, 128, 128, 4, by_channel=True, bound=-5.0, rounds=True, sigmoid=True)] * 3,
        LatentKind(32, 512, 128, 64, 128, gated=True),
    ),
    shared_intermediate=768, router=replace(GLM4.router, groups=8, kept_groups=4, scale=2.5),
)  # fmt: skip
"""Ling 3 Flash, which keeps its convolutions in fp32."""
LFM2 = replace(
    QWEN3, num_layers=3, num_kv_heads=8, head_dim=64, vocab=65536, num_experts=32, top_k=4, intermediate=1792,
    attentions=(ConvolutionKind(2048, 3), ConvolutionKind(2048, 3), AttentionKind(32, 8, 64, 64, 64)),
    dense_layers=frozenset({0}), dense_intermediate=7168,
    router=RouterKind(scores="sigmoid", eps=1e-6, selection_bias="expert_bias"),
)  # fmt: skip
"""LFM2-8B-A1B."""
GRANITE4 = replace(
    QWEN3, num_layers=2, num_heads=12, num_kv_heads=4, hidden=1536, vocab=100352, num_experts=64, top_k=6,
    intermediate=512, shared_intermediate=1024, qk_norm="none", scaling=1 / 128, scales=Scales(12.0, 0.22, 1 / 6),
    attentions=(MambaKind(1, 48, 128, 64, 4), AttentionKind(12, 4, 128, 128, 128)),
)  # fmt: skip
"""Granite-4.0-H-Tiny."""
PHIMOE = replace(
    QWEN3, num_layers=2, num_kv_heads=8, hidden=4096, vocab=32064, num_experts=16, top_k=2, intermediate=6400,
    qk_norm="none", norm="layer", router=RouterKind(renormalise=False, tolerance=0.02),
)  # fmt: skip
PARALLEL = replace(
    TINY, is_parallel=True, output_gate="softplus by head", shared_intermediate=32, scales=Scales(mixed=0.5, cap=3.0),
    router=RouterKind(scores="sigmoid", by_logits=True, selection_bias="bias"),
)  # fmt: skip

EVERY_KIND = replace(
    TINY, dense_layers=frozenset({0}), dense_intermediate=64, shared_intermediate=32, rotary=16, windows=(16, 0),
    qk_norm="none", router=replace(GLM4.router, groups=4, kept_groups=2),
    experts=ExpertKind(GateKind(1.702, 7.0, 1.0), alternates=True, bias=torch.float32), neighbours=True,
    scales=Scales(3.0, 0.5, 0.25, 1.5), output_gate="sigmoid",
)  # fmt: skip

_PLAIN, _ALL = (1, False, 0.0, "lru"), (1, True, 0.1, "lfu")
CASES = {
    "tiny": Case(TINY, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "tiny, few slots": Case(TINY, 3, (_ALL, (5, True, 0.0, "lru"))),
    "tiny, every kind": Case(EVERY_KIND, 6, (_PLAIN, (2, True, 0.1, "lfu"))),
    "tiny, every kind, adapted": Case(EVERY_KIND, 6, ((1, True, 0.1, "lru"), (2, True, 0.0, "lru")), rank=16),
    "tiny, latents, adapted": Case(LATENTS, 6, ((1, True, 0.0, "lru"), (2, True, 0.0, "lru")), rank=16),
    "tiny, delta nets, adapted": Case(DELTAS, 6, ((1, True, 0.0, "lru"), (2, True, 0.0, "lru")), rank=16),
    "qwen3, adapted": Case(QWEN3, 32, ((1, True, 0.0, "lru"), (8, True, 0.0, "lru")), rank=64),
    "qwen2, adapted": Case(QWEN2, 15, ((1, True, 0.0, "lru"), (8, True, 0.0, "lru")), rank=256),
    "bundled": Case(BUNDLED, 16, ((1, True, 0.0, "lru"), (32, False, 0.0, "lru"))),
    "half": Case(replace(BUNDLED, dtype=torch.float16, block_tokens=128), 8, ((4, True, 0.1, "lfu"),)),
    "qwen3": Case(QWEN3, 32, (_PLAIN, (8, True, 0.1, "lfu"))),
    "qwen3, 64 rows": Case(replace(QWEN3, num_layers=1, max_rows=64), 32, ((64, True, 0.0, "lru"),)),
    "traced": Case(TRACED, 16, (_PLAIN,)),
    "mixtral": Case(MIXTRAL, 4, (_PLAIN, (8, True, 0.0, "lru"))),
    "glm4": Case(GLM4, 40, ((1, True, 0.1, "lru"), (8, False, 0.0, "lru"))),
    "minimax": Case(MINIMAX, 40, (_PLAIN, (4, True, 0.0, "lru"))),
    **{name: Case(shape, 32, (_PLAIN, (8, True, 0.0, "lru"))) for name, shape in PACKED.items()},
    "gpt-oss": Case(GPT_OSS, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "gpt-oss, mxfp4": Case(replace(GPT_OSS, packed=PACKED["mxfp4"].packed), 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "ernie": Case(ERNIE, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "hunyuan": Case(HUNYUAN, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "mimo": Case(MIMO, 40, (_PLAIN, (8, True, 0.0, "lru"))),
    "tiny, latents": Case(LATENTS, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "deepseek-v3": Case(DEEPSEEK_V3, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "deepseek-v3 in float32": Case(replace(DEEPSEEK_V3, dtype=torch.float32), 16, ((2, True, 0.0, "lru"),)),
    "deepseek-v2-lite": Case(DEEPSEEK_V2_LITE, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "glm-4-lite": Case(GLM4_LITE, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "phimoe": Case(PHIMOE, 8, (_PLAIN, (8, True, 0.0, "lru"))),
    "tiny, in parallel": Case(PARALLEL, 6, (_PLAIN, (2, True, 0.1, "lfu"))),
    "gemma": Case(GEMMA, 40, (_PLAIN, (8, True, 0.0, "lru"))),
    "tiny, delta nets": Case(DELTAS, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "tiny, decays by channel": Case(CHANNELS, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "kimi-linear": Case(KIMI_LINEAR, 64, (_PLAIN, (8, True, 0.0, "lru"))),
    "ling": Case(LING, 64, (_PLAIN, (8, True, 0.0, "lru"))),
    "qwen3.6": Case(QWEN36, 64, (_PLAIN, (8, True, 0.0, "lru"))),
    "tiny, convolutions": Case(CONVOLUTIONS, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "tiny, mamba": Case(MAMBAS, 6, (_PLAIN, (2, True, 0.0, "lru"))),
    "lfm2": Case(LFM2, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "granite-4": Case(GRANITE4, 16, (_PLAIN, (8, True, 0.0, "lru"))),
    "qwen2": Case(QWEN2, 15, (_PLAIN, (2, False, 0.0, "lru"))),
}


class Ahead:
    """What Triton asks of a driver to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def trunk(shape: DecodeShape, rank: int = 0) -> TrunkWeights:
    """Weights without memory; attention and head in FP8 where the experts are."""
    more = ("attention_norm", "branch_norm", "routed_norm", "gate_norm") if shape.router.own_norm else ()

    def matrix(*size: int) -> Tensor:
        return torch.empty(size, dtype=shape.dtype, device="meta")

    def in_fp32(*size: int) -> Tensor:
        return torch.empty(size, device="meta")

    def linear(rows: int, columns: int) -> Matrix:
        if shape.packed is None or shape.packed[0].codes != "fp8":
            return matrix(rows, columns)
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
        return ScaledMatrix(codes, in_fp32(rows, -(-columns // 128)), 128)

    def mlp(inner: int) -> MlpWeights:
        switch = matrix(shape.hidden) if shape.qk_norm == "none" else None
        norms = dict.fromkeys(("norm", "after"), matrix(shape.hidden)) if shape.router.own_norm else {}
        return MlpWeights(matrix(2 * inner, shape.hidden), matrix(shape.hidden, inner), switch, **norms)

    def changes(attention: LayerKind, inner: int) -> LayerChanges:
        sizes = {"qkv": (shape.hidden, attention.qkv), "output": (attention.width, shape.hidden)}
        if isinstance(attention, LatentKind) and attention.query_rank:
            sizes["latents"] = (attention.query_rank, attention.num_heads * attention.query)
        if isinstance(attention, DeltaKind) and attention.rank:
            sizes["latents"] = (2 * attention.rank, attention.gates)
        if inner:
            sizes |= {"up": (shape.hidden, 2 * inner), "down": (inner, shape.hidden)}
        low = {
            name: LowRank(matrix(1, rank, inputs), matrix(1, outputs, rank))
            for name, (inputs, outputs) in sizes.items()
        }
        return LayerChanges(
            **low,
            expert=LowRank(matrix(1, 2 * rank, shape.hidden), matrix(1, shape.hidden, rank)),
            delta=matrix(1, shape.num_experts, shape.hidden),
            gains=in_fp32(2, shape.num_experts),
        )

    def latent_weights(kind: LatentKind) -> LatentWeights:
        expand = matrix(kind.num_heads * (kind.nope + kind.value_dim), kind.rank)
        has_latent = kind.query_rank > 0
        return LatentWeights(expand, matrix(kind.num_heads * kind.query, kind.query_rank) if has_latent else None)

    def convolution_weights(kind: StateKind, has_bias: bool = False) -> ConvolutionWeights:
        return ConvolutionWeights(matrix(kind.kernel, kind.channels), matrix(kind.channels) if has_bias else None)

    def delta_weights(kind: DeltaKind) -> DeltaWeights:
        conv = (in_fp32 if kind.bound else matrix)(kind.kernel, kind.channels)
        norm = (in_fp32 if kind.sigmoid else matrix)(kind.value_dim)
        expand = matrix(kind.gates, 2 * kind.rank) if kind.rank else None
        return DeltaWeights(ConvolutionWeights(conv), norm, in_fp32(kind.value_heads), in_fp32(kind.decays), expand)

    def mamba_weights(kind: MambaKind) -> MambaWeights:
        of_heads = in_fp32(kind.heads)
        return MambaWeights(convolution_weights(kind, True), matrix(kind.width), of_heads, of_heads, of_heads)

    def layer(at: int) -> LayerWeights:
        dense, attention = at in shape.dense_layers, shape.attention(at)
        norms = attention.head_dim * (attention.num_heads if shape.qk_norm == "row" else 1)
        table = in_fp32(shape.max_tokens, attention.head_dim // 2)
        inner = shape.dense_intermediate if dense else shape.shared_intermediate
        bias = in_fp32(shape.num_experts)
        norm = (in_fp32 if shape.experts.alternates else matrix)(shape.hidden)
        norm = in_fp32(2, shape.hidden) if shape.norm == "layer" else norm
        return LayerWeights(
            norm, linear(attention.qkv, shape.hidden), matrix(norms), matrix(norms),
            linear(shape.hidden, attention.width), norm,
            None if dense else matrix(shape.num_experts, shape.hidden), table, table,
            qkv_bias=matrix(attention.qkv) if shape.qk_norm == "none" else None,
            selection_bias=None if shape.router.selection_bias is None else bias,
            sinks=in_fp32(shape.num_heads) if shape.experts.alternates else None,
            latent=latent_weights(attention) if isinstance(attention, LatentKind) else None,
            delta=delta_weights(attention) if isinstance(attention, DeltaKind) else None,
            mamba=mamba_weights(attention) if isinstance(attention, MambaKind) else None,
            convolution=convolution_weights(attention) if isinstance(attention, ConvolutionKind) else None,
            mlp=mlp(inner) if inner else None,
            changes=changes(attention, inner) if rank else None,
            expert_factors=None if shape.router.expert_factors is None else bias,
            factor=matrix(1) if shape.router.own_norm else None,
            **dict.fromkeys(more, matrix(shape.hidden)),
        )  # fmt: skip

    return TrunkWeights(
        matrix(shape.vocab, shape.hidden), tuple(layer(at) for at in range(shape.num_layers)),
        matrix(shape.hidden), linear(shape.vocab, shape.hidden),
    )  # fmt: skip


def steps(case: Case, pdl: bool) -> Iterator[tuple[str, DecodeStep]]:
    """The case's steps with what they are for."""
    shape = case.shape
    for batch, masked, bias, policy in case.steps:
        size = PagesShape(
            shape.num_moe_layers, shape.num_experts, shape.top_k, case.slots, shape.span_elements, shape.max_rows,
            shape.span_dtype,
        )  # fmt: skip
        pages = DevicePages(size, None, device="meta", policy=policy)  # type: ignore[arg-type]
        is_adapted = masked and case.rank > 0
        options = StepOptions(
            pdl=pdl and batch == 1, masked=masked, adapted=is_adapted, resident_bias=bias, batch_invariant=not masked
        )
        step = DecodeStep(
            shape, trunk(shape, case.rank if is_adapted else 0), pages, RowState(shape, "meta"), batch, options
        )
        yield f"batch {batch}, masked {masked}, bias {bias}, {policy}", step


def main(capability: int, names: list[str]) -> int:
    """Compiles; returns how many steps could not be."""
    ahead: Any = Ahead(capability)
    driver.set_active(ahead)
    failed = 0
    for name in names:
        for at, (what, step) in enumerate(steps(CASES[name], pdl=capability >= 90)):
            try:
                with in_parallel():
                    step.compile()
                    for layer, delta in [] if at else list(step.shape.stateful.items())[:1]:
                        StateLayer(delta, step.shape.eps, step.weights.layers[layer], 0).compile_kernels()
                    for kind in [] if at else DrawKind.all():  # the same kernels for every batch size
                        TokenDraw(step.logits, kind, DrawRoom(step.batch, step.shape.vocab, "meta")).compile()
                print(f"compiled {name}: {what}", flush=True)
            except Exception as error:
                failed += 1
                print(f"FAILED {name}: {what}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]), sys.argv[2:] or list(CASES)) else 0)
