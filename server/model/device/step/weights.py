"""The model's shape and its trunk weights, packed for the kernels of a decode step.

The shape describes all differences between families; each such field is a switch of a kernel, and the code that packs a
model refuses a difference without a field. Weights stay in the model's dtype; rotary tables are fp32 with values
rounded to that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from expert_store.adapter import Changes
from expert_store.encoding import RowEncoding
from server.model.device.step.parts import (
    PLAIN_EXPERT,
    SILU,
    UNSCALED,
    AttentionKind,
    ExpertKind,
    GateKind,
    LatentKind,
    OutputGate,
    Scales,
    StateKind,
)
from server.model.device.step.router_kind import SOFTMAX_TOP_K, RouterKind
from server.model.kv.blocks import BLOCK_TOKENS

LayerKind = AttentionKind | LatentKind | StateKind
NormKind = Literal["rms", "layer"]
QkNorm = Literal["none", "head", "row", "head, rotated"]


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of the model, in elements; `max_tokens` is the most of one row, `max_rows` the number of rows.

    Attributes:
        num_layers: layers of the model, including those without routed experts.
        block_tokens: tokens of a block of KV memory, a power of two.
        norm: the kind of all norms over the hidden state; layer norms, which subtract the mean, have [2, H] numbers:
            weights, then biases.
        is_parallel: experts, or the layer's product, read what attention reads, not what it has added.
        qk_norm: queries and keys are normalised by head, over all heads together, by head after they were rotated, or
            not.
        rotary: number of rotated elements of a head, its first ones; None: all.
        output_gate: what attention puts out is multiplied, element by element, by this function of a product of the
            layer's input.
        attentions: the attention of each layer; empty: all have `num_heads`, `num_kv_heads`, `head_dim`, `rotary`
            and `output_gate`.
        neighbours: an element is rotated with the one beside it, not with the one half of them away.
        windows: for each layer the number of tokens to attend to, the new one included, 0: all; empty: all in each.
        dense_layers: layers that have no routed experts but one gated product, of `dense_intermediate`.
        shared_intermediate: I of the expert that every token uses beside the routed ones; 0: there is none.
        scales: factors of a token's way through the layers.
        experts, mlp_gate: the parts of routed experts, and of the products that every token uses.
        packed: encodings of the routed experts' gate_up and down rows; None: they are plain, in `dtype`.
        shares_prompts: prompts that begin alike share what was read of them.
    """

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    num_experts: int
    top_k: int
    intermediate: int
    max_rows: int
    max_tokens: int
    block_tokens: int = BLOCK_TOKENS
    eps: float = 1e-6
    scaling: float | None = None
    norm: NormKind = "rms"
    is_parallel: bool = False
    qk_norm: QkNorm = "head"
    rotary: int | None = None
    output_gate: OutputGate = "none"
    attentions: tuple[LayerKind, ...] = ()
    neighbours: bool = False
    windows: tuple[int, ...] = ()
    dense_layers: frozenset[int] = frozenset()
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    router: RouterKind = SOFTMAX_TOP_K
    experts: ExpertKind = PLAIN_EXPERT
    mlp_gate: GateKind = SILU
    scales: Scales = UNSCALED
    dtype: torch.dtype = torch.bfloat16
    packed: tuple[RowEncoding, RowEncoding] | None = None
    shares_prompts: bool = True

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, L."""
        return self.num_layers - len(self.dense_layers)

    @property
    def max_blocks(self) -> int:
        """Blocks of KV memory of the longest row."""
        return -(-self.max_tokens // self.block_tokens)

    def attention(self, layer: int) -> LayerKind:
        """The attention of a layer of the model, or what stands in its place."""
        if self.attentions:
            return self.attentions[layer]
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim)
        return AttentionKind(*sizes, rotary=self.rotary or self.head_dim, gate=self.output_gate)

    @property
    def each_attention(self) -> list[LayerKind]:
        """The attention of every layer, first layer first."""
        return [self.attention(layer) for layer in range(self.num_layers)]

    @property
    def stateful(self) -> dict[int, StateKind]:
        """The layers that keep a state in the place of attention, all alike."""
        return {at: kind for at, kind in enumerate(self.each_attention) if isinstance(kind, StateKind)}

    @property
    def state_copies(self) -> int:
        """Copies of prompts' states that are kept on the device."""
        return max(4, self.max_rows) if self.shares_prompts else 0

    @property
    def state_bytes(self) -> int:
        """Memory of the states of all rows, of copies of prompts' states, and of one while a prompt is read."""
        rings = self.max_rows + self.state_copies + 1
        halves, size = rings + self.max_rows, self.dtype.itemsize
        kinds = self.stateful.values()
        return sum(4 * halves * math.prod(kind.state) + size * rings * kind.kernel * kind.channels for kind in kinds)

    @property
    def qkv(self) -> int:
        """Most rows of a layer's product for queries, keys, values and output gates."""
        return max(kind.qkv for kind in self.each_attention)

    @property
    def attended(self) -> int:
        """Most elements of the heads' values of a layer side by side, which the output product takes."""
        return max(kind.width for kind in self.each_attention)

    @property
    def kv_token_bytes(self) -> int:
        """KV memory of one token."""
        return sum(kind.token_elements for kind in self.each_attention) * self.dtype.itemsize

    @property
    def up_words(self) -> int:
        """Words of four bytes of the gate_up rows of a packed span, which precede its down rows."""
        assert self.packed is not None, "the experts are plain"
        return 2 * self.intermediate * self.packed[0].row_bytes(self.hidden) // 4

    @property
    def down_at(self) -> int:
        """Words of a packed span before its down rows."""
        return self.up_words + 2 * self.intermediate * self._bias_bytes // 4

    @property
    def _bias_bytes(self) -> int:
        """Bytes of a bias of one row."""
        return 0 if self.experts.bias is None else self.experts.bias.itemsize

    @property
    def span_dtype(self) -> torch.dtype:
        """Of the elements of a span, in slots and in host memory."""
        return self.dtype if self.packed is None else torch.int32

    @property
    def span_elements(self) -> int:
        biases = 2 * self.intermediate + self.hidden
        if self.packed is None:
            return 3 * self.hidden * self.intermediate + (0 if self.experts.bias is None else biases)
        rows = self.up_words + self.hidden * self.packed[1].row_bytes(self.intermediate) // 4
        return rows + biases * self._bias_bytes // 4

    @property
    def span_bytes(self) -> int:
        """Bytes of one expert."""
        return self.span_elements * self.span_dtype.itemsize

    @property
    def trunk_bytes(self) -> int:
        """Bytes of trunk weights that one step reads: projections, gates and the head, without the embedding row."""
        attention = sum(kind.qkv + kind.width for kind in self.each_attention) * self.hidden
        attention += sum(kind.between for kind in self.each_attention if not isinstance(kind, AttentionKind))
        moe = self.num_experts * self.hidden + 3 * self.shared_intermediate * self.hidden
        dense = 3 * self.dense_intermediate * self.hidden
        every = attention + self.num_moe_layers * moe + len(self.dense_layers) * dense
        return (every + self.vocab * self.hidden) * self.dtype.itemsize


