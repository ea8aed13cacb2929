"""Which way a store is run, what each refuses, and which experts keep their slots."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.errors import SlotsError
from expert_store.store import Store
from router.ledger import StepRecord, UsageLedger
from router.mask import ExpertMask
from server.model import decode_path
from server.model.decode_path import DecodePathError, load_runner
from server.model.host.kept import most_used_experts
from server.model.runner import RowStep, RunnerOptions

CPU = torch.device("cpu")
AUTO = RunnerOptions(CPU, torch.float32, max_rows=1, max_tokens=64, num_slots=12)


@pytest.fixture
def used_store(tiny_store: Path, tmp_path: Path) -> Path:
    """The tiny store with usage: in layer l, expert 10 + l was used most, then 40, then 20; all else never."""
    path = shutil.copytree(tiny_store, tmp_path / "store")
    with Store.open(path) as store:
        spec = store.manifest.model
        ledger = UsageLedger(spec.num_layers, spec.num_experts, store.manifest.source.fingerprint)
    index = np.array([[[10 + layer]] * 3 + [[40]] * 2 + [[20]] for layer in range(spec.num_layers)])
    ledger.add(StepRecord(index, np.ones(index.shape, dtype=np.float32)))
    (path / "usage.json").write_text(json.dumps(ledger.to_json()))
    return path


@pytest.fixture
def opened(tiny_store: Path) -> Iterator[Store]:
    with Store.open(tiny_store) as store:
        yield store


def load(store: Store, **options: object):
    return load_runner(store, replace(AUTO, **options))


def test_on_a_cpu_the_host_drives_and_one_line_says_why(opened, caplog):
    with caplog.at_level(logging.INFO):
        runner = load(opened)
    assert runner.decode_path == "host"
    said = [record for record in caplog.records if "host-driven path" in record.getMessage()]
    assert len(said) == 1
    assert "need a CUDA device" in said[0].getMessage()
    runner.close()


def test_asking_for_the_device_without_one_is_refused_with_the_reason(opened, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(DecodePathError, match=r"decode_path is device.*CUDA device"):
        load(opened, path="device")


def test_a_model_that_cannot_be_captured_is_driven_by_the_host_and_the_log_names_the_reason(
    opened, monkeypatch, caplog
):
    assembly = pytest.importorskip("server.model.device.running.assembly")
    pack = pytest.importorskip("server.model.device.capture.pack")

    def refuse(*args: object, **kwargs: object) -> None:
        raise pack.NotCapturableError("layer 0 has a moat")

    monkeypatch.setattr(assembly, "load_device_runner", refuse)
    monkeypatch.setattr(decode_path, "_why_not", lambda device, path: None)
    with caplog.at_level(logging.INFO):
        runner = load(opened)
    assert runner.decode_path == "host"
    assert "layer 0 has a moat" in caplog.text
    runner.close()
    with pytest.raises(DecodePathError, match="layer 0 has a moat"):
        load(opened, path="device")


def test_what_only_the_device_does_is_refused_on_the_host(opened):
    with pytest.raises(DecodePathError, match=r"resident_bias is 0\.1"):
        load(opened, resident_bias=0.1)


def test_kept_experts_are_the_most_used_ones_and_keep_their_slots(used_store):
    with Store.open(used_store) as store:
        everything = ExpertMask.of(store.available)
        assert most_used_experts(store, everything, 3) == [[10 + layer, 40, 20] for layer in range(8)]
        allowed = ExpertMask.same_in_every_layer([0, 1, 40], 8, 64)
        assert most_used_experts(store, allowed, 2) == [[40, 0]] * 8
        runner = load(store, num_slots=12, kept_experts=2, cache_policy="lfu")
        row = runner.allocate()
        runner.prefill(row, [100])
        for token in range(300, 320):
            runner.decode([RowStep(row, token)])
        resident = [runner.model.cache.resident(layer) for layer in range(8)]
        assert all({10 + layer, 40} <= set(experts) for layer, experts in enumerate(resident))
        assert runner.model.cache.statistics().evictions.min() > 0
        runner.close()


def test_more_kept_experts_than_a_layer_serves_are_refused(opened):
    with pytest.raises(SlotsError, match=r"kept_experts is 65.*only 64"):
        load(opened, kept_experts=65)
    with pytest.raises(SlotsError, match="13 kept experts in 12 slots"):
        load(opened, kept_experts=13)
