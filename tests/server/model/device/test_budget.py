"""Slots are what the device has room for; what does not fit is refused with values that do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from expert_store.errors import SlotsError
from server.model.device.capture import NotCapturableError
from server.model.device.memory.budget import KV_SHARE, DeviceMemory
from server.model.device.step.parts import DeltaKind
from server.model.device.step.weights import DecodeShape
from server.model.kv.blocks import BLOCK_TOKENS

SHAPE = DecodeShape(
    num_layers=4, hidden=64, num_heads=4, num_kv_heads=2, head_dim=32, vocab=96, num_experts=64, top_k=4,
    intermediate=32, max_rows=8, max_tokens=128,
)  # fmt: skip
ROW_BLOCKS = 128 // BLOCK_TOKENS
MOST_BLOCKS = 8 * ROW_BLOCKS


def memory(monkeypatch: pytest.MonkeyPatch, free: int | None, **options: Any) -> DeviceMemory:
    """Of a device with so many free bytes beside the trunk."""
    made = DeviceMemory(SHAPE, torch.device("cpu"), **options)
    monkeypatch.setattr(made, "_free_bytes", lambda: free)
    return made


def slots_beside_kv(
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    most: int = 64,
    wanted: int | None = None,
    budget: int | None = None,
) -> int:
    """Where so many bytes are free beside the KV memory of all rows."""
    sizes = memory(monkeypatch, None)
    sizes = memory(monkeypatch, None if free is None else free + sizes.kv_bytes(MOST_BLOCKS))
    slots, blocks = sizes.divide(most, wanted, budget, MOST_BLOCKS * sizes.block_bytes)
    assert blocks == MOST_BLOCKS
    return slots


def test_slots_take_what_is_free_and_no_more(monkeypatch):
    sizes = memory(monkeypatch, None)
    for wanted in (5, 17, 40):
        assert slots_beside_kv(monkeypatch, sizes.slots_bytes(wanted)) == wanted
        assert slots_beside_kv(monkeypatch, sizes.slots_bytes(wanted) - 1) == wanted - 1
    assert slots_beside_kv(monkeypatch, sizes.slots_bytes(64)) == 64


def test_a_slot_for_every_expert_needs_nothing_beside_it(monkeypatch):
    sizes = memory(monkeypatch, None)
    assert sizes.slots_bytes(64) == 4 * 64 * sizes.span_bytes
    assert sizes.slots_bytes(63) > sizes.slots_bytes(64)


def test_no_more_slots_than_experts_that_may_be_served(monkeypatch):
    assert slots_beside_kv(monkeypatch, None, 16, None) == 16
    assert slots_beside_kv(monkeypatch, None, 16, 40) == 16


def test_a_budget_bounds_the_slots_whatever_is_free(monkeypatch):
    sizes = memory(monkeypatch, None)
    assert slots_beside_kv(monkeypatch, 1 << 40, 64, None, sizes.slots_bytes(9)) == 9


def test_what_is_advised_where_memory_does_not_suffice_fits(monkeypatch):
    sizes = memory(monkeypatch, None)
    free = sizes.slots_bytes(20)
    with pytest.raises(SlotsError, match="slots of at most 20"):
        slots_beside_kv(monkeypatch, free, 64, 30)
    assert memory(monkeypatch, free + sizes.kv_bytes(MOST_BLOCKS)).divide(64, 20).num_slots == 20
    with pytest.raises(SlotsError, match="max_context_tokens of at most") as refused:
        memory(monkeypatch, sizes.slots_bytes(30) + sizes.kv_bytes(3)).divide(64, 30)
    tokens = int(re.search(r"max_context_tokens of at most (\d+)", str(refused.value))[1])
    assert tokens == 3 * BLOCK_TOKENS


def test_less_than_one_tokens_experts_is_refused(monkeypatch):
    sizes = memory(monkeypatch, None)
    with pytest.raises(SlotsError, match="4 slots in each of 4 layers"):
        slots_beside_kv(monkeypatch, sizes.slots_bytes(4) - 1)


def test_fewer_slots_than_one_token_needs_are_left_to_the_host_driven_path(monkeypatch):
    with pytest.raises(NotCapturableError, match="slots_memory of 1000 bytes"):
        slots_beside_kv(monkeypatch, 1 << 40, 64, None, 1000)
    with pytest.raises(NotCapturableError, match="3 slots a layer"):
        slots_beside_kv(monkeypatch, None, 64, 3)
    with pytest.raises(NotCapturableError, match="need 6"):
        memory(monkeypatch, None, num_kept=6).divide(64, 5)


def test_kv_memory_gets_its_share_and_what_slots_leave_up_to_that_of_all_rows(monkeypatch):
    sizes = memory(monkeypatch, None)
    free = sizes.slots_bytes(20)
    slots, blocks = memory(monkeypatch, free).divide(64)
    assert sizes.kv_bytes(blocks) + sizes.slots_bytes(slots) <= free
    assert blocks == MOST_BLOCKS or sizes.kv_bytes(blocks + 1) > KV_SHARE * free
    assert sizes.slots_bytes(slots + 1) + sizes.kv_bytes(blocks) > free
    for left in (ROW_BLOCKS, ROW_BLOCKS + 3, MOST_BLOCKS):
        assert memory(monkeypatch, sizes.slots_bytes(64) + sizes.kv_bytes(left)).divide(64, 64) == (64, left)
    assert memory(monkeypatch, 1 << 40).divide(64) == (64, MOST_BLOCKS)


def test_slots_that_are_asked_for_leave_kv_memory_one_row(monkeypatch):
    sizes = memory(monkeypatch, None)
    free = sizes.slots_bytes(30) + sizes.kv_bytes(ROW_BLOCKS)
    assert memory(monkeypatch, free).divide(64, 30) == (30, ROW_BLOCKS)
    with pytest.raises(SlotsError, match=f"{sizes.kv_bytes(ROW_BLOCKS)} bytes of KV memory"):
        memory(monkeypatch, free - 1).divide(64, 30)


def test_rows_may_be_shorter_than_asked_where_nobody_set_their_length(monkeypatch):
    sizes = memory(monkeypatch, None)
    for left in (1, 2):
        free = sizes.slots_bytes(30) + sizes.kv_bytes(left)
        assert memory(monkeypatch, free, least_tokens=BLOCK_TOKENS).divide(64, 30) == (30, left)


def test_states_of_delta_nets_take_from_slots_what_keys_and_values_of_their_layers_would_not():
    kind = DeltaKind(key_heads=2, value_heads=4, key_dim=16, value_dim=16, kernel=4)
    hybrid = replace(SHAPE, attentions=(*[kind] * 3, SHAPE.attention(3)))
    plain, other = (
        DeviceMemory(shape, torch.device("cuda"), beside_trunk=4 << 30, least_tokens=BLOCK_TOKENS)
        for shape in (SHAPE, hybrid)
    )
    assert other.token_bytes * 4 == plain.token_bytes
    half, ring = 4 * 16 * 16 * 4, 4 * (2 * 2 * 16 + 4 * 16) * 2
    assert hybrid.state_bytes == 3 * (8 * (2 * half + ring) + 9 * (half + ring))
    assert plain._free_bytes() - other._free_bytes() == hybrid.state_bytes
    alone = replace(hybrid, shares_prompts=False)
    assert alone.state_bytes == 3 * (8 * (2 * half + ring) + half + ring), "no copies where no prompt is shared"


def test_kv_memory_that_holds_no_row_is_refused_with_what_would_do(monkeypatch):
    sizes = memory(monkeypatch, None)
    wanted = ROW_BLOCKS * sizes.block_bytes
    assert memory(monkeypatch, None).divide(64, kv_bytes=wanted).num_blocks == ROW_BLOCKS
    with pytest.raises(SlotsError, match=f"at least {wanted}, or max_context_tokens to at most {128 - BLOCK_TOKENS}"):
        memory(monkeypatch, None).divide(64, kv_bytes=wanted - 1)
