"""Captured steps as the GPU benchmarks run them: random trunks, traces in the routers' place, stages left out.

All of it is made from what the server uses: a trace is written into the gates' biases before each replay, so that the
routers' own top-k picks it; a stage is left out by giving the step nothing to do for it before the capture.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.paging import Trace
from expert_store.encoding import CODE_BITS
from expert_store.paging.pages import DevicePages, PagesShape
from expert_store.rows import FIELD_DTYPES
from server.model.device.step.graphs import StepGraph
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape, LayerWeights, TrunkWeights, rotary_tables

CONTEXT = 1024
"""Tokens in KV memory when a measurement begins."""
STAGES = {
    "embed": "embed", "qkv": "qkv_product", "attention": "attend", "output": "output_product", "route": "route",
    "gate_up": "gate_up", "down": "down", "head": "head", "greedy": "finish",
}  # fmt: skip
"""Stages of a model of MoE layers without shared experts: the name in results, the method of `DecodeStep`."""
SURE = 1e4
"""Added to a gate's logit so that no other expert is picked."""


class Replay:
    """A captured step over the first rows of `state`, which are `CONTEXT` tokens deep; calling it enqueues one step.

    Args:
        trace: [steps, L, K], the experts that every row picks, step by step and from the beginning again; without one
            the routers choose.
        without: names of stages that are left out.
    """

    def __init__(
        self, shape: DecodeShape, trunk: TrunkWeights, pages: DevicePages, state: RowState, batch: int,
        options: StepOptions, *, trace: Trace | None = None, without: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._bias, self._trace = torch.zeros(shape.num_layers, shape.num_experts, device=pages.device), None
        if trace is not None:
            layers = [replace(layer, gate_bias=bias) for layer, bias in zip(trunk.layers, self._bias, strict=True)]
            trunk = replace(trunk, layers=tuple(layers))
            picks = torch.from_numpy(trace).long().to(pages.device)
            self._trace = torch.zeros(len(trace), *self._bias.shape, device=pages.device).scatter_(2, picks, SURE)
        self.step = DecodeStep(shape, trunk, pages, state, batch, options)
        for stage in without:
            setattr(self.step, STAGES[stage], lambda *layer: None)
        self._graph = StepGraph(self.step)
        self._graph.capture()
        self._rows, self._tokens = list(range(batch)), [5 + 37 * at for at in range(batch)]
        self._at = 0
        state.lengths.fill_(CONTEXT)
        pages.step.fill_(-1)
        pages.last_use.fill_(-1)

    def __call__(self) -> None:
        if self._trace is not None:
            self._bias.copy_(self._trace[self._at % len(self._trace)])
            self._at += 1
        self._graph.enqueue(self._rows, self._tokens)


def random_codes(shape: DecodeShape, spans: Tensor) -> None:
    """Fill packed spans [n, words] with random codes, scales that keep activations in range, and biases of zero;
    mutates `spans`."""
    assert shape.packed is not None
    if shape.experts.bias is not None:
        spans.zero_()
    for at, encoding, rows, columns in (
        (0, shape.packed[0], 2 * shape.intermediate, shape.hidden),
        (4 * shape.down_at, shape.packed[1], shape.hidden, shape.intermediate),
    ):
        size = encoding.row_bytes(columns)
        for some in spans.view(torch.uint8)[:, at : at + rows * size].split(256):
            part = some.unflatten(1, (rows, size))
            codes = columns * CODE_BITS[encoding.codes] // 8
            part.random_(0, 256)
            if encoding.codes == "fp8":
                part[..., :codes] &= 0xBF  # below 2, so no NaN
            spread = {"fp8": 0.6, "fp4": 3.0, "int4": 4.6, "int8": 74.0}[encoding.codes]
            numbers = {"scales": columns**-0.5 / spread, "zeros": encoding.middle, "overall": 1.0}
            for name, (offset, count) in encoding.fields(columns).items():
                if name == "codes":
                    continue
                value = 127 + round(math.log2(numbers[name])) if encoding.scales == "F8_E8M0" else numbers[name]
                dtype = torch.float32 if name == "overall" else FIELD_DTYPES[getattr(encoding, name)]
                field = torch.full((count,), value, device=spans.device).to(dtype).view(torch.uint8)
                part[..., offset : offset + len(field)] = field


def random_experts(shape: DecodeShape, slots: Tensor) -> None:
    """Fill slots [n, elements] with random experts, in the shape's encoding if it has one; mutates `slots`."""
    if shape.packed is not None:
        random_codes(shape, slots)
        return
    for some in slots.split(256):
        some.normal_(0.0, 0.03)


def full_pages(shape: DecodeShape, device: torch.device | str) -> DevicePages:
    """Pages with every expert in a slot, random, for steps of up to `shape.max_rows` rows."""
    sizes = PagesShape(
        shape.num_moe_layers, shape.num_experts, shape.top_k, shape.num_experts, shape.span_elements, shape.max_rows,
        shape.span_dtype,
    )  # fmt: skip
    pages = DevicePages(sizes, None, device=device)
    random_experts(shape, pages.slots)
    pages.adopt(torch.arange(shape.num_experts).expand(shape.num_moe_layers, shape.num_experts))
    return pages


def random_trunk(shape: DecodeShape, device: torch.device | str, seed: int = 0) -> TrunkWeights:
    """A trunk of the shape with random weights, scaled so that activations neither vanish nor grow; for benches and
    tests.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        values = torch.empty(rows, cols, dtype=shape.dtype, device=device)
        return values.normal_(0.0, cols**-0.5, generator=generator)

    def norm(size: int) -> Tensor:
        return (1 + 0.1 * torch.randn(size, generator=generator, device=device)).to(shape.dtype)

    width = shape.num_heads * shape.head_dim
    half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    cos, sin = rotary_tables(1.0 / 10000.0**half, shape.max_tokens, shape.dtype, 1.0)
    layers = tuple(
        LayerWeights(
            input_norm=norm(shape.hidden),
            qkv=matrix(shape.qkv, shape.hidden),
            q_norm=norm(shape.head_dim),
            k_norm=norm(shape.head_dim),
            output=matrix(shape.hidden, width),
            post_norm=norm(shape.hidden),
            gate=matrix(shape.num_experts, shape.hidden),
            cos=cos,
            sin=sin,
        )
        for _ in range(shape.num_layers)
    )
    embedding = torch.empty(shape.vocab, shape.hidden, dtype=shape.dtype, device=device).normal_(
        0, 1, generator=generator
    )
    return TrunkWeights(embedding, layers, norm(shape.hidden), matrix(shape.vocab, shape.hidden))