@dataclass(frozen=True)
class LowRank:
    """The changes of a product by adapters: a [adapters, R, in], b [adapters, out, R]; R is a power of two. That of
    `LayerChanges.expert` is gated: a [adapters, 2 R, in] has rows of gate, then of up."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class LayerChanges:
    """The changes of a layer by adapters, beside those of its norms: of its products, `latents` being that of queries
    (MLA) or of a delta net's gate and decays; one more expert, which every token has; of the gate's logits, delta
    [adapters, E, H]; and the factors of the experts' weights, gains [1 + adapters, E] fp32, whose first row is ones.

    None: no adapter changes it, or the layer has no such part.
    """

    qkv: LowRank | None = None
    latents: LowRank | None = None
    output: LowRank | None = None
    up: LowRank | None = None
    down: LowRank | None = None
    expert: LowRank | None = None
    delta: Tensor | None = None
    gains: Tensor | None = None


@dataclass(frozen=True)
class ScaledMatrix:
    """A matrix in 8 bits: codes [O, N] E4M3, times scales [O, ceil(N / group)] fp32; a group of columns shares one."""

    codes: Tensor
    scales: Tensor
    group: int

    @property
    def shape(self) -> torch.Size:
        """[O, N]."""
        return self.codes.shape


Matrix = Tensor | ScaledMatrix


@dataclass(frozen=True)
class MlpWeights:
    """A gated product that every token uses: up [2I, H], rows of gate then of up; down [H, I]; switch [H]: the result
    is multiplied by sigmoid(switch · x); norm [H] of its input, if that is not the layer's `post_norm`; after [H]: the
    norm of its result beside routed experts."""

    up: Tensor
    down: Tensor
    switch: Tensor | None = None
    norm: Tensor | None = None
    after: Tensor | None = None


@dataclass(frozen=True)
class LatentWeights:
    """The products of latents: expand [heads * (nope + value_dim), rank], rows of the keys then of the values of each
    head; queries [heads * query, query_rank]; None: there is no latent of queries."""

    expand: Tensor
    queries: Tensor | None


@dataclass(frozen=True)
class ConvolutionWeights:
    """A causal convolution: weight [kernel, channels], the oldest token first; bias [channels]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class MambaWeights:
    """The small tensors of a Mamba-2 layer: its convolution; norm [width]; fp32 [heads]: decay, minus the exponential
    of the layer's A, shift, the bias of dt, and skip, the layer's D."""

    conv: ConvolutionWeights
    norm: Tensor
    decay: Tensor
    shift: Tensor
    skip: Tensor


