"""From settings to a model whose engine runs: where store, mask, model, runner and engine are put together.

Importing torch and transformers takes seconds, so it happens inside `load`, which the service runs in the background.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from server.errors import SettingsError
from server.serving.load_progress import DEVICE_PHASES, OPENING, SOURCE, STARTING, LoadProgress, load_weights
from server.serving.service import ExpertsSnapshot, LoadedModel, Progress, ShardInfo
from server.settings.schema import Settings

if TYPE_CHECKING:
    from expert_store.manifest import Manifest
    from expert_store.store import Store
    from extractor.statistics.statistics import ExpertStatistics
    from router.mask import ExpertMask
    from server.engine.engine import Engine
    from server.engine.statistics_file import StatisticsFile
    from server.masks.pricing import KnownPrice
    from server.model.decode_path import RunnerOptions
    from server.model.runner import Runner

log = logging.getLogger(__name__)
DEFAULT_CONTEXT_TOKENS = 8192
POLL_SECONDS = 0.05


def check_store(settings: Settings) -> Manifest:
    """The manifest of the store that the settings name; cheap, so that a wrong path is said before anything starts.

    Raises:
        SettingsError: no store is named. ManifestError: it is no store, or of an unknown version.
    """
    from expert_store.manifest import read_manifest

    return read_manifest(_store_path(settings))


def load(settings: Settings, progress: Progress) -> LoadedModel:
    """Open the store, load the model on the engine's thread, and return when requests are taken. Blocks for long.

    Raises:
        StoreError, MaskError, SettingsError, TrunkError: what is wrong with the store, the mask or the memory.
    """
    manifest = check_store(settings)
    steps = LoadProgress(load_weights(manifest, settings.model.slots))
    if settings.model.decode_path == "host" or settings.model.device == "cpu":
        steps.leave_out(DEVICE_PHASES)
    progress(steps.at(STARTING, 0.0), STARTING)
    from expert_store.integrity import TrunkCheck

    # begun here, it runs while torch and transformers are imported
    trunk_check = TrunkCheck(_store_path(settings).resolve(), manifest)
    import transformers

    from expert_store.store import Store
    from extractor.checkpoint.source import attach_source
    from server.engine.admission import EngineLimits
    from server.engine.engine import Engine
    from server.engine.usage import UsageFile
    from server.masks.pricing import load_statistics
    from server.model.decode_path import DecodePathError
    from server.model.host.assembly import resolve_device, resolve_dtype
    from server.serving.masks_and_growth import MasksAndGrowth

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress(steps.at(OPENING, 0.0), OPENING)
    store = Store.open(_store_path(settings), trunk_check=trunk_check)
    try:
        mask = _mask(settings, store)
        device = resolve_device(settings.model.device)
        if device.type != "cuda":
            steps.leave_out(DEVICE_PHASES)
        dtype = resolve_dtype(settings.model.dtype, store)
        statistics = load_statistics(settings.model.statistics, store.manifest)
        known = _known_price(settings, store, mask, statistics)
        masks_and_growth = MasksAndGrowth.read(settings, store, mask, statistics)
    except BaseException:
        store.close()
        raise
    failure: list[BaseException] = []

    def make_runner(report_all: Callable[[str, float], None]) -> Runner:
        def report(phase: str, share: float) -> None:
            report_all(phase, steps.at(phase, share))

        try:
            limit = _context_limit(settings, store)
            try:
                options = _options(settings, store, mask, limit)
                runner = _load_runner(settings, store, options, device=device, dtype=dtype, progress=report)
            except DecodePathError as error:
                raise SettingsError(str(error)) from error
            if not store.available.all():
                report(SOURCE, 0.0)
                runner.model.source_problem = attach_source(store, settings.growth.grow_from)
            return runner
        except BaseException as error:
            failure.append(error)
            raise

    engine = Engine(
        make_runner,
        EngineLimits(
            max_waiting_requests=settings.engine.max_queue_requests,
            max_waiting_tokens=settings.engine.max_queue_tokens,
            prefill_chunk_tokens=settings.engine.prefill_chunk_tokens,
        ),
        usage=lambda ledger: UsageFile(store.path / "usage.json", ledger, settings.usage.usage_save_seconds),
        corrupt_experts=settings.engine.corrupt_experts,
        statistics=_statistics_file(settings, store) if settings.usage.collect_statistics else None,
    )
    engine.start()
    while (status := engine.status()).state == "loading":
        progress(steps.share, steps.phase)
        time.sleep(POLL_SECONDS)
    if failure:
        raise failure[0]
    if status.state != "ready":
        raise RuntimeError(f"the engine ended while it loaded: {status.reason}")
    model, grower = _describe(engine, store, known), masks_and_growth.grower(engine, settings)
    masks_and_growth.start_growing(grower, settings)
    return replace(model, growth=grower, masks=masks_and_growth.masks(engine))


def _load_runner(settings: Settings, store: Store, options: RunnerOptions, **arguments: Any) -> Runner:
    """The runner; what of the store turns out to be damaged meanwhile is left out where the settings say so."""
    from expert_store.errors import ShardCorruptError
    from server.engine.unreadable import exclude_damaged
    from server.model.decode_path import load_runner

    while True:
        try:
            return load_runner(store, options, **arguments)
        except ShardCorruptError as error:
            if settings.engine.corrupt_experts == "fail" or not exclude_damaged(store, error):
                raise


def _statistics_file(settings: Settings, store: Store) -> Callable[[ExpertStatistics], StatisticsFile]:
    from server.engine.statistics_file import FILE_NAME, StatisticsFile

    return lambda empty: StatisticsFile(store.path / FILE_NAME, empty, settings.usage.usage_save_seconds)


def _context_limit(settings: Settings, store: Store) -> int:
    """Tokens of a row: what was asked for, within what the model was made for."""
    from server.model.seam.trunk import context_tokens

    most = context_tokens(store.trunk_path)
    limit = settings.engine.max_context_tokens or min(most, DEFAULT_CONTEXT_TOKENS)
    if limit > most:
        raise SettingsError(
            f"max_context_tokens is {limit}, the model was made for {most}: set at most that, or leave it out"
        )
    return limit


def _options(settings: Settings, store: Store, mask: ExpertMask | None, max_tokens: int) -> RunnerOptions:
    from server.model.decode_path import RunnerOptions

    model, experts_bytes = settings.model, _experts_bytes(store)
    return RunnerOptions(
        path=model.decode_path,
        max_rows=settings.engine.max_batch_size,
        max_tokens=max_tokens,
        num_slots=model.slots,
        slots_memory_bytes=None if model.slots_memory is None else model.slots_memory.resolve(experts_bytes),
        host_memory_bytes=None if model.host_memory is None else model.host_memory.resolve(experts_bytes),
        mask=mask,
        cache_policy=model.cache_policy,
        pinned_experts=model.pinned_experts,
        resident_bias=model.resident_bias,
    )


def _describe(engine: Engine, store: Store, known: KnownPrice) -> LoadedModel:
    runner = engine.runner
    model, spec = runner.model, store.manifest.model
    return LoadedModel(
        name=store.manifest.source.name,
        family=spec.family,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        decode_path=runner.decode_path,
        num_layers=spec.num_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        vocab_size=model.vocab_size,
        max_context_tokens=runner.max_tokens,
        tokenizer=model.tokenizer,
        engine=engine,
        experts=lambda: _snapshot(engine, store),
        price=known.price,
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
        shards=tuple(ShardInfo(deep.file, deep.bytes, deep.experts) for deep in store.manifest.deep_experts),
    )


def _store_path(settings: Settings) -> Path:
    if settings.store is None:
        raise SettingsError("no store is named: give its directory as the first argument, or set DEEPFEW_STORE")
    return settings.store


def _mask(settings: Settings, store: Store) -> ExpertMask | None:
    from router.mask import ExpertMask, parse_experts

    if settings.model.experts is None:
        return None
    spec = store.manifest.model
    wanted = ExpertMask.same_in_every_layer(parse_experts(settings.model.experts), spec.num_layers, spec.num_experts)
    return ExpertMask.of(store.available) & wanted


def _known_price(
    settings: Settings, store: Store, mask: ExpertMask | None, statistics: ExpertStatistics | None
) -> KnownPrice:
    """What is known of the mask's price; warns where it is high, or unknown."""
    from router.mask import ExpertMask
    from server.masks.pricing import known_price, price_warnings

    served = ExpertMask.of(store.available) if mask is None else mask
    known = known_price(store.manifest, served, statistics)
    for warning in price_warnings(known, served, settings.model.warn_perplexity_ratio):
        log.warning("%s", warning)
    return known


def _span_bytes(store: Store) -> NDArray[np.int64]:
    return np.array([spec.span_bytes for spec in store.manifest.layers], dtype=np.int64)


def _experts_bytes(store: Store) -> int:
    """Bytes of all experts of the store: what a share of memory is a share of."""
    return int((store.available.sum(axis=1) * _span_bytes(store)).sum())
