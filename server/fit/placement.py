"""The places of a model's bytes on a machine: device memory, host memory, disk, as `deepfew serve` would fill them.

Invariant: the arithmetic is that of serving: `DeviceMemory` and `rows_within` for the captured path, `slot_bytes` and
`blocks_within` for the host-driven one, so that what is said to fit is what loads.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from expert_store.errors import SlotsError
from expert_store.residency.pinned import LOCKED_SHARE
from server.errors import UsageError
from server.fit.facts import ModelFacts
from server.model.device.capture import NotCapturableError
from server.model.device.capture.pack import pack_trunk, packed_trunk_bytes
from server.model.kv.blocks import BLOCK_TOKENS, num_blocks_of
from server.model.kv_memory import DEVICE_RESERVE_BYTES, HOST_RESERVE_BYTES, blocks_within, slots_beside_kv

if TYPE_CHECKING:
    from server.model.device.step.weights import DecodeShape


@dataclass(frozen=True)
class Wish:
    """The memory of a machine and the settings of a server.

    Attributes:
        gpu: whether a GPU computes; else the CPU does, from host memory.
        device_memory: free bytes of the GPU before anything is loaded; 0 for a CPU.
        host_memory: bytes that the process may take.
        context: most tokens of a row, `least_context` those that it must be able to have.
        rows: decoded together.
        slots_memory: bytes for slots; None: those that are free.
        kv_memory: bytes for keys and values; None: a share of those that are free.
        host_budget: bytes of host memory for experts behind the slots of a GPU; None: what may be page-locked.
    """

    gpu: bool
    device_memory: int
    host_memory: int
    context: int
    least_context: int
    rows: int
    slots_memory: int | None = None
    kv_memory: int | None = None
    host_budget: int | None = None


@dataclass(frozen=True)
class Placement:
    """Bytes by place, and the path that decodes. `problem` says why it does not fit, None if it does.

    Attributes:
        step_bytes: of the trunk that a decode step reads.
        kv_tokens: that KV memory holds, of all rows together.
        path: captured: the device fetches experts in graphs; host: the host does.
        reason: of a GPU whose path is host; else empty.
        slots: of each layer; `beside_slots` are the bytes of spill and ring.
        host_experts: experts of all layers that host memory holds beside the slots.
    """

    path: Literal["captured", "host"]
    reason: str
    problem: str | None
    trunk_bytes: int
    step_bytes: int
    kv_bytes: int
    kv_tokens: int
    slots: int
    slots_bytes: int
    beside_slots: int
    reserve_bytes: int
    host_experts: int
    host_bytes: int
    disk_bytes: int


def place(model: ModelFacts, wish: Wish) -> Placement:
    """The placement of a model."""
    if not wish.gpu:
        return _on_cpu(model, wish)
    try:
        shape = _captured_shape(model, wish)
        return _captured(model, wish, shape)
    except NotCapturableError as error:
        return _on_gpu(model, wish, str(error))


def _captured_shape(model: ModelFacts, wish: Wish) -> DecodeShape:
    """Raises NotCapturableError; UsageError where the GPU is another machine's, on which Triton may be installed."""
    if importlib.util.find_spec("triton") is None:
        if torch.cuda.is_available():
            raise NotCapturableError("triton is not installed")
        raise UsageError(
            "what a GPU does is computed from its Triton kernels, and triton is not installed here: install it "
            "(pip install triton; it needs no GPU, but Linux), or leave out --device-memory and --machine for this CPU"
        )
    from server.model.device.running.assembly import captured_shape

    return captured_shape(model.skeleton, model.layers, model.dtype, wish.rows, wish.context)


def captured_trunk(model: ModelFacts, shape: DecodeShape) -> tuple[int, int]:
    """Bytes of the trunk with what the captured step packs of it anew, and those of them that a step reads."""
    weights = pack_trunk(model.skeleton, shape, model.eight_bits)
    return packed_trunk_bytes(model.skeleton, weights), weights.read_bytes