@dataclass(frozen=True)
class DeltaWeights:
    """The small tensors of a gated delta net: its convolution; norm [value_dim]; in fp32 decay [value_heads], minus the
    exponential of the layer's A, and shift [decays], its bias beside that.

    expand [gates, 2 * rank] has the products of the latents of gate and decays, of each the other's columns being 0, so
    that one launch computes both; None: there are no latents."""

    conv: ConvolutionWeights
    norm: Tensor
    decay: Tensor
    shift: Tensor
    expand: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms [H], qkv [Q, H] rows q, k, v, output gate; output [H, heads * value_dim]; norms of queries and
    keys [head_dim] or, over all heads, [heads * head_dim], or of their latents; cos and sin [max_tokens, head_dim / 2],
    1 and 0 past what is rotated, which layers of one kind share.

    `gate` [E, H] is None in a layer without routed experts; `mlp` is then the layer's product, else the shared expert.
    `gate_bias` [E] fp32 is part of the logits, `selection_bias` [E] fp32 only of the choice; `sinks` [heads] fp32 are
    scores of each head beside those of the tokens. `gate_norm` [H] is the norm before the gate, if it is not
    `post_norm`; `expert_factors` [E] fp32 multiply the weights of picks. With `delta`, `mamba` or
    `convolution`, `qkv` has the rows of its kind's `qkv` in their order, and norms of queries and keys and the tables
    are not read.

    Norms [H] before attention and before experts or the product (`input_norm`, `post_norm`) may be missing; those after
    (`attention_norm` of what attention adds to the stream, `branch_norm` of what the others add, `routed_norm` of the
    routed experts alone) mostly are. `factor` [1] multiplies the layer's result.

    Norms in fp32 beside a half dtype are applied before the result is rounded, those in the model's dtype after it was.

    Where `changes` is not None, all norms but `gate_norm`, and the mlp's switch, have a row for no adapter and one for
    each adapter.
    """

    input_norm: Tensor | None
    qkv: Matrix
    q_norm: Tensor
    k_norm: Tensor
    output: Matrix
    post_norm: Tensor | None
    gate: Tensor | None
    cos: Tensor
    sin: Tensor
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    selection_bias: Tensor | None = None
    sinks: Tensor | None = None
    latent: LatentWeights | None = None
    delta: DeltaWeights | None = None
    mamba: MambaWeights | None = None
    convolution: ConvolutionWeights | None = None
    mlp: MlpWeights | None = None
    attention_norm: Tensor | None = None
    branch_norm: Tensor | None = None
    routed_norm: Tensor | None = None
    gate_norm: Tensor | None = None
    expert_factors: Tensor | None = None
    factor: Tensor | None = None
    changes: LayerChanges | None = None

    @property
    def joins(self) -> bool:
        """Whether what experts or the product add to the stream is changed as a whole."""
        return self.branch_norm is not None or self.factor is not None or self.adds_apart

    @property
    def adds_apart(self) -> bool:
        """Whether the routed experts' sum and the shared expert's result are normalised before they are added."""
        return self.routed_norm is not None or (self.mlp is not None and self.mlp.after is not None)


@dataclass(frozen=True)
class TrunkWeights:
    """embedding [V, H], layers, final norm [H], head [V, H] (may be the embedding) and its bias [V]."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Matrix
    head_bias: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        return _distinct(_tensors(self))

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that a step reads: all but tables of angles and an embedding that is not the head."""
        return sum(tensor.nbytes for tensor in _distinct(_tensors(self, but=("embedding", "cos", "sin"))))


def _distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _tensors(part: Any, but: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """The tensors of a part, fields named in `but` left out."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _tensors(one, but)
    elif is_dataclass(part):
        for field in fields(part):
            if field.name not in but:
                yield from _tensors(getattr(part, field.name), but)


@dataclass(frozen=True)
class AdaptedTrunk:
    """The trunk with adapters, which share its other tensors: the final norm is [1 + adapters, H], and all layers have
    `changes`. `names[n]` is the name of adapter n + 1.

    `by_module[n]` has its changes as the modules of the served model take them in prompts, whose matrices are views of
    those in `weights`.
    """

    names: tuple[str, ...]
    weights: TrunkWeights
    by_module: tuple[Changes, ...]

    def index(self, name: str | None) -> int:
        """The number of an adapter, from 1 on; 0 for none."""
        return 0 if name is None else 1 + self.names.index(name)


def rotary_tables(
    inverse_frequency: Tensor, max_tokens: int, dtype: torch.dtype, scaling: float, half: int | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [max_tokens, head_dim / 2] fp32, rounded to `dtype` as transformers does, times its attention
    scaling; filled up to `half` pairs with those that are not rotated.
    """
    position = torch.arange(max_tokens, dtype=torch.float32, device=inverse_frequency.device)
    angle = position[:, None] * inverse_frequency.float()[None, :]
    cos, sin = (angle.cos() * scaling).to(dtype).float(), (angle.sin() * scaling).to(dtype).float()
    beyond = (half or cos.shape[1]) - cos.shape[1]
    return functional.pad(cos, (0, beyond), value=1.0).contiguous(), functional.pad(sin, (0, beyond)).contiguous()
