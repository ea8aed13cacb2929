"""Assembles a model that decodes on the device from a store: the trunk by transformers, the experts in pages.

It is the counterpart of `host.assembly.load_model` for a GPU. It raises NotCapturableError, if possible before any
large allocation, for models or memory budgets that need the host-driven path.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from expert_store.adapter import Adapter, store_adapters
from expert_store.encoding import RowEncoding
from expert_store.errors import SlotsError
from expert_store.manifest import LayerSpec, TensorSpec
from expert_store.paging.pages import DevicePages
from expert_store.residency.pinned import lockable_bytes
from expert_store.rows import TORCH_DTYPES
from expert_store.store import Store
from router.errors import MaskError
from router.mask import ExpertMask
from server.model.device.capture import NotCapturableError, need
from server.model.device.capture.adapters import adapted_trunk, check_adapters
from server.model.device.capture.modules import mixer_name, moe_blocks, text_body
from server.model.device.capture.pack import EightBits, attention_and_head, decode_shape, pack_trunk
from server.model.device.capture.proof import prove
from server.model.device.memory.budget import DeviceMemory
from server.model.device.memory.cache import PagedCache
from server.model.device.memory.filling import fill_slots, first_scores, in_turn
from server.model.device.memory.moving import MovingMemory, moving_memory
from server.model.device.memory.reading import SpanReader, log_failures
from server.model.device.memory.tier import SpanTier, rows_within
from server.model.device.running.runner import DeviceRunner
from server.model.device.step.mixers.states import StateLayer
from server.model.device.step.prefill import ExpertStream
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import AdaptedTrunk, DecodeShape, TrunkWeights
from server.model.host.assembly import eos_token_ids_of
from server.model.host.kept import experts_by_use
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.load_progress import Phase, Progress
from server.model.runner import RunnerOptions, SelectiveModel
from server.model.seam.experts import LAYER_ATTRIBUTE
from server.model.seam.observation import OutputObserver
from server.model.seam.routing import StepRouting
from server.model.seam.trunk import context_tokens, eight_bits, load_trunk, trunk_is_checked, trunk_skeleton

log = logging.getLogger(__name__)
WARMED_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Lengths in tokens of the prompts that run before the server is ready: the bounds at which libraries use another
kernel, and some between. A library loads a kernel's code at its first run, which takes seconds from a disk."""


