"""What is said to fit is what loads: the same bytes, the same slots and the same errors as serving."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig

from benchmarks.fit import RESULTS, shape_facts
from benchmarks.gpu.decode import QWEN
from expert_store.errors import SlotsError
from expert_store.store import Store
from server.fit import placement as placing
from server.fit.facts import ModelFacts, facts_of
from server.fit.placement import Wish, captured_trunk, place
from server.fit.prediction import changes, predict
from server.machine.rates import MachineRates, known_machines
from server.model.device.memory.budget import DeviceMemory
from server.model.host import assembly
from server.model.kv_memory import HOST_RESERVE_BYTES
from server.model.runner import RunnerOptions
from server.model.seam.trunk import trunk_skeleton

GIB = 1 << 30
H100 = known_machines()["h100"]
CPU = MachineRates("cpu", "a CPU", 0, 16 * GIB, 9e9, 5e9, 8e9, 1e9, 1e10, 1e11, 1.2e-6)


@pytest.fixture(scope="module")
def tiny(tiny_store: Path) -> ModelFacts:
    with facts_of(str(tiny_store), None, "auto") as model:
        return model


def _wish(device: int, host: int = 64 * GIB, context: int = 1024, rows: int = 8) -> Wish:
    return Wish(True, device, host, context, context, rows)


def test_device_memory_is_what_a_server_on_the_h100_took(tmp_path: Path) -> None:
    """The generated checkpoint of benchmarks/gpu/serve.py, a quarter of its experts in slots."""
    shape = replace(QWEN, num_layers=18, vocab=8192, max_rows=8, max_tokens=4096)
    Qwen3MoeConfig(
        num_hidden_layers=18, vocab_size=8192, hidden_size=shape.hidden, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, moe_intermediate_size=shape.intermediate,
        num_experts=shape.num_experts, num_experts_per_tok=shape.top_k, norm_topk_prob=True,
    ).save_pretrained(tmp_path)  # fmt: skip
    skeleton = trunk_skeleton(tmp_path).to(torch.bfloat16)
    model = replace(shape_facts(shape), skeleton=skeleton)
    served = json.loads((RESULTS / "serve_gpu.json").read_text())["servings"]["device, second start"]
    memory = DeviceMemory(shape, torch.device("cuda"), beside_trunk=0)
    found = place(
        model, replace(_wish(80 * GIB, 128 * GIB, 4096), slots_memory=memory.slots_bytes(32), kv_memory=4 * GIB)
    )
    assert (found.slots, found.slots_bytes) == (32, served["totals"]["slot_bytes"])
    taken = found.trunk_bytes + found.kv_bytes + found.slots_bytes + found.beside_slots
    assert taken == pytest.approx(served["peak_device_bytes"], rel=0.01)


def test_slots_are_those_that_serving_chooses(tiny: ModelFacts) -> None:
    shape = placing._captured_shape(tiny, _wish(0))
    fixed, _ = captured_trunk(tiny, shape)
    device = fixed + 1100 * (1 << 20) + 2 * GIB  # room to compute in, KV memory and some slots
    found = place(tiny, _wish(device, rows=8, context=1024))
    memory = DeviceMemory(shape, torch.device("cuda"), beside_trunk=device - fixed)
    assert found.slots == memory.divide(tiny.num_available).num_slots
    assert found.path == "captured"
    assert found.problem is None


def test_a_model_that_does_not_fit_has_the_error_of_serving(tiny: ModelFacts) -> None:
    wish = _wish(GIB + (20 << 20), rows=32)
    shape = placing._captured_shape(tiny, wish)
    memory = DeviceMemory(shape, torch.device("cuda"), beside_trunk=wish.device_memory - captured_trunk(tiny, shape)[0])
    with pytest.raises(SlotsError) as error:
        memory.divide(tiny.num_available)
    assert place(tiny, wish).problem == str(error.value)


def test_host_memory_that_holds_a_part_leaves_the_rest_to_the_disk(tiny: ModelFacts) -> None:
    some = replace(_wish(80 * GIB), slots_memory=tiny.experts_bytes // 2)
    everything = place(tiny, some)
    assert everything.disk_bytes == 0
    assert everything.host_bytes == tiny.experts_bytes
    part = place(tiny, replace(some, host_budget=tiny.experts_bytes // 4))
    assert 0 < part.disk_bytes < tiny.experts_bytes
    assert part.host_bytes <= tiny.experts_bytes // 4
    too_little = place(tiny, replace(some, host_budget=1))
    assert too_little.problem is not None
    assert "it takes at least" in too_little.problem


def test_a_model_that_is_not_captured_is_driven_by_the_host(tiny: ModelFacts) -> None:
    found = place(tiny, replace(_wish(80 * GIB), rows=65))
    assert found.path == "host"
    assert "65 rows: wanted at most 64" in found.reason
    assert found.slots == tiny.num_available
    assert found.problem is None
    assert place(tiny, replace(_wish(GIB), rows=65)).problem is not None


def test_a_gpu_without_triton_is_driven_by_the_host(tiny: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("triton", "server.model.device.memory.budget"):  # the second one imports the first
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = place(tiny, _wish(80 * GIB))
    assert (found.path, found.reason) == ("host", "triton is not installed")


@pytest.mark.parametrize(("spare", "slots"), [(1 << 30, 64), (12 << 20, 32), (6 << 20, 16)])
def test_a_cpu_has_slots_for_what_is_left_of_its_memory(tiny: ModelFacts, spare: int, slots: int) -> None:
    fixed = tiny.trunk_bytes + tiny.kv_bytes * 4 * 512 + HOST_RESERVE_BYTES
    found = place(tiny, Wish(False, 0, fixed + spare, 512, 512, 4, kv_memory=tiny.kv_bytes * 4 * 512))
    assert found.slots == slots
    assert found.slots_bytes + found.host_bytes <= spare or found.slots == 64
    assert (found.disk_bytes > 0) == (slots < 64)


def test_a_cpu_without_room_says_what_the_model_takes(tiny: ModelFacts) -> None:
    found = place(tiny, Wish(False, 0, 1 << 20, 512, 512, 4))
    assert found.problem is not None
    assert "free for slots" in found.problem


def test_changes_help_and_the_best_comes_first() -> None:
    model = shape_facts(QWEN)
    wish = Wish(False, 0, 24 * GIB, 8192, 2048, 4)
    now = predict(model, CPU, wish, 128, 256)
    found = changes(model, CPU, now, 256)
    rates = [one.after.rows_tokens_per_second for one in found]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > now.rows_tokens_per_second
    told = " ".join(one.change for one in found)
    assert "--experts-dtype int4" in told
    assert "host memory of" in told


def test_of_a_model_that_does_not_fit_the_changes_that_make_it_fit_are_told() -> None:
    model = shape_facts(QWEN)
    now = predict(model, CPU, Wish(False, 0, 5 * GIB, 16384, 16384, 4), 128, 256)
    assert now.placement.problem is not None
    found = changes(model, CPU, now, 256)
    assert found
    assert all(one.after.placement.problem is None for one in found)
    assert any("--context 4096" in one.change for one in found)


def test_nothing_helps_a_model_that_is_all_in_slots_as_it_is(tiny: ModelFacts) -> None:
    now = predict(tiny, H100, _wish(80 * GIB), 128, 256)
    assert now.hit_rate == 1.0
    assert [one.change for one in changes(tiny, H100, now, 256) if "memory" in one.change] == []


def test_a_cpu_server_without_a_wish_takes_the_slots_that_fit_tells(
    tiny: ModelFacts, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = HOST_RESERVE_BYTES + tiny.kv_bytes * 512 + 6 * (1 << 20)  # 16 slots a layer
    wish = Wish(False, 0, tiny.trunk_bytes + beside, 512, 512, 1)
    monkeypatch.setattr(assembly, "free_host_bytes", lambda: beside)
    options = RunnerOptions(torch.device("cpu"), tiny.dtype, path="host", max_rows=1, max_tokens=512)
    loaded = assembly.load_model(Store.open(tiny_store), options)
    try:
        assert loaded.cache.num_slots == place(tiny, wish).slots
        assert 4 < loaded.cache.num_slots < tiny.num_available
    finally:
        loaded.close()
