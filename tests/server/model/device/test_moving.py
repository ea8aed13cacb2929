"""Frames that move between slots and KV memory under the captured step: no answer changes, and nobody reads or writes
where no frame is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from expert_store.paging.driver import MappingError
from expert_store.paging.frames import HostFrames
from server.model.device.memory import moving as device_moving
from server.model.device.memory.budget import DeviceMemory, Division
from server.model.device.memory.moving import MovingMemory, moving_memory
from server.model.device.step.weights import DecodeShape
from server.model.kv.blocks import BLOCK_TOKENS, NoBlocksError
from server.model.runner import RowStep
from tests.expert_store.canaries import CanaryFrames
from tests.server.model.device.small import DEVICE, EXPERTS, LAYERS, TOP_K
from tests.server.model.device.test_budget import SHAPE

BLOCK_BYTES = 2 * 2 * 32 * 4 * BLOCK_TOKENS
"""Keys and values, layers, head_dim, float32: of `small_store`."""
SALT = b"of a test"


@pytest.fixture
def moving(small_store, runners, monkeypatch) -> Callable[..., Any]:
    """Runners over canary frames, with the frames as their attribute `frames`."""
    if DEVICE.type != "cpu":
        pytest.skip("a GPU's frames are too large for so few experts")

    def make(**options: Any) -> Any:
        made: list[CanaryFrames] = []
        monkeypatch.setattr(
            device_moving, "frames_on", lambda device: lambda count: made.append(CanaryFrames(count)) or made[0]
        )
        given = {"num_slots": 7, "max_rows": 4, "kv_memory_bytes": 4 * BLOCK_BYTES, "memory_balance": "moving"}
        runner = runners(small_store, **given | options)
        runner.frames = made
        return runner

    return make


def check(runner: Any) -> None:
    runner.balance.check_integrity()
    runner.kv.check_integrity()
    runner.pages.check_integrity(contents=True)
    for frames in runner.frames:
        frames.check()


def move(runner: Any, generator: np.random.Generator) -> tuple[int, int]:
    """Opens a random number of slots, and of blocks beside them; returns both."""
    balance, slots = runner.balance, runner.balance._slots
    room = balance._slots_beside(max(runner.kv.num_held, balance._least_blocks))
    num_slots = int(generator.integers(slots.least_slots, min(room, slots.most_slots) + 1))
    most = balance._blocks_beside(num_slots)
    num_blocks = int(generator.integers(max(runner.kv.num_held, balance._least_blocks), most + 1))
    if num_slots < slots.num_slots:
        slots.resize(num_slots)
        runner.kv.resize(num_blocks)
    else:
        runner.kv.resize(num_blocks)
        slots.resize(num_slots)
    check(runner)
    return num_slots, num_blocks


@pytest.mark.parametrize(
    ("num_turns", "host_rows"),
    [
        (1, None),
        pytest.param(4, None, marks=pytest.mark.exhaustive),
        pytest.param(4, LAYERS * TOP_K + 2, marks=pytest.mark.exhaustive),
    ],
)
def test_the_same_bits_whatever_moves_between_the_steps(small_store, runners, moving, num_turns, host_rows):
    """Prompts that begin alike and decode together, with experts behind the slots in host memory, or on the disk."""
    span_bytes = 3 * 32 * 16 * 4
    host_memory = None if host_rows is None else host_rows * span_bytes
    ours = moving(host_memory_bytes=host_memory)
    theirs = runners(small_store, num_slots=3, max_rows=4)
    generator, sizes = np.random.default_rng(5), set()
    prompt = generator.integers(1, 8000, BLOCK_TOKENS + 3).tolist()
    for turn in range(num_turns):
        rows = []
        for at in range(2):
            pair = ours.allocate(), theirs.allocate()
            tokens = prompt if at == turn % 2 else generator.integers(1, 8000, 5).tolist()
            for start in range(0, len(tokens), BLOCK_TOKENS):
                part = tokens[start : start + BLOCK_TOKENS]
                for runner, row in zip((ours, theirs), pair, strict=True):
                    runner.kv.reuse(row, tokens, SALT)
                if ours.kv.length(pair[0]) > start:
                    continue
                sizes.add(move(ours, generator))
                outputs = [runner.prefill(row, part).logits for runner, row in zip((ours, theirs), pair, strict=True)]
                assert torch.equal(*outputs)
                for runner, row in zip((ours, theirs), pair, strict=True):
                    end = runner.kv.length(row)
                    runner.kv.share(row, tokens[:end], SALT, [None] * (end // BLOCK_TOKENS))
            rows.append(pair)
        for token in (7, 8):
            sizes.add(move(ours, generator))
            steps = [[RowStep(pair[at], token + number) for number, pair in enumerate(rows)] for at in range(2)]
            outputs = [runner.decode(step).logits.clone() for runner, step in zip((ours, theirs), steps, strict=True)]
            assert torch.equal(*outputs)
        for pair in rows:
            ours.free(pair[0])
            theirs.free(pair[1])
    check(ours)
    assert len({slots for slots, _ in sizes}) > 2
    assert len({blocks for _, blocks in sizes}) > 1
    assert int(ours.pages.stats[:, 1].sum()) > 0, "experts are fetched"


def grown(runner: Any, rows: list[int]) -> int:
    """The blocks of KV memory after rows took one after the other until none was left."""
    try:
        for need in [(row, num_blocks * BLOCK_TOKENS) for row in rows for num_blocks in (1, 2)]:
            runner.kv.reserve([need])
            check(runner)
    except NoBlocksError:
        return runner.kv.pool.num_blocks
    raise AssertionError(f"{runner.kv.pool.num_blocks} blocks are enough for all rows")


def test_a_row_that_lacks_blocks_gets_the_memory_of_slots_down_to_the_least(moving):
    runner = moving()
    before = runner.shares()
    assert before.is_moving
    assert before.least_slot_bytes < before.slot_bytes
    rows = [runner.allocate() for _ in range(4)]
    runner.prefill(rows[0], [5] * (BLOCK_TOKENS + 1))
    wanted = runner.prefill(rows[0], [6]).logits.clone()
    runner.rows.take_back(rows[:1], 1)
    assert grown(runner, rows[1:]) == runner.kv.pool.most_blocks > before.kv_bytes // BLOCK_BYTES
    shares = runner.shares()
    assert shares.moves_to_kv > 0
    assert shares.kv_bytes > before.kv_bytes
    assert shares.slot_bytes < before.slot_bytes
    assert runner.model.cache.statistics().num_slots == runner.pages.num_open >= runner.balance._least_slots == 4
    assert torch.equal(runner.prefill(rows[0], [6]).logits, wanted)
    check(runner)


def test_slots_take_back_what_requests_do_not_need_when_experts_are_missed(moving):
    runner = moving(num_slots=3, kv_memory_bytes=8 * BLOCK_BYTES)
    runner.balance._look_steps = 1
    row = runner.allocate()
    opened = [runner.pages.num_open]
    for token in (3, 700, 1900):
        runner.prefill(row, [token])
        runner.decode([RowStep(row, token + 1)])
        runner.after_step()
        check(runner)
        opened.append(runner.pages.num_open)
    assert opened == sorted(opened)
    assert opened[-1] == 4, "the power of two of the first slots, so that the kernels stay as they are"
    assert runner.shares().moves_to_slots == 1


def test_a_server_with_a_slot_for_every_expert_and_a_fixed_one_say_why_nothing_moves(small_store, runners):
    runner = runners(small_store, num_slots=EXPERTS, memory_balance="moving")
    shares = runner.shares()
    assert (shares.is_moving, "every expert has a slot" in shares.reason) == (False, True)
    assert (shares.least_slot_bytes, shares.least_kv_bytes) == (shares.slot_bytes, shares.kv_bytes)
    runner.after_step()
    assert runners(small_store).shares().reason == "memory_balance is fixed"


def sizes(num_slots: int, num_blocks: int) -> tuple[DeviceMemory, DecodeShape, Division]:
    return DeviceMemory(SHAPE, DEVICE), SHAPE, Division(num_slots, num_blocks)


def test_where_the_driver_maps_no_memory_both_keep_their_sizes_and_the_reason_is_told(monkeypatch):
    def refuse(device: torch.device) -> int:
        raise MappingError("this GPU's driver has no virtual memory management: cuda:0")

    monkeypatch.setattr(device_moving, "probe", refuse)
    told = moving_memory("moving", *sizes(30, 20), torch.device("cuda:0"))
    assert told == (None, "this GPU's driver has no virtual memory management: cuda:0")


def test_frames_that_are_too_large_for_the_memory_leave_both_their_sizes():
    made = MovingMemory(*sizes(30, 20), 4096, HostFrames)
    assert made.budget <= made.memory.moving_bytes(Division(30, 20)) < made.budget + 4096
    assert made.slots_bytes(30) + made.blocks_bytes(made.num_blocks) <= made.budget
    lost = (made.memory.num_spill(15) - made.memory.num_spill(30)) * made.memory.span_bytes + 3 * 4 * 4096
    assert 0 < 20 - made.num_blocks <= -(-lost // made.memory.block_bytes), (
        "more of the spill area, and parts of frames"
    )
    assert made.slots_bytes(made.least_slots) + made.blocks_bytes(made.most_blocks) <= made.budget
    with pytest.raises(MappingError, match="KV memory has 0 blocks beside 30 slots a layer and 0 beside 15; wanted"):
        MovingMemory(*sizes(30, 20), 2 << 20, HostFrames)
