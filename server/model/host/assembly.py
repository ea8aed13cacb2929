"""Assembles a model from a store: trunk, expert cache, masked routing and tokenizer.

Invariant: every experts module of the model is bound to one MoE layer of the store, and the router beside it to the
same layer; `load_model` refuses anything else.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from expert_store.adapter import store_adapters
from expert_store.errors import SlotsError
from expert_store.residency.cache import ExpertCache
from expert_store.residency.host_tier import HostTier
from expert_store.residency.pinned import free_host_bytes
from expert_store.residency.policy import POLICIES
from expert_store.residency.slots import slot_bytes
from expert_store.rows import TORCH_DTYPES
from expert_store.store import Store
from router.errors import MaskError
from router.mask import ExpertMask
from server.model.balance import refusal
from server.model.host.kept import most_used_experts
from server.model.kv_memory import HOST_RESERVE_BYTES, kv_token_bytes, slots_beside_kv
from server.model.load_progress import Phase, Progress
from server.model.runner import RunnerOptions, SelectiveModel
from server.model.seam.experts import LAYER_ATTRIBUTE, ExpertsLayer
from server.model.seam.routing import StepRouting
from server.model.seam.rows import fix_rows
from server.model.seam.trunk import TrunkError, context_tokens, is_experts_module, load_trunk, trunk_is_checked

log = logging.getLogger(__name__)
ROUTER_NAMES = ("gate", "router")


@dataclass
class HostModel(SelectiveModel):
    """A model whose experts the host fetches into the slots of an `ExpertCache`."""

    cache: ExpertCache


COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of the name ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        SlotsError: this machine has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SlotsError(
            f"device is {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; "
            "name one of them, or use cpu or auto"
        )
    return device


def resolve_dtype(name: str, store: Store) -> torch.dtype:
    """The dtype of a name: ``auto`` is the checkpoint's own dtype; else float32, bfloat16 or float16."""
    return TORCH_DTYPES[store.manifest.model.dtype] if name == "auto" else COMPUTE_DTYPES[name]


def slots_for_memory(store: Store, budget_bytes: int, dtype: torch.dtype) -> int:
    """The number of slots for each layer that fit into a budget for all layers.

    Raises:
        SlotsError: not even one fits.
    """
    per_slot = sum(slot_bytes(spec, dtype) for spec in store.manifest.layers)
    num_slots = budget_bytes // per_slot
    if num_slots < 1:
        raise SlotsError(
            f"--slots-memory {budget_bytes} bytes is less than one slot in each of {len(store.manifest.layers)} "
            f"layers: pass at least {per_slot} bytes"
        )
    return min(int(num_slots), store.manifest.model.num_experts)


@trunk_is_checked
def load_model(store: Store, options: RunnerOptions, *, progress: Progress = lambda phase, share: None) -> HostModel:
    """Assemble the model of a store, with a slot for every available expert unless `options` say otherwise.

    Raises:
        ShardCorruptError: a file of the trunk, or an adapter, is damaged.
        AdapterError: one that does not fit the model. StoreError, TrunkError, MaskError: see there.
        SlotsError: memory does not suffice.
    """
    device, dtype = options.device, options.dtype
    available = ExpertMask.of(store.available)
    mask = available if options.mask is None else available & options.mask
    progress(Phase.TRUNK, 0.0)
    model = load_trunk(
        store.trunk_path, device=device, dtype=dtype, progress=lambda share: progress(Phase.TRUNK, share)
    )
    num_slots = options.num_slots
    if num_slots is None:
        num_slots = int(mask.num_allowed.max())
        if options.slots_memory_bytes is not None:
            num_slots = min(num_slots, slots_for_memory(store, options.slots_memory_bytes, dtype))
        elif device.type == "cpu":
            num_slots = _slots_that_fit(store, options, num_slots, model.config.get_text_config(), free_host_bytes())
    progress(Phase.SLOTS, 0.0)
    host_tier = None
    if device.type == "cuda":
        host_tier = _host_tier(store, options.host_memory_bytes)
    cache = ExpertCache(
        store,
        num_slots=num_slots,
        device=device,
        dtype=dtype,
        host_tier=host_tier,
        policy=POLICIES[options.cache_policy],
        mask=mask.allowed,
        kept=most_used_experts(store, mask, options.kept_experts),
        most_slots=None if refusal(options.memory_balance, device) else store.manifest.model.num_experts,
    )
    routing = StepRouting(store.manifest.model.family, len(store.manifest.layers), device, mask)
    _bind(model, store, cache, routing, options.batch_invariant)
    refusal_of_mask = routing.mask_refusal(mask)
    if refusal_of_mask is not None:
        raise MaskError(f"{refusal_of_mask}: extract every expert, and serve without a mask")
    if options.batch_invariant:
        fix_rows(model)
    adapters = store_adapters(store.path, store.manifest) if options.adapters else {}
    for name, adapter in adapters.items():
        routing.install_adapters(model, adapter.changes)
        routing.adapters.add(name, adapter.changes, device, dtype)
    cache.preload(lambda done, total: progress(Phase.SLOTS, done / max(1, total)))
    tokenizer = AutoTokenizer.from_pretrained(store.trunk_path, trust_remote_code=False, local_files_only=True)
    return HostModel(
        model=model,
        tokenizer=tokenizer,
        store=store,
        cache=cache,
        routing=routing,
        device=device,
        dtype=dtype,
        eos_token_ids=eos_token_ids_of(model, tokenizer),
        context_tokens=context_tokens(store.trunk_path),
        adapters=adapters,
    )


