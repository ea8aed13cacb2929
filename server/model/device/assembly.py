"""A store made into a model that decodes on the device: trunk by transformers, experts in pages, every span pinned.

The counterpart of `server.model.assembly.load_model` for a GPU. Raises NotCapturableError, before anything large is
allocated, for models or memory budgets that the host-driven path serves instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from expert_store.cache import ExpertCache
from expert_store.errors import SlotsError
from expert_store.paging.pages import DevicePages, PagesShape, Policy
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.assembly import SelectiveModel, _eos_token_ids
from server.model.device.cache import PagedCache
from server.model.device.pack import NotCapturableError, decode_shape, pack_trunk
from server.model.device.prefill import ExpertStream
from server.model.device.runner import DeviceRunner
from server.model.experts import LAYER_ATTRIBUTE
from server.model.routing import StepRouting
from server.model.trunk import load_trunk

Progress = Callable[[str, float], None]
RESERVE_BYTES = 1 << 30
"""Left free on a GPU for activations, logits and the allocator's rounding when slots are sized from free memory."""

SMALL_ARENA_BYTES = 1 << 30


class StreamLayer:
    """One MoE layer's experts in a prompt's chunk; bound to the experts module like the host-driven `ExpertsLayer`."""

    def __init__(self, layer: int, stream: ExpertStream) -> None:
        self._layer, self._stream = layer, stream

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: see `ExpertStream.forward`."""
        return self._stream.forward(self._layer, hidden, index, weights)


def load_device_runner(
    store: Store,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_rows: int,
    max_tokens: int,
    num_slots: int | None = None,
    slots_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    mask: ExpertMask | None = None,
    policy: Policy = "lru",
    num_pinned: int = 0,
    resident_bias: float = 0.0,
    progress: Progress = lambda phase, share: None,
) -> DeviceRunner:
    """Loads, pins, fills slots and captures; `max_tokens` are those of a row. `num_slots` wins over
    `slots_memory_bytes`; with neither, slots take what is free on the device.

    Raises:
        NotCapturableError: the model, or a host budget too small to pin every expert, needs the host-driven path.
        SlotsError: memory that does not suffice; names what would.
    """
    inner = _intermediate(store)
    num_experts = store.manifest.model.num_experts
    available = ExpertMask.of(store.available)
    mask = available if mask is None else available & mask
    needed = int(mask.allowed.sum()) * max(spec.span_bytes for spec in store.manifest.layers)
    if host_memory_bytes is not None and host_memory_bytes < needed:
        raise NotCapturableError(f"host memory of {host_memory_bytes} bytes cannot pin all {needed} bytes of experts")
    progress("loading the trunk", 0.0)
    model = load_trunk(store.trunk_path, device=device, dtype=dtype)
    shape = decode_shape(model, intermediate=inner, max_rows=max_rows, max_tokens=max_tokens)
    if shape.num_layers != len(store.manifest.layers):
        raise NotCapturableError(
            f"{shape.num_layers} layers, of which the store has experts for {len(store.manifest.layers)}"
        )
    weights = pack_trunk(model, shape)
    top_k, most = shape.top_k, int(mask.num_allowed.max())
    pages_shape = PagesShape(shape.num_layers, num_experts, top_k, num_experts, shape.span_elements, max_rows, dtype)
    if num_slots is None:
        num_slots = _slots_that_fit(pages_shape, shape_kv_bytes(shape), device, slots_memory_bytes, most)
    num_slots = num_experts if num_slots >= most and most == num_experts else min(num_slots, max(most, top_k))
    pages_shape = PagesShape(shape.num_layers, num_experts, top_k, num_slots, shape.span_elements, max_rows, dtype)
    spans, index = _read_spans(store, mask, dtype, device.type == "cuda", progress)
    pages = DevicePages(pages_shape, spans, index, device=device, policy=policy, num_pinned=num_pinned)
    progress("filling slots", 0.0)
    pages.seed(_first_experts(store, mask, num_slots))
    stream = ExpertStream(pages, shape.hidden, inner)
    routing = StepRouting(store.manifest.model.family, shape.num_layers, device, mask)
    for layer, block in enumerate(model.model.layers):
        object.__setattr__(block.mlp.experts, LAYER_ATTRIBUTE, StreamLayer(layer, stream))
        routing.install(layer, block.mlp.gate)
    tokenizer = AutoTokenizer.from_pretrained(store.trunk_path, trust_remote_code=False, local_files_only=True)
    config = AutoConfig.from_pretrained(store.trunk_path, trust_remote_code=False).get_text_config()
    selective = SelectiveModel(
        model=model,
        tokenizer=tokenizer,
        store=store,
        cache=cast(ExpertCache, PagedCache(store, pages)),
        routing=routing,
        device=device,
        dtype=dtype,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        special_token_ids=frozenset(tokenizer.all_special_ids),
        context_tokens=int(getattr(config, "max_position_embeddings", 0) or 1 << 20),
    )
    runner = DeviceRunner(selective, shape, weights, pages, stream, resident_bias=resident_bias)
    runner.capture(progress)
    return runner


def shape_kv_bytes(shape: Any) -> int:
    """Bytes of KV memory of all rows."""
    return int(
        2 * shape.num_layers * shape.max_rows * shape.num_kv_heads * shape.max_tokens * shape.head_dim
    ) * int(shape.dtype.itemsize)  # fmt: skip


def _intermediate(store: Store) -> int:
    """I of the experts; refuses layouts other than gate_up [2I, H] then down [H, I]."""
    for spec in store.manifest.layers:
        names = [tensor.name for tensor in spec.tensors]
        shapes = [tuple(tensor.shape) for tensor in spec.tensors]
        plain = names == ["gate_up_proj", "down_proj"] and shapes[0] == (2 * shapes[1][1], shapes[1][0])
        if not plain or shapes != [tuple(tensor.shape) for tensor in store.manifest.layers[0].tensors]:
            raise NotCapturableError(
                f"experts hold {dict(zip(names, shapes, strict=True))}, not gate_up [2I, H] and down [H, I]"
            )
    return int(store.manifest.layers[0].tensors[1].shape[1])


def _slots_that_fit(shape: PagesShape, kv_bytes: int, device: torch.device, budget: int | None, most: int) -> int:
    """Slots a layer for the budget, or for what the device has free beside KV memory, spill area and activations."""
    span_bytes = shape.span_elements * shape.dtype.itemsize
    if budget is None:
        if device.type != "cuda":
            return most
        budget = torch.cuda.mem_get_info(device)[0] - kv_bytes - RESERVE_BYTES
    per_slot = shape.num_layers * span_bytes
    if most == shape.num_experts and most * per_slot <= budget:
        return most  # nothing is ever fetched, so neither a spill area nor a ring is needed
    spill_bytes = (shape.max_distinct + 32) * span_bytes
    num_slots = (budget - spill_bytes) // per_slot
    if num_slots < shape.top_k:
        needed = shape.top_k * per_slot + spill_bytes
        raise SlotsError(
            f"{budget} bytes for slots: {shape.top_k} slots in each of {shape.num_layers} layers and what a batch of "
            f"{shape.max_batch} needs beside them take {needed} bytes: give that much, or use fewer or shorter rows"
        )
    return min(int(num_slots), most)


def _first_experts(store: Store, mask: ExpertMask, num_slots: int) -> Tensor:
    """[L, n] experts that fill the slots first: the store's deep experts in order, then any other allowed one."""
    rows = []
    for layer in range(len(store.manifest.layers)):
        best = [deep.experts[layer] for deep in store.manifest.deep_experts if mask.allowed[layer, deep.experts[layer]]]
        rows.append(list(dict.fromkeys(best))[:num_slots])
    width = min(len(row) for row in rows)
    return torch.tensor([row[:width] for row in rows])


