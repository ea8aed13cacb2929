"""Engines over stores of the bundled checkpoint."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from expert_store.store import Store
from extractor.checkpoint.source import attach_source
from extractor.statistics.statistics import ExpertStatistics
from router.ledger import UsageLedger
from router.mask import ExpertMask
from server.engine.admission import EngineLimits
from server.engine.engine import Engine
from server.engine.snapshots import StatisticsFile, UsageFile
from server.engine.unreadable import CorruptExperts
from server.model.balance import SlotsAndBlocks
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner, block_bytes_of
from server.model.host.sequence_runner import SequenceRunner
from server.model.host.snapshots import CacheRows
from server.model.kv.blocks import num_blocks_of
from server.model.kv.rows import KvRows
from server.model.runner import Runner, RunnerOptions
from tests.server.engine.clients import WAIT_SECONDS


@pytest.fixture
def make_engine(tiny_store: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(
        max_rows: int = 4,
        mask: ExpertMask | None = None,
        usage_path: Path | None = None,
        usage_interval_seconds: float = 60.0,
        store_path: Path = tiny_store,
        num_slots: int = 16,
        corrupt_experts: CorruptExperts = "fail",
        statistics_path: Path | None = None,
        runner_type: type[HostRunner | SequenceRunner] = HostRunner,
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 256,
        kv_blocks: int | None = None,
        shares: bool = True,
        moving: dict[str, int] | None = None,
        **limits,
    ) -> Engine:
        def loader(progress) -> Runner:
            model = load_model(
                Store.open(store_path),
                RunnerOptions(
                    device=torch.device("cpu"),
                    dtype=dtype,
                    num_slots=num_slots,
                    mask=mask,
                    memory_balance="fixed" if moving is None else "moving",
                ),
                progress=progress,
            )
            model.source_problem = attach_source(model.store)
            num_blocks = kv_blocks or max_rows * num_blocks_of(max_tokens)
            kind = CacheRows if runner_type is SequenceRunner else KvRows
            of_rows = max_rows * num_blocks_of(max_tokens)
            kv = kind(max_rows=max_rows, num_blocks=num_blocks, shares=shares, most_blocks=of_rows)
            balance = None
            if moving is not None:
                size = block_bytes_of(model)
                balance = SlotsAndBlocks(model.cache, kv, blocks_bytes=lambda num_blocks: num_blocks * size, **moving)
            return runner_type(model, max_rows=max_rows, max_tokens=max_tokens, kv=kv, balance=balance)

        def usage(empty: UsageLedger) -> UsageFile:
            assert usage_path is not None
            return UsageFile(usage_path, empty, usage_interval_seconds)

        def statistics(empty: ExpertStatistics) -> StatisticsFile:
            assert statistics_path is not None
            return StatisticsFile(statistics_path, empty, interval_seconds=3600)

        engine = Engine(
            loader,
            EngineLimits(**limits),
            None if usage_path is None else usage,
            corrupt_experts,
            None if statistics_path is None else statistics,
        )
        engine.start()
        engines.append(engine)
        until = time.monotonic() + WAIT_SECONDS
        while engine.status().state == "loading" and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.status().state == "ready", engine.status()
        return engine

    yield make
    for engine in engines:
        engine.stop(0)
