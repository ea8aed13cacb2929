"""The parts that a model's layers are made of, as switches of the kernels.

A part says what is computed, not which family computes it: `capture` finds the parts of a model, `DecodeShape` holds
them, and the kernels get them as constants. The kinds of routers are in `router_kind`. Invariant: the defaults are the
parts of Qwen3-MoE.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

OutputGate = Literal["none", "sigmoid", "softplus", "softplus by head"]
PairOrder = Literal["halves", "neighbours", "neighbours to halves"]


@dataclass(frozen=True)
class GateKind:
    """The product between an expert's two matrices: (up + shift) * gate * sigmoid(alpha * (gate + cubic * gate³)).

    Attributes:
        limit: gate is at most this, and up between minus this and this, before the product; 0: no limit.
    """

    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0
    cubic: float = 0.0

    @property
    def constants(self) -> tuple[float, float, float, float]:
        """As the kernels get it; see `kernels.trunk.gated`."""
        return self.alpha, self.limit, self.shift, self.cubic


SILU = GateKind()
GELU = GateKind(alpha=2 * math.sqrt(2 / math.pi), cubic=0.044715)
"""GELU with its approximation by tanh, since (1 + tanh x) / 2 is sigmoid 2x."""


@dataclass(frozen=True)
class AttentionKind:
    """Grouped-query attention of one layer.

    Attributes:
        num_heads, num_kv_heads: heads of queries, and of keys and values.
        head_dim, value_dim: elements of a head of queries and keys, and of values.
        rotary: number of rotated elements of a head of queries and keys, its first ones.
        values_are_keys: values are what the product for keys gives, before norm and rotation.
        value_norm: values are normalised head by head, without weights.
        value_scale: factor of values.
        gate: what attention puts out is multiplied, element by element or head by head, by this function of a product
            of the layer's input, whose rows follow on those for queries, keys and values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    rotary: int
    values_are_keys: bool = False
    value_norm: bool = False
    value_scale: float = 1.0
    gate: OutputGate = "none"

    @property
    def qkv(self) -> int:
        """Rows of the product for queries, keys, values and output gates."""
        return self.values_at + self.num_kv_heads * self.value_dim + self.gates

    @property
    def gates(self) -> int:
        """Rows of the product for output gates."""
        return {"none": 0, "softplus by head": self.num_heads}.get(self.gate, self.width)

    @property
    def values_at(self) -> int:
        """The place of values in a token's queries, keys and values."""
        return (self.num_heads + (0 if self.values_are_keys else self.num_kv_heads)) * self.head_dim

    @property
    def width(self) -> int:
        """Elements of a token's result before the output product."""
        return self.num_heads * self.value_dim

    @property
    def vectors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """A token's keys, then its values, in KV memory: their number and their elements."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_dim)

    @property
    def token_elements(self) -> int:
        """Elements of a token's keys and values in KV memory."""
        return self.num_kv_heads * (self.head_dim + self.value_dim)

    @property
    def prompt_elements(self) -> int:
        """Elements of a token's keys and values as a prompt's attention reads them: together, and for each head."""
        return self.token_elements + self.num_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class LatentKind:
    """Latent attention (MLA) of one layer: keys and values of a token are products of one latent, and all heads share a
    rotated key.

    Attributes:
        num_heads: heads of queries and values.
        rank: elements of a latent.
        nope, head_dim: elements of a head's query that are not rotated, and of the rest and the shared key, which are.
        value_dim: elements of a head's value.
        query_rank: elements of the latent that queries are a product of; 0: they are one of the layer's input.
        pairs: an element is rotated with the one half of them away, or with the one beside it; where it stays there, or
            all first elements come before the second ones.
        eps: of the norms of latents.
        gated: a head's result is multiplied by the sigmoid of a product of the layer's input, whose rows, one for each
            head, follow on those for the shared key.
    """

    num_heads: int
    rank: int
    nope: int
    head_dim: int
    value_dim: int
    query_rank: int = 0
    pairs: PairOrder = "neighbours to halves"
    eps: float = 1e-6
    gated: bool = False
    gate: ClassVar[OutputGate] = "none"

    @property
    def rotary(self) -> int:
        """Number of rotated elements of the shared key."""
        return self.head_dim

    @property
    def query(self) -> int:
        """Elements of a head's query."""
        return self.nope + self.head_dim

    @property
    def queries(self) -> int:
        """Elements of what the layer's first product gives for queries: they, or their latent."""
        return self.query_rank or self.num_heads * self.query

    @property
    def qkv(self) -> int:
        """Rows of the product for queries or their latent, the latent, the shared key, and output gates."""
        return self.queries + self.token_elements + (self.num_heads if self.gated else 0)

    @property
    def width(self) -> int:
        """Elements of a token's result before the output product."""
        return self.num_heads * self.value_dim

    @property
    def summed(self) -> int:
        """Elements of the sums of latents of all heads."""
        return self.num_heads * self.rank

    @property
    def vectors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """A token's latent, then its rotated key, in KV memory: their number and their elements."""
        return (1, self.rank), (1, self.head_dim)

    @property
    def token_elements(self) -> int:
        """Elements of a token's latent and key in KV memory."""
        return self.rank + self.head_dim

    @property
    def prompt_elements(self) -> int:
        """Elements of a token as a prompt's attention reads them: its latent and key, what the latent expands to, and
        from it the keys and values of each head."""
        return self.token_elements + self.num_heads * (self.nope + self.query + 2 * self.value_dim)

    @property
    def between(self) -> int:
        """Weights between the latents and the heads."""
        return self.num_heads * ((self.nope + self.value_dim) * self.rank + self.query * self.query_rank)


