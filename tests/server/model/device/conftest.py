"""Runners of both paths over small stores, with the checkpoint as the source of what a store lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_store.store import Store
from extractor.checkpoint.source import attach_source
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import Runner, RunnerOptions


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    pytest.importorskip("triton")
    from server.model.device.running.assembly import load_device_runner
    from server.model.device.step import graphs as device_graphs
    from tests.server.model.device.small import DEVICE, TUNING

    made: list[Runner] = []
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_graphs, "Tuning", lambda: TUNING)

    def make(path: Path, kind: str = "device", **options: Any) -> Runner:
        store = Store.open(path)
        attach_source(store)
        sizes = {"device": DEVICE, "dtype": torch.float32, "num_slots": 3, "max_rows": 2, "max_tokens": 64}
        given = RunnerOptions(**sizes | options)
        if kind == "device":
            made.append(load_device_runner(store, given, proof=False))
        else:
            made.append(HostRunner(load_model(store, given), max_rows=given.max_rows, max_tokens=given.max_tokens))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