class StreamLayer:
    """One MoE layer's experts for a prompt's chunk; bound to the experts module like the host-driven `ExpertsLayer`.

    Attributes:
        observer: notified of the experts' outputs while it is on.
        batched: see `ExpertsLayer`; no adapter is trained over a stream.
    """

    def __init__(self, layer: int, stream: ExpertStream) -> None:
        self._layer, self._stream = layer, stream
        self.observer: OutputObserver | None = None
        self.batched = None

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: see `ExpertStream.forward`."""
        return self._stream.forward(self._layer, hidden, index, weights, self.observer)


@trunk_is_checked
def load_device_runner(
    store: Store, options: RunnerOptions, *, proof: bool = True, progress: Progress = lambda phase, share: None
) -> DeviceRunner:
    """Prove the captured step, load, fill slots, capture, and warm up; host memory is filled meanwhile and later.

    Experts that cannot be read are logged; they are read again when a token needs one.

    Args:
        proof: whether to compare the step with transformers' forward first.

    Raises:
        NotCapturableError: the model cannot be captured; the host-driven path serves it.
        NotPinnableError: the host page-locks less memory than the first steps need.
        SlotsError: the device's memory does not suffice, or `host_memory_bytes` holds less than one step's experts; the
            message names values that fit.
        ShardCorruptError: a file of the trunk, or an adapter, is damaged. AdapterError: one that cannot be read.
        StoreError: no expert of a layer can be read.
    """
    device, dtype = options.device, options.dtype
    available = ExpertMask.of(store.available)
    mask = available if options.mask is None else available & options.mask
    order = experts_by_use(store, mask, options.kept_experts)
    _check_gpu(device)
    skeleton = trunk_skeleton(store.trunk_path)
    shape = captured_shape(skeleton, store.manifest.layers, dtype, options.max_rows, options.max_tokens)
    shape = replace(shape, shares_prompts=options.prefix_cache)
    adapters = _adapters(store, skeleton) if options.adapters else {}
    reader = SpanReader(store, dtype, transposed=_is_transposed(skeleton))
    if proof:
        progress(Phase.PROVING, 0.0)
        distance = prove(skeleton, shape, device)
        log.info("the captured step agrees with transformers' forward within %.2g of the logits' norm", distance)
    num_served = int(mask.num_allowed.sum())
    step_spans = int(np.minimum(mask.num_allowed, shape.top_k).sum())
    budget_bytes = _host_budget(options.host_memory_bytes, num_served * reader.span_bytes)
    num_rows = rows_within(budget_bytes, reader.span_bytes, num_served, step_spans)
    memory = DeviceMemory(
        shape,
        device,
        num_kept=options.kept_experts,
        keeps_most=num_rows < num_served,
        least_tokens=options.least_tokens,
    )
    model = _trunk(store, options, progress)
    weights = pack_trunk(model, shape, _eight_bits(model, store, device))
    adapted = adapted_trunk(model, shape, weights, adapters) if adapters else None
    put_state_layers(model, shape, weights)
    division = slots, num_blocks = memory.divide(
        int(mask.num_allowed.max()), options.num_slots, options.slots_memory_bytes, options.kv_memory_bytes
    )
    if memory.pages_shape(slots).paged and num_rows < step_spans:
        raise SlotsError(
            f"host memory of {budget_bytes} bytes has room for {num_rows} experts, and one token may need "
            f"{step_spans}: set host_memory to at least {step_spans * reader.span_bytes}"
        )
    moving, fixed_by = moving_memory(options.memory_balance, memory, shape, division, device)
    most_blocks = num_blocks if moving is None else min(num_blocks, moving.most_blocks)
    shape = replace(shape, max_tokens=min(shape.max_tokens, most_blocks * BLOCK_TOKENS))
    pages = _pages(memory, slots, moving, options)
    tier = _filled_tier(reader, pages, budget_bytes, mask, order, options.kept_experts, progress)
    log.info("%d slots a layer; KV memory of %d tokens; %s", slots, num_blocks * BLOCK_TOKENS, tier.summary())
    runner = _runner(
        store, model, shape, weights, pages, mask, tier, options, num_blocks, adapters, adapted, moving, fixed_by
    )
    _capture(runner, progress)
    if device.type == "cuda":
        warm_up(runner, progress)
    return runner


def _pages(memory: DeviceMemory, num_slots: int, moving: MovingMemory | None, options: RunnerOptions) -> DevicePages:
    """Pages with so many open slots in each layer, over memory that moves or of their own."""
    return DevicePages(
        memory.pages_shape(num_slots) if moving is None else moving.pages_shape,
        None,
        device=options.device,
        policy=options.cache_policy,
        num_kept=memory.num_kept(num_slots),
        memory=None if moving is None else moving.slots,
        num_open=num_slots,
    )


def _filled_tier(
    reader: SpanReader,
    pages: DevicePages,
    budget_bytes: int | None,
    mask: ExpertMask,
    order: Sequence[Sequence[int]],
    num_kept: int,
    progress: Progress,
) -> SpanTier:
    """The tier of pages, whose slots it fills; rows of host memory are filled in the background. `order` has the
    experts of each layer that are served, best first, of which `num_kept` stay in slots."""
    prior = first_scores(order, pages.shape.num_experts)
    tier = SpanTier(reader, pages, budget_bytes, fixed=_first_of(order, num_kept, mask), prior=prior)
    tier.adopt(mask.allowed)
    unread = fill_slots(reader, pages, tier, order, progress)
    log_failures(unread)
    tier.fill(one for one in in_turn(order) if one not in unread)
    return tier


def _trunk(store: Store, options: RunnerOptions, progress: Progress) -> PreTrainedModel:
    progress(Phase.TRUNK, 0.0)
    return load_trunk(
        store.trunk_path,
        device=options.device,
        dtype=options.dtype,
        progress=lambda share: progress(Phase.TRUNK, share),
    )


def _adapters(store: Store, skeleton: PreTrainedModel) -> dict[str, Adapter]:
    """The store's adapters. Raises NotCapturableError for one that the step does not carry."""
    adapters = store_adapters(store.path, store.manifest)
    check_adapters(skeleton, adapters)
    return adapters


def put_state_layers(model: PreTrainedModel, shape: DecodeShape, weights: TrunkWeights) -> None:
    """Puts our layers in the place of the model's layers that keep a state, so that products of which a
    packed copy stands there free their memory."""
    layers = text_body(model).layers
    for place, (at, kind) in enumerate(shape.stateful.items()):
        setattr(layers[at], mixer_name(layers[at]), StateLayer(kind, shape.eps, weights.layers[at], place))