def _captured(model: ModelFacts, wish: Wish, shape: DecodeShape) -> Placement:
    from server.model.device.memory.budget import DeviceMemory
    from server.model.device.memory.tier import rows_within

    num_moe, span = len(model.layers), shape.span_bytes
    served, step = num_moe * model.num_available, num_moe * min(model.num_available, model.top_k)
    budget = wish.host_budget
    if budget is None and LOCKED_SHARE * wish.host_memory < served * span:
        budget = int(LOCKED_SHARE * wish.host_memory)
    rows = min(rows_within(budget, span, served, step), served)
    trunk_bytes, step_bytes = captured_trunk(model, shape)
    beside = wish.device_memory - trunk_bytes
    memory = DeviceMemory(
        shape, torch.device("cuda"), keeps_most=rows < served, beside_trunk=beside, least_tokens=wish.least_context
    )
    problem = None
    try:
        slots, blocks = memory.divide(model.num_available, None, wish.slots_memory, wish.kv_memory)
    except SlotsError as error:
        problem, slots, blocks = str(error), model.top_k, num_blocks_of(wish.least_context)
    pages = memory.pages_shape(slots)
    if not pages.paged:
        rows = 0
    elif rows < step and problem is None:
        problem = (
            f"host memory of {budget} bytes has room for {rows} experts, and one token may need {step}: it takes at "
            f"least {step * span}"
        )
    slots_bytes = num_moe * slots * span
    alone = slots * num_moe if rows < served else 0
    return Placement(
        path="captured",
        reason="",
        problem=problem,
        trunk_bytes=trunk_bytes,
        step_bytes=step_bytes,
        kv_bytes=blocks * memory.block_bytes + shape.state_bytes,
        kv_tokens=blocks * BLOCK_TOKENS,
        slots=slots,
        slots_bytes=slots_bytes,
        beside_slots=memory.slots_bytes(slots) - slots_bytes,
        reserve_bytes=DEVICE_RESERVE_BYTES,
        host_experts=rows,
        host_bytes=rows * span,
        disk_bytes=max(0, served - rows - alone) * span if pages.paged else 0,
    )


def _on_gpu(model: ModelFacts, wish: Wish, reason: str) -> Placement:
    """The host-driven path of a GPU: slots on the device, experts behind them in page-locked memory."""
    free = wish.device_memory - model.trunk_bytes - DEVICE_RESERVE_BYTES
    served = len(model.layers) * model.num_available
    budget = wish.host_memory - HOST_RESERVE_BYTES if wish.host_budget is None else wish.host_budget
    held = max(0, min(served, int(budget / model.span_bytes)))
    return _host_driven(model, wish, free, DEVICE_RESERVE_BYTES, reason, held, served - held)


def _on_cpu(model: ModelFacts, wish: Wish) -> Placement:
    """The host-driven path of a CPU: slots in host memory, and behind them the page cache of what is left."""
    free = wish.host_memory - model.trunk_bytes - HOST_RESERVE_BYTES
    found = _host_driven(model, wish, free, HOST_RESERVE_BYTES, "", 0, 0)
    if found.slots >= model.num_available:
        return found
    behind = max(0, min(model.experts_bytes, free - found.slots_bytes - found.kv_bytes))
    return replace(
        found,
        host_experts=int(behind / model.span_bytes),
        host_bytes=behind,
        disk_bytes=model.experts_bytes - behind,
    )


def _host_driven(
    model: ModelFacts, wish: Wish, free: int, reserve: int, reason: str, held: int, on_disk: int
) -> Placement:
    """Slots and KV memory in the `free` bytes of the memory that computes; `held` experts are behind the slots."""
    per_slot = len(model.layers) * model.span_bytes
    block_bytes = BLOCK_TOKENS * model.kv_bytes
    bounds = (model.kv_bytes, wish.rows, wish.context, wish.least_context, wish.kv_memory)
    if wish.slots_memory is None:
        slots = slots_beside_kv(per_slot, model.num_available, *bounds, free)
    else:
        slots = min(model.num_available, int(wish.slots_memory / per_slot))
    slots_bytes = int(slots * per_slot)
    problem = (
        None if slots else f"{free} bytes are free for slots and KV memory, and a slot a layer takes {int(per_slot)}"
    )
    try:
        blocks = blocks_within(*bounds, max(0, free - slots_bytes))
    except SlotsError as error:
        problem, blocks = problem or str(error), num_blocks_of(wish.least_context)
    if problem is None and slots_bytes + blocks * block_bytes > free:
        problem = f"slots take {slots_bytes} bytes, KV memory {blocks * block_bytes}, and {free} are free for both"
    return Placement(
        path="host",
        reason=reason,
        problem=problem,
        trunk_bytes=model.trunk_bytes,
        step_bytes=model.step_bytes,
        kv_bytes=blocks * block_bytes,
        kv_tokens=blocks * BLOCK_TOKENS,
        slots=slots,
        slots_bytes=slots_bytes,
        beside_slots=0,
        reserve_bytes=reserve,
        host_experts=held,
        host_bytes=int(held * model.span_bytes),
        disk_bytes=int(on_disk * model.span_bytes),
    )
