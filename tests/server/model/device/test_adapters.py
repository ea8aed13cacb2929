"""Adapters in captured steps: rows as on the host-driven path, and rows without one with the bits that they have."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from expert_store.adapter import store_adapters
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.capture import NotCapturableError
from server.model.device.capture.adapters import MOST_RANK, MOST_WIDTH, check_adapters
from server.model.device.running.assembly import load_device_runner
from server.model.device.step import graphs
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, Runner, RunnerOptions
from server.model.seam.trunk import trunk_skeleton
from tests.server.adapters import HALF, decoded, with_adapters
from tests.server.model.device.captured import TUNING as CAPTURED_TUNING
from tests.server.model.device.small import DEVICE, TUNING
from tests.server.model.device.test_runner_families import store_of

OTHERS = [
    "glm4_moe in groups", "minimax_m2", "mixtral in a window", "olmoe", "dots1", "hy_v3", "solar_open", "gpt_oss",
    "gpt_oss, mxfp4", "flint", "exaone_moe", "mellum", "ernie4_5_moe", "granitemoeshared", "minimax_m3_vl_text",
    "qwen3_vl_moe", "qwen3_next in full attention", "mimo_v2_flash", "flex_olmo",
]  # fmt: skip


@pytest.fixture(scope="module")
def adapted(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapters(small_store, tmp_path_factory.mktemp("adapted") / "store", HALF, shared_width=5)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runner]:
    def make(path: Path, tuning: Any = TUNING, **options: Any) -> Runner:
        if DEVICE.type == "cpu":
            monkeypatch.setattr(graphs, "Tuning", lambda: tuning)
        common = {"device": DEVICE, "dtype": torch.float32, "num_slots": 4, "max_rows": 4, "max_tokens": 64}
        return load_device_runner(Store.open(path), RunnerOptions(**common | options), proof=False)

    return make


def host(path: Path) -> HostRunner:
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=4)
    return HostRunner(load_model(Store.open(path), options), max_rows=4, max_tokens=64)


@pytest.mark.parametrize(
    "many_rows",
    [
        pytest.param(8, id="products by rows"),
        pytest.param(0, id="products by tensor cores", marks=pytest.mark.exhaustive),
    ],
)
def test_rows_of_one_batch_have_their_adapters_or_none_and_keep_their_bits(
    adapted: Path, small_store: Path, device: Callable[..., Runner], many_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.model.device.step.step.MANY_ROWS", many_rows)
    ours, theirs, plain = device(adapted), host(adapted), device(small_store)
    rows = range(4)
    together, wanted = decoded(ours, list(rows), 1), decoded(theirs, list(rows), 1)
    for at in rows:
        assert torch.allclose(torch.stack(together[at]), torch.stack(wanted[at]), rtol=1e-4, atol=1e-4), at
    for at, without in ((0, plain), (2, plain), (1, ours)):  # beside rows with an adapter, and alone
        (alone,) = decoded(without, [at], 1)
        assert all(torch.equal(one, other) for one, other in zip(alone, together[at], strict=True)), at
    different = [(together[1][-1] - together[2][-1]).abs().max(), (together[1][-1] - together[3][-1]).abs().max()]
    assert min(different) > 1e-3
    for runner in (ours, theirs, plain):
        runner.close()


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_moe partly in windows",  # with a dense layer, and a shared expert that has a switch
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS),
    ],
)
def test_each_familys_parts_are_changed_as_on_the_host_driven_path(
    name: str, tmp_path: Path, repository: Path, device: Callable[..., Runner]
) -> None:
    path = store_of(name, tmp_path, repository)
    with Store.open(path) as store:
        num_layers, num_experts = store.available.shape
    mask = ExpertMask.same_in_every_layer([e for e in range(num_experts) if e % 3], num_layers, num_experts)
    adapted = with_adapters(path, tmp_path / "adapted", mask, shared_width=5)
    kinds = [(mask, "pools"), (mask, None)]
    outputs = []
    for runner in (device(adapted, CAPTURED_TUNING), host(adapted)):
        rows = [runner.allocate() for _ in kinds]
        for row, (own, adapter) in zip(rows, kinds, strict=True):
            runner.prefill(row, [40, 41, 42], mask=own, adapter=adapter)
        steps = [
            RowStep(row, 50, mask=own, adapter=adapter, temperature=0.9)
            for row, (own, adapter) in zip(rows, kinds, strict=True)
        ]
        outputs.append(runner.decode(steps))
        runner.close()
    got, wanted = outputs
    assert torch.allclose(got.logits, wanted.logits, rtol=1e-3, atol=1e-4)
    assert (np.sort(got.record.served_index) == np.sort(wanted.record.served_index)).all()
    assert got.record.missed_mass == pytest.approx(wanted.record.missed_mass, abs=1e-5)
    assert got.share.missed == pytest.approx(wanted.share.missed, abs=1e-5)
    assert got.share.demanded == pytest.approx(wanted.share.demanded, abs=1e-5)
    assert not torch.allclose(got.logits[0], got.logits[1], atol=1e-2)


def test_changes_that_are_not_carried_are_named_and_the_host_driven_path_is_offered(
    adapted: Path,
) -> None:
    with Store.open(adapted) as store:
        (planned, *_) = store_adapters(adapted, store.manifest).values()
        skeleton = trunk_skeleton(store.trunk_path)
    check_adapters(skeleton, {"planned": planned})
    wide = {"lora_A": torch.zeros(MOST_RANK + 1, 64), "lora_B": torch.zeros(64, MOST_RANK + 1)}
    for changes, reason in (
        ({"lm_head": {"delta": torch.zeros(2, 2)}}, r"adapter odd changes lm_head \(delta\).*--no-adapters"),
        ({"model.norm": {"gain": torch.zeros(2)}}, r"model\.norm \(gain\)"),
        ({"model.layers.1.mlp.experts": {"gate": torch.zeros(MOST_WIDTH + 1, 64)}}, r"1025 columns to .*mlp\.experts"),
        ({"model.layers.1.self_attn.o_proj": wide}, rf"o_proj by rank {MOST_RANK + 1}.*--rank"),
    ):
        with pytest.raises(NotCapturableError, match=reason):
            check_adapters(skeleton, {"planned": planned, "odd": replace(planned, changes=changes)})