def _eight_bits(model: PreTrainedModel, store: Store, device: torch.device) -> EightBits:
    """The trunk's linear layers in 8 bits if the device converts them; a line of the log says what becomes of them."""
    if store.manifest.trunk_dtype is None:
        return {}
    found = eight_bits(model, store.trunk_path)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        log.info("%d linear layers of the trunk are in FP8, which this GPU does not convert: dequantised", len(found))
        return {}
    taken = sum(linear in found for linear in attention_and_head(model))
    log.info(
        "%d linear layers of the trunk are in FP8: a decode step reads %d of them so, attention and head, and the "
        "others dequantised", len(found), taken,
    )  # fmt: skip
    return found


def _host_budget(wanted_bytes: int | None, experts_bytes: int) -> int | None:
    """Bound on host memory: the wanted one, or, if the system cannot spare what all experts need, what it can."""
    lockable = lockable_bytes()
    if wanted_bytes is not None or lockable is None or lockable >= experts_bytes:
        return wanted_bytes
    return lockable


def _first_of(order: Sequence[Sequence[int]], count: int, mask: ExpertMask) -> npt.NDArray[np.bool_]:
    """[L, E], the first `count` experts of each layer."""
    chosen = np.zeros(mask.allowed.shape, dtype=np.bool_)
    for layer, experts in enumerate(order):
        chosen[layer, experts[:count]] = True
    return chosen


def _check_gpu(device: torch.device) -> None:
    """Raises NotCapturableError if Triton cannot compile the kernels for the device."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    need(major >= 8, f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, wanted 8.0")
    try:  # Triton compiles its launcher here, with the C compiler that it finds
        driver.active.get_current_device()
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise NotCapturableError(f"Triton cannot compile here: {error}") from error


def _capture(runner: DeviceRunner, progress: Progress) -> None:
    try:
        runner.capture(progress)
    except torch.cuda.OutOfMemoryError as error:
        raise SlotsError(f"the device's memory ended while decode steps were captured: {error}") from error
    except OutOfResources as error:
        raise NotCapturableError(f"the step's kernels need more of the GPU than it has: {error}") from error


def _runner(
    store: Store,
    model: PreTrainedModel,
    shape: DecodeShape,
    weights: TrunkWeights,
    pages: DevicePages,
    mask: ExpertMask,
    tier: SpanTier,
    options: RunnerOptions,
    num_blocks: int,
    adapters: Mapping[str, Adapter],
    adapted: AdaptedTrunk | None,
    moving: MovingMemory | None,
    fixed_by: str,
) -> DeviceRunner:
    """Bind the model's experts and routers to the pages, and make the runner over them."""
    stream = ExpertStream(pages, shape)
    device = pages.device
    routing = StepRouting(store.manifest.model.family, shape.num_moe_layers, device, mask)
    for layer, (_, block, router) in enumerate(moe_blocks(model)):
        object.__setattr__(block.experts, LAYER_ATTRIBUTE, StreamLayer(layer, stream))
        routing.install(layer, router)
    for name, changes in () if adapted is None else zip(adapted.names, adapted.by_module, strict=True):
        routing.install_adapters(model, changes)
        routing.adapters.add(name, changes, device, shape.dtype)
    tokenizer = AutoTokenizer.from_pretrained(store.trunk_path, trust_remote_code=False, local_files_only=True)
    selective = SelectiveModel(
        model=model,
        tokenizer=tokenizer,
        store=store,
        cache=PagedCache(store, pages, tier),
        routing=routing,
        device=device,
        dtype=shape.dtype,
        eos_token_ids=eos_token_ids_of(model, tokenizer),
        context_tokens=context_tokens(store.trunk_path),
        adapters=adapters,
    )
    step_options = StepOptions(resident_bias=options.resident_bias, batch_invariant=options.batch_invariant)
    return DeviceRunner(
        selective, shape, weights, pages, stream, num_blocks=num_blocks, tier=tier,
        options=step_options, adapted=adapted, moving=moving, fixed_by=fixed_by,
    )  # fmt: skip


def captured_shape(
    skeleton: PreTrainedModel, layers: Sequence[LayerSpec], dtype: torch.dtype, max_rows: int, max_tokens: int
) -> DecodeShape:
    """The shape of the step that a model's trunk and the spans of its experts give. Raises NotCapturableError."""
    intermediate, packed = _experts_of(layers, _is_transposed(skeleton))
    shape = decode_shape(
        skeleton, intermediate=intermediate, max_rows=max_rows, max_tokens=max_tokens, dtype=dtype, packed=packed,
        bias=_bias_of(layers[0], dtype),
    )  # fmt: skip
    _check_layers(layers, shape)
    return shape


