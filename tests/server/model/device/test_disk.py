"""Disk as a tier of the captured path: the same bits whatever host memory holds, and the least that does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from expert_store.errors import ShardCorruptError, SlotsError
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.running import assembly
from server.model.runner import Choice, RowStep, Runner, StepFault
from tests.expert_store.damage import damage
from tests.server.model.device.small import EVERYTHING, EXPERTS, LAYERS, TOP_K, greedy

LONG = list(range(40, 88))  # twelve picks an expert: streamed ahead of the routers' choice
NARROW = ExpertMask.same_in_every_layer((1, 2, 5, 6), LAYERS, EXPERTS)
LEAST = LAYERS * TOP_K


def span_bytes(store: Path) -> int:
    with Store.open(store) as opened:
        return opened.manifest.layers[0].span_bytes


def everything_in_memory(runner: Any) -> Any:
    """The runner, after all that is read in the background was taken."""
    runner.tier.wait()
    runner._look()
    return runner


def answers(runner: Runner) -> list[Tensor]:
    """Logits, drawn tokens and deficits of long and short prompts and of a batch: greedy and sampled, with a mask and a
    temperature of their own."""
    first, second = runner.allocate(), runner.allocate()
    found = [runner.prefill(first, LONG, all_logits=True).logits, runner.prefill(second, [20, 21], mask=NARROW).logits]
    steps = [RowStep(first, 100, choice=Choice(0.8, 20, 0.9, 0.3)), RowStep(second, 200, mask=NARROW)]
    output = runner.decode(steps)
    assert output.chosen is not None
    found += [output.logits.clone(), torch.from_numpy(output.chosen.token), torch.from_numpy(output.share.missed)]
    alone = runner.decode([RowStep(second, 300, temperature=2.0)])
    return [*found, alone.logits.clone(), torch.from_numpy(alone.record.served_index)]


@pytest.mark.parametrize(
    ("num_rows", "kept_experts"),
    [
        pytest.param(LAYERS * EXPERTS, 0, marks=pytest.mark.exhaustive),
        pytest.param(LAYERS * EXPERTS // 2, 1, marks=pytest.mark.exhaustive),
        (LEAST, 0),
    ],
)
def test_the_bits_are_those_of_a_server_that_holds_everything_in_memory(small_store, runners, num_rows, kept_experts):
    """Rows for 100 %, 50 %, and 25 %, which is one token's experts: a batch of two may then run in parts."""
    pinned = everything_in_memory(runners(small_store))
    wanted = answers(pinned)
    assert pinned.tier.num_reads == 0
    device = runners(small_store, host_memory_bytes=num_rows * span_bytes(small_store), kept_experts=kept_experts)
    for got, same in zip(answers(device), wanted, strict=True):
        assert torch.equal(got, same)
    assert device.pages.num_host_spans <= num_rows
    assert (device.tier.num_reads > 0) or num_rows == LAYERS * EXPERTS
    device.pages.check_integrity(contents=True)


def test_with_everything_in_memory_a_step_asks_for_nothing_of_the_disk(small_store, runners, monkeypatch):
    device = everything_in_memory(runners(small_store, host_memory_bytes=LAYERS * EXPERTS * span_bytes(small_store)))
    row = device.allocate()
    device.prefill(row, [20])
    monkeypatch.setattr(device.tier, "use", lambda experts: pytest.fail("uses are counted"))
    monkeypatch.setattr(device.tier, "read", lambda *args: pytest.fail("something is read"))
    device.decode([RowStep(row, 21)])
    assert device.rows.is_plain(row)
    assert not device.tier.evicts


def test_less_host_memory_than_one_tokens_experts_is_refused_with_what_would_do(small_store, runners):
    with pytest.raises(SlotsError, match=rf"room for {LEAST - 1} experts, and one token may need {LEAST}") as refused:
        runners(small_store, host_memory_bytes=LEAST * span_bytes(small_store) - 1)
    least = re.search(r"set host_memory to at least (\d+)", str(refused.value))
    assert least is not None
    row = (device := runners(small_store, host_memory_bytes=int(least[1]))).allocate()
    assert device.prefill(row, [20]).logits.isfinite().all()


def test_a_damaged_expert_that_leaves_memory_fails_the_prompt_that_needs_it_and_nobody_else(
    small_store, runners, tmp_path
):
    path = Path(shutil.copytree(small_store, tmp_path / "store"))
    device = runners(path, host_memory_bytes=LEAST * span_bytes(path))
    everything_in_memory(device)
    layer, expert = np.argwhere(~device.tier.servable)[0].tolist()
    damage(path, layer, expert)
    allowed = np.ones((LAYERS, EXPERTS), dtype=np.bool_)
    allowed[layer, expert] = False
    row = device.allocate()
    assert device.prefill(row, LONG, mask=ExpertMask.of(allowed)).logits.isfinite().all()
    other = device.allocate()
    with pytest.raises(StepFault) as fault:
        device.prefill(other, LONG)  # all of its layers' experts are read ahead, and each is chosen by some token
    assert isinstance(fault.value.cause, ShardCorruptError)
    assert fault.value.expert == (layer, expert)
    damage(path, layer, expert)  # flips the same bit back
    assert device.prefill(other, LONG[:2]).logits.isfinite().all()
    device.pages.check_integrity(contents=True)


def test_a_store_grows_and_shrinks_behind_a_small_host_memory(small_store, runners):
    few = ExpertMask.same_in_every_layer(range(5), LAYERS, EXPERTS)
    size = span_bytes(small_store)
    device, whole = runners(small_store, mask=few, host_memory_bytes=6 * size), runners(small_store, "host")
    masked = greedy(device, [[20, 21]], 2, masks=[None])
    assert masked == greedy(whole, [[20, 21]], 2, masks=[few])
    device.model.routing.set_mask(EVERYTHING)
    device.adopt()
    assert greedy(device, [[20, 21]], 2, masks=[None]) == greedy(whole, [[20, 21]], 2, masks=[None])
    device.model.routing.set_mask(few)
    device.adopt()
    assert greedy(device, [[20, 21]], 2, masks=[None]) == masked
    assert device.pages.num_host_spans <= 6
    device.pages.check_integrity(contents=True)


def test_without_a_bound_host_memory_takes_what_the_system_can_spare(small_store, runners, monkeypatch):
    size = span_bytes(small_store)
    monkeypatch.setattr(assembly, "lockable_bytes", lambda: 10 * size)
    device = everything_in_memory(runners(small_store))
    assert device.pages.num_host_spans == 10
    assert not device.tier.holds_all
    bounded = everything_in_memory(runners(small_store, host_memory_bytes=12 * size))
    assert bounded.pages.num_host_spans == 12, "what is set is taken at its word"