def _slots_that_fit(store: Store, options: RunnerOptions, most: int, config: Any, free: int | None) -> int:
    """Slots of each layer where no wish bounds them: `most`, or those that the `free` host memory has room for."""
    if free is None:
        return most
    per_slot = sum(slot_bytes(spec, options.dtype) for spec in store.manifest.layers)
    num_slots = slots_beside_kv(
        per_slot,
        most,
        kv_token_bytes(config, options.dtype.itemsize),
        options.max_rows,
        options.max_tokens,
        options.max_tokens if options.least_tokens is None else options.least_tokens,
        options.kv_memory_bytes,
        free - HOST_RESERVE_BYTES,
    )
    if num_slots < most:
        log.warning(
            "host memory has room for %d of %d slots a layer: the disk holds the other experts", num_slots, most
        )
    return max(1, num_slots)


def _host_tier(store: Store, budget_bytes: int | None) -> HostTier:
    everything = int(store.available.sum()) * max(spec.span_bytes for spec in store.manifest.layers)
    return HostTier(store, budget_bytes=everything if budget_bytes is None else budget_bytes, pinned=True)


def _bind(
    model: PreTrainedModel, store: Store, cache: ExpertCache, routing: StepRouting, batch_invariant: bool
) -> None:
    """Give each experts module its MoE layer, and hook the router beside it."""
    found = {name: module for name, module in model.named_modules() if is_experts_module(module)}
    by_layer = {_model_layer(name): (name, module) for name, module in found.items()}
    wanted = {spec.model_layer: layer for layer, spec in enumerate(store.manifest.layers)}
    if set(by_layer) != set(wanted):
        raise TrunkError(
            f"the store has experts for layers {sorted(wanted)}, the model for layers {sorted(by_layer)}: "
            "the trunk's config is not the one that was extracted"
        )
    for model_layer, layer in wanted.items():
        name, experts = by_layer[model_layer]
        object.__setattr__(experts, LAYER_ATTRIBUTE, ExpertsLayer(layer, cache, batch_invariant))
        routing.install(layer, _router_beside(model, name))


def _model_layer(module_name: str) -> int:
    match = re.search(r"\.(\d+)\.", module_name)
    if match is None:
        raise TrunkError(f"experts module {module_name} has no layer number in its name")
    return int(match.group(1))


def _router_beside(model: PreTrainedModel, experts_name: str) -> nn.Module:
    parent = model.get_submodule(experts_name.rpartition(".")[0])
    for name in ROUTER_NAMES:
        router: Any = getattr(parent, name, None)
        if isinstance(router, nn.Module):
            return router
    raise TrunkError(f"beside {experts_name} stands no router named {' or '.join(ROUTER_NAMES)}")


def eos_token_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    generation: GenerationConfig | None = model.generation_config
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