def _check_layers(layers: Sequence[LayerSpec], shape: DecodeShape) -> None:
    held = [spec.model_layer for spec in layers]
    routed = [layer for layer in range(shape.num_layers) if layer not in shape.dense_layers]
    if held != routed:
        raise NotCapturableError(f"layers {routed} have routed experts, of which the store has those of {held}")
    has_biases = _bias_of(layers[0], shape.dtype) is not None
    need(has_biases == (shape.experts.bias is not None), "only one of the model and the store has biases of experts")
    need(shape.span_bytes % 16 == 0, f"experts of {shape.span_bytes} bytes: wanted a multiple of 16")


def _is_transposed(skeleton: PreTrainedModel) -> bool:
    """Whether plain matrices of the experts have their input rows first."""
    blocks = moe_blocks(skeleton)
    return bool(blocks) and bool(blocks[0][1].experts.is_transposed)


_EXPERTS = (
    ("gate_up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
)
"""The tensors of a span that the kernels read, in their order."""


def _experts_of(layers: Sequence[LayerSpec], transposed: bool) -> tuple[int, tuple[RowEncoding, RowEncoding] | None]:
    """I of the experts, and the encodings of gate_up and down, None if they are plain.

    Args:
        transposed: plain matrices have their input rows first.

    Raises NotCapturableError for layouts other than gate_up [2I, H] then down [H, I], each with its bias or none, and
    for a plain one beside a packed.
    """
    first = layers[0].tensors
    for spec in layers:
        shapes = {tensor.name: _rows_first(tensor, transposed) for tensor in spec.tensors}
        alike = [(one.shape, one.encoding) for one in spec.tensors] == [(one.shape, one.encoding) for one in first]
        need(
            tuple(shapes) in _EXPERTS and _is_gated(shapes) and alike,
            f"experts hold {shapes}, not gate_up [2I, H] and down [H, I] alike in every layer",
        )
    rows, columns = (tensor.encoding for tensor in first if len(tensor.shape) == 2)
    need((rows is None) == (columns is None), "one of gate_up and down is packed and the other is not")
    intermediate = _rows_first(next(tensor for tensor in first if tensor.name == "down_proj"), transposed)[1]
    return intermediate, None if rows is None or columns is None else (rows, columns)


def _rows_first(tensor: TensorSpec, transposed: bool) -> tuple[int, ...]:
    """The shape of a tensor as the kernels read it."""
    return tensor.shape[::-1] if transposed and tensor.encoding is None else tensor.shape


def _is_gated(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are those of one gated expert."""
    up, down = shapes["gate_up_proj"], shapes["down_proj"]
    biases = [
        shapes.get(name, wanted) for name, wanted in (("gate_up_proj_bias", up[:1]), ("down_proj_bias", down[:1]))
    ]
    return up == (2 * down[1], down[0]) and biases == [up[:1], down[:1]]


def _bias_of(spec: LayerSpec, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the biases in the spans that the kernels read; None if experts have none."""
    biases = [tensor for tensor in spec.tensors if tensor.name.endswith("_bias")]
    if not biases:
        return None
    return TORCH_DTYPES[biases[0].dtype] if spec.is_encoded else dtype


def warm_up(runner: DeviceRunner, progress: Progress = lambda phase, share: None) -> None:
    """Runs a prompt of each length, alone and after another one, over the experts in slots, and captures the drawing of
    tokens, so that the first request does not wait for one-time work. Afterwards rows are free and pages unchanged."""
    mask = _resident(runner)
    if mask is None:
        return
    for done, length in enumerate(WARMED_LENGTHS):
        progress(Phase.WARMING, done / len(WARMED_LENGTHS))
        tokens = [(1 + 7919 * at) % runner.shape.vocab for at in range(min(length, runner.max_tokens // 2))]
        row = runner.allocate()
        runner.prefill(row, tokens, mask=mask)
        runner.prefill(row, tokens, mask=mask)
        runner.free(row)
    runner.graphs.prepare_draws()
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize()


def _resident(runner: DeviceRunner) -> ExpertMask | None:
    """The servable experts that are in slots; None if a layer has none."""
    resident = (runner.pages.page_table >= 0).cpu().numpy()
    try:
        return ExpertMask.of(np.logical_and(resident, runner.model.routing.mask.allowed))
    except MaskError:
        return None
