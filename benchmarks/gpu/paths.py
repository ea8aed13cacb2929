"""The runners side by side, a long prompt, and transformers' own offload: the same random model through each.

Weights are random and routers are the model's own, so experts are wanted nearly uniformly: the hardest case for a
cache.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.gpu.steps import random_experts
from benchmarks.gpu.timing import wall_ms
from expert_store.manifest import LayerSpec, TensorSpec
from expert_store.paging.pages import DevicePages, PagesShape
from expert_store.residency.cache import ExpertCache
from expert_store.residency.host_tier import HostTier
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.capture.pack import decode_shape, pack_trunk
from server.model.device.running.assembly import StreamLayer
from server.model.device.running.runner import DeviceRunner
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.weights import DecodeShape
from server.model.host.assembly import HostModel
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, Runner
from server.model.seam.experts import IMPLEMENTATION, LAYER_ATTRIBUTE, ExpertsLayer
from server.model.seam.routing import StepRouting
from server.model.seam.trunk import is_experts_module

DTYPE = torch.bfloat16
DEVICE = torch.device("cuda:0")
RUNNER_LAYERS, OFFLOAD_LAYERS = 12, 4


def config_of(shape: DecodeShape, num_layers: int) -> Qwen3MoeConfig:
    """transformers' config of a shape."""
    return Qwen3MoeConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, moe_intermediate_size=shape.intermediate,
        num_experts=shape.num_experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True,
        max_position_embeddings=8192,
        initializer_range=0.02, dtype=DTYPE,
    )  # fmt: skip


def trunk_of(shape: DecodeShape, num_layers: int) -> Any:
    """A random model on the GPU whose experts have no parameters."""
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config_of(shape, num_layers)).to(DTYPE)
    for module in model.modules():
        if is_experts_module(module):
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                delattr(module, name)
    model.to_empty(device=DEVICE)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(DEVICE)
    model.set_experts_implementation(IMPLEMENTATION)
    return model.eval()


def device_runner(
    model: Any, of: DecodeShape, spans: torch.Tensor, num_slots: int, *, max_rows: int, max_tokens: int
) -> DeviceRunner:
    """A device-driven runner over a model of `trunk_of`, with the experts of the shape `of`; spans [N, elements] are
    shared by the experts in turn."""
    layers = len(model.model.layers)
    shape = decode_shape(
        model, intermediate=of.intermediate, max_rows=max_rows, max_tokens=max_tokens, packed=of.packed
    )
    pages_shape = PagesShape(
        layers, shape.num_experts, shape.top_k, num_slots, shape.span_elements, max_rows, shape.span_dtype
    )
    index = torch.arange(layers * shape.num_experts).view(layers, -1) % len(spans)
    pages = DevicePages(pages_shape, spans, index, device=DEVICE)
    random_experts(shape, pages.slots)
    pages.adopt(torch.arange(num_slots).expand(layers, num_slots))
    stream = ExpertStream(pages, shape)
    selective = _selective(model, stream=stream, layers=layers, num_experts=shape.num_experts)
    return DeviceRunner(selective, shape, pack_trunk(model, shape), pages, stream)


def runners(shape: DecodeShape) -> dict[str, Any]:
    """Batch-1 decode of both runners, a quarter of the experts in slots, and how long the device-driven one
    captures.
    """
    num_slots, layers = shape.num_experts // 4, RUNNER_LAYERS
    model = trunk_of(shape, layers)
    num_spans = layers * shape.num_experts
    host = _host_runner(model, shape, layers, num_slots)
    row = host.allocate()
    host.prefill(row, list(range(16)))
    host_ms = _random_tokens_ms(host, row, shape.vocab)
    statistics = host.model.cache.statistics()
    host_hits = float(statistics.hits.sum() / (statistics.hits.sum() + statistics.misses.sum()))
    tier = host.model.cache.host_tier
    assert tier is not None
    spans = tier._arena.view(DTYPE)[:num_spans]
    started = time.perf_counter()
    device = device_runner(model, shape, spans, num_slots, max_rows=2, max_tokens=2304)
    device.capture()
    capture_seconds = time.perf_counter() - started
    row = device.allocate()
    device.prefill(row, list(range(16)))
    device_ms = _random_tokens_ms(device, row, shape.vocab)
    return {
        "layers": layers, "slots": num_slots, "host_driven_ms": host_ms, "device_driven_ms": device_ms,
        "host_over_device": host_ms / device_ms, "host_hit_rate": host_hits, "device_hit_rate": device.pages.hit_rate(),
        "compile_and_capture_seconds": capture_seconds,
        "captured_batches": sorted(key[0] for key in device.graphs.steps),
    }  # fmt: skip


def _random_tokens_ms(runner: Any, row: int, vocab: int) -> float:
    """Median of 24 decode steps over the same random tokens for every runner, after 8."""
    tokens = iter(torch.randint(0, vocab, (32,), generator=torch.Generator().manual_seed(3)).tolist())
    return wall_ms(lambda: runner.decode([RowStep(row, next(tokens))]), repeats=24, warmup=8)