def _read_spans(
    store: Store, mask: ExpertMask, dtype: torch.dtype, pinned: bool, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Every allowed expert's span in one arena [N, span] of compute dtype, page-locked; and where each is, [L, E]."""
    from expert_store.slots import TORCH_DTYPES

    layers = store.manifest.layers
    stored = {TORCH_DTYPES[tensor.dtype] for spec in layers for tensor in spec.tensors}
    if len(stored) != 1:
        raise NotCapturableError(f"experts of mixed dtypes: {sorted(str(one) for one in stored)}")
    elements = sum(torch.Size(tensor.shape).numel() for tensor in layers[0].tensors)
    index = torch.full(mask.allowed.shape, -1, dtype=torch.int64)
    wanted = [(layer, int(expert)) for layer, row in enumerate(mask.allowed) for expert in row.nonzero()[0]]
    progress("pinning host memory", 0.0)
    spans = _host_arena(len(wanted), elements, dtype, pinned)
    same = stored == {dtype}
    scratch = torch.empty(layers[0].span_bytes, dtype=torch.uint8)
    for row, (layer, expert) in enumerate(wanted):
        if same:
            store.read_expert(layer, expert, spans[row].view(torch.uint8))
        else:
            store.read_expert(layer, expert, scratch)
            spans[row].copy_(scratch.view(next(iter(stored))))
        index[layer, expert] = row
        if row % 64 == 0:
            progress("reading experts", row / len(wanted))
    return spans, index


def _host_arena(num_spans: int, elements: int, dtype: torch.dtype, pinned: bool) -> Tensor:
    """[num_spans, elements], page-locked if asked. torch rounds its pinned blocks up to powers of two, so a large
    arena is allocated plainly and registered; it is unregistered when the tensor goes.
    """
    if not pinned or num_spans * elements * dtype.itemsize <= SMALL_ARENA_BYTES:
        return torch.empty(num_spans, elements, dtype=dtype, pin_memory=pinned)
    spans = torch.empty(num_spans, elements, dtype=dtype)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = spans.data_ptr()
    status = int(runtime.cudaHostRegister(address, spans.nbytes, 0))
    if status != 0:
        raise NotCapturableError(f"{spans.nbytes} bytes of host memory could not be page-locked (CUDA error {status})")
    weakref.finalize(spans.untyped_storage(), runtime.cudaHostUnregister, address)
    return spans