class StateKind(ABC):
    """A layer that keeps a state of fixed size in the place of attention, and the last inputs of a causal convolution.
    It has no keys and values.

    Attributes:
        kernel: tokens of the convolution.
    """

    kernel: int
    num_heads: ClassVar[int] = 0
    head_dim: ClassVar[int] = 0
    rotary: ClassVar[int] = 0
    token_elements: ClassVar[int] = 0
    prompt_elements: ClassVar[int] = 0
    vectors: ClassVar[tuple[tuple[int, int], tuple[int, int]]] = ((0, 0), (0, 0))
    gate: ClassVar[OutputGate] = "none"

    @property
    @abstractmethod
    def channels(self) -> int:
        """Elements of a token that the convolution takes."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Elements of a token's result before the output product."""

    @property
    @abstractmethod
    def qkv(self) -> int:
        """Rows of the product of the layer's input."""

    @property
    def state(self) -> tuple[int, int, int]:
        """The shape of a row's state, in fp32."""
        return 0, 0, 0

    @property
    def between(self) -> int:
        """Weights between latents of the layer's input and what they are expanded to."""
        return 0


@dataclass(frozen=True)
class ConvolutionKind(StateKind):
    """A short convolution between two gates; see `kernels.convolution`. It keeps no state beside the last inputs.

    Attributes:
        size: elements of a token, all of which the convolution takes.
        kernel: tokens of the convolution.
    """

    size: int
    kernel: int

    @property
    def channels(self) -> int:
        """See `StateKind`."""
        return self.size

    @property
    def width(self) -> int:
        """See `StateKind`."""
        return self.size

    @property
    def qkv(self) -> int:
        """Rows of the product for the input's gate, the result's gate, and the input."""
        return 3 * self.size