def prefill(shape: DecodeShape, spans: torch.Tensor, copy_rate: float, num_tokens: int = 2048) -> dict[str, Any]:
    """A chunk of 2,048 tokens with a quarter of the experts in slots, beside the same with all of them resident."""
    model = trunk_of(shape, shape.num_layers)
    tokens = torch.randint(0, shape.vocab, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    figures: dict[str, Any] = {"tokens": num_tokens}
    for name, num_slots in (("quarter", shape.num_experts // 4), ("resident", shape.num_experts)):
        runner = device_runner(model, shape, spans, num_slots, max_rows=1, max_tokens=num_tokens + 64)
        runner.capture()
        chunk = partial(_chunk, runner, tokens)
        figures[f"{name}_ms"] = wall_ms(chunk, repeats=3)
        if name == "quarter":
            before = runner._stream.copied_spans
            chunk()
            missed = (runner._stream.copied_spans - before) * shape.span_bytes
            figures |= {"missed_bytes": missed, "copy_ms": missed / copy_rate * 1e3}
            figures["quarter_64_tokens_ms"] = wall_ms(partial(_chunk, runner, tokens[:64]), repeats=3)
        del runner, chunk
        torch.cuda.empty_cache()
    figures["ratio"] = figures["quarter_ms"] / max(figures["resident_ms"], figures["copy_ms"])
    return figures


def _chunk(runner: DeviceRunner, tokens: list[int]) -> None:
    row = runner.allocate()
    runner.prefill(row, tokens)
    runner.free(row)


def offload(shape: DecodeShape) -> dict[str, Any]:
    """transformers and accelerate's CPU offload, a quarter of the layers on the GPU; milliseconds a token, times 12."""
    from accelerate import dispatch_model

    layers = OFFLOAD_LAYERS
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config_of(shape, layers)).to(DTYPE)
    model.to_empty(device="cpu")
    block = torch.randn(1 << 22, dtype=torch.float32).to(DTYPE) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
            if "norm" in name:
                parameter.fill_(1.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    placed = {"model.embed_tokens": 0, "model.layers.0": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    placed |= {f"model.layers.{layer}": "cpu" for layer in range(1, layers)}
    model = dispatch_model(model.eval(), placed, main_device=0)
    prompt = torch.arange(16, device=DEVICE)[None]
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
        step_ms = wall_ms(lambda: model(prompt[:, :1], past_key_values=cache, use_cache=True), repeats=3)
    return {"layers": layers, "measured_ms": step_ms, "ms_48_layers": step_ms * shape.num_layers / layers}


def _host_runner(model: Any, shape: DecodeShape, layers: int, num_slots: int) -> Runner:
    store = cast(Store, _MemoryStore(shape, layers))
    needed = layers * shape.num_experts * shape.span_elements * 2
    tier = HostTier(store, budget_bytes=needed, pinned=DEVICE.type == "cuda")
    for layer in range(layers):
        tier.read(layer, range(shape.num_experts))
    cache = ExpertCache(store, num_slots=num_slots, device=DEVICE, dtype=DTYPE, host_tier=tier)
    selective = _selective(model, cache=cache, layers=layers, num_experts=shape.num_experts)
    return HostRunner(selective, max_rows=8, max_tokens=2304)


def _selective(model: Any, *, layers: int, num_experts: int, stream: Any = None, cache: Any = None) -> HostModel:
    mask = ExpertMask.of(np.ones((layers, num_experts), dtype=bool))
    routing = StepRouting("qwen3_moe", layers, DEVICE, mask)
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate._forward_hooks.clear()
        bound = ExpertsLayer(layer, cache) if stream is None else StreamLayer(layer, stream)
        object.__setattr__(block.mlp.experts, LAYER_ATTRIBUTE, bound)
        routing.install(layer, block.mlp.gate)
    return HostModel(
        model=model, tokenizer=cast(Any, None), store=cast(Any, None), cache=cache, routing=routing,
        device=DEVICE, dtype=DTYPE, eos_token_ids=frozenset(),
        context_tokens=8192,
    )  # fmt: skip


class _MemoryStore:
    """As much of a `Store` as the host-driven path asks for; every expert's bytes are one random span."""

    def __init__(self, shape: DecodeShape, layers: int) -> None:
        up, down = 2 * shape.intermediate * shape.hidden * 2, shape.intermediate * shape.hidden * 2
        tensors = (
            TensorSpec("gate_up_proj", "BF16", (2 * shape.intermediate, shape.hidden), 0, up),
            TensorSpec("down_proj", "BF16", (shape.hidden, shape.intermediate), up, down),
        )
        specs = tuple(LayerSpec(at, at, f"model.layers.{at}.mlp.experts", up + down, tensors) for at in range(layers))
        self.manifest = SimpleNamespace(
            layers=specs, model=SimpleNamespace(num_experts=shape.num_experts, num_layers=layers), deep_experts=()
        )
        self.available = np.ones((layers, shape.num_experts), dtype=bool)
        self.path = "memory"
        self._span = (torch.randn(shape.span_elements) * 0.03).to(DTYPE).view(torch.uint8)

    def layer_spec(self, layer: int) -> LayerSpec:
        return self.manifest.layers[layer]

    def read_expert(self, layer: int, expert: int, out: torch.Tensor) -> None:
        out.copy_(self._span)
