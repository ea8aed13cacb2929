"""Slots are what the device has room for; what does not fit is refused with values that do."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from expert_store.errors import SlotsError
from server.model.device.capture import NotCapturableError
from server.model.device.memory.budget import DeviceMemory
from server.model.device.step.weights import DecodeShape

SHAPE = DecodeShape(
    num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_dim=32, vocab=96, num_experts=64, top_k=4,
    intermediate=32, max_rows=8, max_tokens=128,
)  # fmt: skip


def memory(monkeypatch: pytest.MonkeyPatch, free: int | None, num_kept: int = 0) -> DeviceMemory:
    made = DeviceMemory(SHAPE, torch.device("cpu"), num_kept=num_kept)
    monkeypatch.setattr(made, "_free_bytes", lambda: free)
    return made


def test_slots_take_what_is_free_and_no_more(monkeypatch):
    sizes = memory(monkeypatch, None)
    for wanted in (5, 17, 40):
        assert memory(monkeypatch, sizes.slots_bytes(wanted)).num_slots(64, None, None) == wanted
        assert memory(monkeypatch, sizes.slots_bytes(wanted) - 1).num_slots(64, None, None) == wanted - 1
    assert memory(monkeypatch, sizes.slots_bytes(64)).num_slots(64, None, None) == 64


def test_a_slot_for_every_expert_needs_nothing_beside_it(monkeypatch):
    sizes = memory(monkeypatch, None)
    assert sizes.slots_bytes(64) == 4 * 64 * sizes.span_bytes
    assert sizes.slots_bytes(63) > sizes.slots_bytes(64)


def test_no_more_slots_than_experts_that_may_be_served(monkeypatch):
    assert memory(monkeypatch, None).num_slots(16, None, None) == 16
    assert memory(monkeypatch, None).num_slots(16, 40, None) == 16


def test_a_budget_bounds_the_slots_whatever_is_free(monkeypatch):
    sizes = memory(monkeypatch, None)
    assert memory(monkeypatch, 1 << 40).num_slots(64, None, sizes.slots_bytes(9)) == 9


def test_what_is_advised_where_memory_does_not_suffice_fits(monkeypatch):
    sizes = memory(monkeypatch, None)
    free = sizes.slots_bytes(20)
    with pytest.raises(SlotsError, match="slots of at most 20") as refused:
        memory(monkeypatch, free).num_slots(64, 30, None)
    tokens = re.search(r"max_context_tokens of at most (\d+)", str(refused.value))
    room = free + sizes.kv_bytes
    assert tokens is None or int(tokens[1]) * 8 * sizes.row_bytes + sizes.slots_bytes(30) <= room


def test_less_than_one_tokens_experts_is_refused(monkeypatch):
    sizes = memory(monkeypatch, None)
    with pytest.raises(SlotsError, match="4 slots in each of 4 layers"):
        memory(monkeypatch, sizes.slots_bytes(4) - 1).num_slots(64, None, None)


def test_fewer_slots_than_one_token_needs_are_left_to_the_host_driven_path(monkeypatch):
    with pytest.raises(NotCapturableError, match="slots_memory of 1000 bytes"):
        memory(monkeypatch, 1 << 40).num_slots(64, None, 1000)
    with pytest.raises(NotCapturableError, match="3 slots a layer"):
        memory(monkeypatch, None).num_slots(64, 3, None)
    with pytest.raises(NotCapturableError, match="need 6"):
        memory(monkeypatch, None, num_kept=6).num_slots(64, 5, None)