@dataclass(frozen=True)
class MambaKind(StateKind):
    """A Mamba-2 layer; see `kernels.mamba`.

    Attributes:
        groups, key_dim: groups of heads that share queries (C) and keys (B), and their elements.
        heads, value_dim: heads, each with a state, and the elements of their values; a multiple of the groups.
        kernel: tokens of the causal convolution over queries, keys and values.
        least, most: bounds of dt.
        norms: parts of a token's result that are normed apart, each of whole heads.
    """

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    kernel: int
    least: float = 0.0
    most: float = math.inf
    norms: int = 1

    @property
    def channels(self) -> int:
        """Elements of a token's queries, keys and values, which the convolution takes."""
        return 2 * self.groups * self.key_dim + self.width

    @property
    def width(self) -> int:
        """Elements of a token's values, of its norm's gate, and of its result before the output product."""
        return self.heads * self.value_dim

    @property
    def qkv(self) -> int:
        """Rows of the product for queries, keys, values, gate of the norm, and dt."""
        return self.channels + self.width + self.heads

    @property
    def state(self) -> tuple[int, int, int]:
        """See `StateKind`."""
        return self.heads, self.value_dim, self.key_dim


@dataclass(frozen=True)
class DeltaKind(StateKind):
    """A gated delta net; see `kernels.delta`.

    Attributes:
        key_heads, key_dim: heads of queries and of keys, and their elements.
        value_heads, value_dim: heads of values, each with a state; a multiple of the key heads.
        kernel: tokens of the causal convolution over queries, keys and values.
        by_channel: each element of a head's keys has a decay, instead of each head.
        bound: logarithms of decays are this times a sigmoid; 0: they are minus a softplus.
        rounds: logarithms of decays are rounded to the model's dtype.
        sigmoid: the norm's gate goes through a sigmoid, not SiLU.
        rank: elements of each of the latents that the norm's gate and the decays are products of; 0: they are products
            of the layer's input.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    by_channel: bool = False
    bound: float = 0.0
    rounds: bool = False
    sigmoid: bool = False
    rank: int = 0

    @property
    def channels(self) -> int:
        """Elements of a token's queries, keys and values, which the convolution takes."""
        return 2 * self.key_heads * self.key_dim + self.width

    @property
    def width(self) -> int:
        """Elements of a token's values, of its norm's gate, and of its result before the output product."""
        return self.value_heads * self.value_dim

    @property
    def decays(self) -> int:
        """Elements of a token's decays."""
        return self.value_heads * (self.key_dim if self.by_channel else 1)

    @property
    def gates(self) -> int:
        """Elements of a token's gate of the norm and of its decays."""
        return self.width + self.decays

    @property
    def qkv(self) -> int:
        """Rows of the product for queries, keys, values, gate of the norm and decays, or their latents, and betas."""
        return self.channels + (2 * self.rank or self.gates) + self.value_heads

    @property
    def between(self) -> int:
        """Weights between the latents and the norm's gate and decays; see `DeltaWeights.expand`."""
        return 2 * self.rank * self.gates

    @property
    def state(self) -> tuple[int, int, int]:
        """See `StateKind`."""
        return self.value_heads, self.value_dim, self.key_dim


@dataclass(frozen=True)
class ExpertKind:
    """The parts of a routed expert, whose span is gate_up [2I, H], its bias [2I], down [H, I], its bias [H].

    Attributes:
        alternates: rows of gate and up alternate, gate first; else all rows of gate come first.
        bias: dtype of the two biases in a span; None: there are none.
    """

    gate: GateKind = SILU
    alternates: bool = False
    bias: torch.dtype | None = None


PLAIN_EXPERT = ExpertKind()


@dataclass(frozen=True)
class Scales:
    """Factors of a token's embedding, of what a layer adds to the residual stream, of the logits, and of the sum of a
    token's routed experts beside its shared one.

    Attributes:
        mixed: the factor of the sum of a token's routed experts and its shared one.
        rounds_embedding: the factor of embeddings is rounded to the model's dtype.
        cap: logits x become cap * tanh(x / cap); 0: they stay as they are.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    routed: float = 1.0
    mixed: float = 1.0
    rounds_embedding: bool = False
    cap: float = 0.0


UNSCALED = Scales()
