"""Assembles store, mask, model, runner and engine from the settings. Imports torch and transformers.

Invariant: the store is closed if an error is raised before the engine owns it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from expert_store.adapter import made_for, store_adapters
from expert_store.errors import ShardCorruptError
from expert_store.integrity import TrunkCheck
from expert_store.manifest import DTYPE_BYTES, expert_bits, expert_encodings
from expert_store.store import Store
from extractor.checkpoint.checkpoint import checkpoint_name
from extractor.checkpoint.source import attach_source
from extractor.statistics.price import Price
from extractor.statistics.statistics import ExpertStatistics
from router.mask import ExpertMask, parse_experts
from server.constraints.compiler import ConstraintCompiler
from server.engine.admission import EngineLimits
from server.engine.engine import Engine
from server.engine.snapshots import STATISTICS_FILE, USAGE_FILE, StatisticsFile, UsageFile
from server.engine.unreadable import exclude_damaged
from server.errors import SettingsError
from server.masks.pricing import KnownPrice, known_price, load_statistics, price_warnings, ratio_warning
from server.model.decode_path import DecodePathError, load_runner
from server.model.host.assembly import resolve_device, resolve_dtype
from server.model.kv_memory import context_bounds
from server.model.load_progress import DEVICE_PHASES, LoadProgress, Phase, Progress
from server.model.runner import Runner, RunnerOptions
from server.model.seam.trunk import context_tokens
from server.serving.generation_defaults import read_generation_defaults
from server.serving.masks_and_growth import MasksAndGrowth
from server.serving.service import ExpertsSnapshot, LoadedModel, ShardInfo
from server.settings.schema import Settings

log = logging.getLogger(__name__)


def assemble(
    settings: Settings, trunk_check: TrunkCheck, progress: LoadProgress, *, grows_by_itself: bool
) -> LoadedModel:
    """Open the store that the settings name, load its model on the engine's thread, and return when it is ready.

    Args:
        trunk_check: the running check of the store's trunk.
        progress: called for every phase, on this thread and then on the engine's.
        grows_by_itself: see `server.serving.loading.load`.

    Raises:
        StoreError, MaskError, SettingsError, TrunkError: see `server.serving.loading.load`.
    """
    assert settings.store is not None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress(Phase.OPENING, 0.0)
    store = Store.open(settings.store, trunk_check=trunk_check)
    try:
        mask = _mask(settings, store)
        device = resolve_device(settings.model.device)
        if device.type != "cuda":
            progress.leave_out(DEVICE_PHASES)
        dtype = resolve_dtype(settings.model.dtype, store)
        statistics = load_statistics(settings.model.statistics, store.manifest)
        known = _known_price(settings, store, mask, statistics)
        masks_and_growth = MasksAndGrowth.read(settings, store, mask, statistics)
    except BaseException:
        store.close()
        raise

    def make_runner(notify_engine: Progress) -> Runner:
        def report(phase: Phase, share: float) -> None:
            notify_engine(phase, share)
            progress(phase, share)

        if device.type == "cuda":
            torch.cuda.set_device(device)  # of the engine's thread, which launches kernels and captures graphs
        options = _options(settings, store, mask, device, dtype)
        try:
            runner = _load_runner(settings, store, options, report)
        except DecodePathError as error:
            raise SettingsError(str(error)) from error
        if not store.available.all():
            report(Phase.SOURCE, 0.0)
            runner.model.source_problem = attach_source(store, settings.growth.grow_from)
        return runner

    engine = _engine(settings, store, make_runner)
    engine.start()
    engine.loaded.result()
    model, grower = _describe(settings, engine, store, known), masks_and_growth.grower(engine, settings)
    if grows_by_itself:
        masks_and_growth.start_growing(grower, settings)
    return replace(model, growth=grower, masks=masks_and_growth.masks(engine))


def _engine(settings: Settings, store: Store, make_runner: Callable[[Progress], Runner]) -> Engine:
    directory = usage_directory(settings, store)
    return Engine(
        make_runner,
        EngineLimits(
            max_waiting_requests=settings.engine.max_queue_requests,
            max_waiting_tokens=settings.engine.max_queue_tokens,
            prefill_chunk_tokens=settings.engine.prefill_chunk_tokens,
        ),
        usage=lambda ledger: UsageFile(directory / USAGE_FILE, ledger, settings.usage.usage_save_seconds),
        corrupt_experts=settings.engine.corrupt_experts,
        statistics=_statistics_file(settings, store) if settings.usage.collect_statistics else None,
    )


def usage_directory(settings: Settings, store: Store) -> Path:
    """The directory of the usage and the collected statistics; made if it is not there.

    Raises:
        SettingsError: it cannot be made.
    """
    directory = settings.usage.usage_directory
    if directory is None:
        return store.path
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"the usage directory {directory} cannot be made: {error.strerror}") from error
    return directory


def _load_runner(settings: Settings, store: Store, options: RunnerOptions, progress: Progress) -> Runner:
    """Load the runner; leave out experts that are found damaged while loading, if the settings say so."""
    while True:
        try:
            return load_runner(store, options, progress=progress)
        except ShardCorruptError as error:
            if settings.engine.corrupt_experts == "fail" or not exclude_damaged(store, error):
                raise


def _statistics_file(settings: Settings, store: Store) -> Callable[[ExpertStatistics], StatisticsFile]:
    directory = usage_directory(settings, store)
    return lambda empty: StatisticsFile(directory / STATISTICS_FILE, empty, settings.usage.usage_save_seconds)


def _options(
    settings: Settings, store: Store, mask: ExpertMask | None, device: torch.device, dtype: torch.dtype
) -> RunnerOptions:
    model, of_bytes = settings.model, experts_bytes(store)
    max_tokens, least_tokens = context_bounds(settings.engine.max_context_tokens, context_tokens(store.trunk_path))
    return RunnerOptions(
        device=device,
        dtype=dtype,
        path=model.decode_path,
        max_rows=settings.engine.max_batch_size,
        max_tokens=max_tokens,
        least_tokens=least_tokens,
        kv_memory_bytes=None if model.kv_memory is None else model.kv_memory.resolve(of_bytes),
        memory_balance=model.memory_balance or ("moving" if device.type == "cpu" else "fixed"),
        prefix_cache=model.prefix_cache,
        num_slots=model.slots,
        slots_memory_bytes=None if model.slots_memory is None else model.slots_memory.resolve(of_bytes),
        host_memory_bytes=None if model.host_memory is None else model.host_memory.resolve(of_bytes),
        mask=mask,
        cache_policy=model.cache_policy,
        kept_experts=model.kept_experts,
        resident_bias=model.resident_bias,
        batch_invariant=model.batch_invariant,
        adapters=model.adapters,
    )


def _describe(settings: Settings, engine: Engine, store: Store, known: KnownPrice) -> LoadedModel:
    runner = engine.runner
    model, spec = runner.model, store.manifest.model
    source = store.manifest.source
    name, *other_names = settings.model.served_names or (checkpoint_name(source.location, source.name),)
    return LoadedModel(
        name=name,
        other_names=tuple(other_names),
        generation_defaults=read_generation_defaults(store.trunk_path) if settings.model.use_generation_config else {},
        family=spec.family,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        decode_path=runner.decode_path,
        batch_invariant=settings.model.batch_invariant and settings.model.resident_bias == 0.0,
        encodings=expert_encodings(store.manifest.layers),
        expert_bits=expert_bits(store.manifest.layers),
        trunk_bits=8 * DTYPE_BYTES[spec.dtype],
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        vocab_size=model.vocab_size,
        max_context_tokens=runner.max_tokens,
        tokenizer=model.tokenizer,
        engine=engine,
        experts=lambda: _snapshot(engine, store),
        price=known.price,
        adapters=model.adapters,
        adapter_prices={adapter: Price.from_json(one.price) for adapter, one in model.adapters.items() if one.price},
        constraints=ConstraintCompiler(model.tokenizer, model.vocab_size, model.eos_token_ids),
    )


def _snapshot(engine: Engine, store: Store) -> ExpertsSnapshot:
    cache, ledger = engine.runner.model.cache, engine.ledger
    assert ledger is not None
    statistics = cache.statistics()
    return ExpertsSnapshot(
        available=engine.runner.model.routing.mask.allowed.copy(),
        corrupt=store.excluded,
        uses=ledger.served_count.copy(),
        demand=ledger.demand_count.copy(),
        served_mass=ledger.served_mass.copy(),
        demand_mass=ledger.demand_mass.copy(),
        deficit=ledger.deficit_per_layer,
        overall_deficit=ledger.deficit,
        num_tokens=ledger.num_tokens,
        top1_missing=ledger.top1_missing.copy(),
        top1_missing_tokens=ledger.top1_missing_tokens,
        resident=cache.page_table >= 0,
        hits=statistics.hits,
        misses=statistics.misses,
        evictions=statistics.evictions,
        fetch_bytes=statistics.fetch_bytes,
        fetch_seconds=statistics.fetch_seconds,
        expert_bytes=_span_bytes(store),
        num_slots=statistics.num_slots,
        slot_bytes=statistics.slot_bytes,
        host_hits=statistics.host_hits,
        host_misses=statistics.host_misses,
        tier=statistics.tier,
        shards=tuple(ShardInfo(deep.file, deep.bytes, deep.experts) for deep in store.manifest.deep_experts),
    )


def _mask(settings: Settings, store: Store) -> ExpertMask | None:
    if settings.model.experts is None:
        return None
    spec = store.manifest.model
    wanted = ExpertMask.same_in_every_layer(parse_experts(settings.model.experts), spec.num_layers, spec.num_experts)
    return ExpertMask.of(store.available) & wanted


def _known_price(
    settings: Settings, store: Store, mask: ExpertMask | None, statistics: ExpertStatistics | None
) -> KnownPrice:
    """The known price of the mask; warns where it is high, or unknown."""
    served = ExpertMask.of(store.available) if mask is None else mask
    known = known_price(store.manifest, served, statistics)
    adapters = store_adapters(store.path, store.manifest) if settings.model.adapters else {}
    name = made_for(adapters, served.allowed)
    if name is None:
        warnings = price_warnings(known, served, settings.model.warn_perplexity_ratio)
    else:
        warnings = ratio_warning(name, adapters[name], served, settings.model.warn_perplexity_ratio)
    for warning in warnings:
        log.warning("%s", warning)
    return known


def _span_bytes(store: Store) -> NDArray[np.int64]:
    return np.array([spec.span_bytes for spec in store.manifest.layers], dtype=np.int64)


def experts_bytes(store: Store) -> int:
    """Bytes of all experts of the store, which are the whole for a share of memory."""
    return int((store.available.sum(axis=1) * _span_bytes(store)).sum())
