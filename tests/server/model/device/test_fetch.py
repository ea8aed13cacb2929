"""What a captured step needs and has not in reach: fetched from the source, or read again where it was damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from expert_store.errors import ShardCorruptError
from expert_store.store import Store
from router.mask import ExpertMask
from server.model.device.memory import tier as device_tier
from server.model.runner import RowStep, Runner, StepFault
from tests.expert_store.damage import damage
from tests.server.model.device.small import EVERYTHING, EXPERTS, LAYERS, TOP_K, greedy

PROMPT = [20, 21, 22, 23]


def test_a_row_that_fetches_gets_the_whole_models_tokens_and_the_one_beside_it_its_own(
    few_small_store, small_store, runners
):
    device, whole, host = runners(few_small_store), runners(small_store, "host"), runners(few_small_store, "host")
    masks, fetching = [EVERYTHING, None], [True, False]
    fetched, masked = greedy(device, [PROMPT, PROMPT], 6, masks=masks, fetching=fetching)
    assert fetched == greedy(whole, [PROMPT], 6, masks=[None])[0]
    assert masked == greedy(host, [PROMPT], 6, masks=[None])[0]
    assert fetched != masked
    assert not device.rows.table(device.model.routing.mask)[~device.model.store.available].any()
    assert device.model.cache.statistics().host_misses > 0
    device.pages.check_integrity(contents=True)


def test_what_was_fetched_gives_bit_for_bit_what_it_gives_from_the_start(few_small_store, small_store, runners):
    """In another dtype than the store's, too: spans are converted on the way."""
    logits = []
    for path in (few_small_store, small_store):
        device = runners(path, dtype=torch.float16)
        row = device.allocate()
        device.prefill(row, PROMPT, mask=EVERYTHING, fetches=True)
        outputs = [device.decode([RowStep(row, at, mask=EVERYTHING, fetches=True)]) for at in (24, 25)]
        logits.append(outputs[-1].logits.clone())
    assert torch.equal(*logits)


def test_a_step_that_fetched_is_told_as_if_it_had_had_everything(few_small_store, small_store, runners):
    outputs = []
    for runner in (runners(few_small_store), runners(small_store, "host")):
        row = runner.allocate()
        runner.prefill(row, PROMPT, mask=EVERYTHING, fetches=True)
        outputs.append(runner.decode([RowStep(row, 24, mask=EVERYTHING, fetches=True)]))
        assert runner.kv.num_tokens == len(PROMPT) + 1
    got, wanted = outputs
    assert torch.allclose(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert (got.record.served_index == wanted.record.served_index).all()
    assert got.share.missed.sum() == 0.0


@pytest.mark.parametrize("temperature", [1.0, pytest.param(2.0, marks=pytest.mark.exhaustive)])
def test_a_mask_of_its_own_narrows_what_a_row_fetches(few_small_store, small_store, runners, temperature):
    mask = ExpertMask.same_in_every_layer((1, 2, 5, 6), LAYERS, EXPERTS)
    served = []
    for runner in (runners(few_small_store), runners(small_store, "host")):
        row = runner.allocate()
        wishes: dict[str, Any] = {"mask": mask, "temperature": temperature, "fetches": True}
        runner.prefill(row, PROMPT, **wishes)
        for token in (24, 25, 26):
            output = runner.decode([RowStep(row, token, **wishes)])
        served.append((output.record.served_index, output.logits))
    assert (served[0][0] == served[1][0]).all()
    assert torch.allclose(served[0][1], served[1][1], rtol=1e-4, atol=1e-4)


def test_what_requests_make_grow_is_bounded_and_the_least_recently_used_goes(
    few_small_store, small_store, runners, monkeypatch
):
    monkeypatch.setattr(device_tier, "BLOCK_BYTES", 1)
    store = Store.open(few_small_store)
    most = LAYERS * (3 + TOP_K) * store.manifest.layers[0].span_bytes  # the store's and one token's
    device, whole = runners(few_small_store, host_memory_bytes=most), runners(small_store, "host")
    assert device.fetch_refusal() is None
    prompts = [list(range(at, at + 8)) for at in (30, 300)]
    masks = [EVERYTHING] * 2
    wanted = [greedy(whole, [prompt], 4, masks=[None])[0] for prompt in prompts]
    assert greedy(device, prompts, 4, masks=masks, fetching=[True, True]) == wanted
    assert device.pages.num_host_spans == LAYERS * (3 + TOP_K)
    assert device.model.cache.statistics().host_misses > LAYERS * (EXPERTS - 3), "something was read twice"
    device.pages.check_integrity(contents=True)


def test_without_room_for_one_token_fetching_is_refused_with_what_would_do(few_small_store, runners):
    store = Store.open(few_small_store)
    device = runners(few_small_store, host_memory_bytes=(LAYERS * 3 + 1) * store.manifest.layers[0].span_bytes)
    assert "room for 1 experts" in device.fetch_refusal()
    assert "raise host_memory" in device.fetch_refusal()


def test_where_every_expert_has_a_slot_what_is_fetched_keeps_its_own(small_store, runners, tmp_path):
    """As many slots as the model has experts, one of which could not be read at the start."""
    path, whole = Path(shutil.copytree(small_store, tmp_path / "store")), runners(small_store, "host")
    row = whole.allocate()
    expert = int(whole.prefill(row, PROMPT).record.served_index[1, 0, 0])
    damage(path, 1, expert)
    device = runners(path, num_slots=EXPERTS)
    assert not device.pages.shape.paged
    assert not device.pages.servable[1, expert]
    damage(path, 1, expert)
    rows = {"masks": [None], "fetching": [False]}
    assert greedy(device, [PROMPT], 8, **rows) == greedy(whole, [PROMPT], 8, masks=[None])
    assert device.pages.servable.all()
    device.pages.check_integrity()


def needing(runner: Runner, expert: tuple[int, int]) -> tuple[list[int], int, int]:
    """A prompt that does without the expert, a token that needs it next, and one that does not."""
    layer, wanted = expert
    need = spare = -1
    for first in range(30, 400):
        row = runner.allocate()
        record = runner.prefill(row, [first]).record
        runner.free(row)
        if (record.served_index[layer] == wanted).any():
            continue
        for token in range(500, 540):
            row = runner.allocate()
            runner.prefill(row, [first])
            uses = (runner.decode([RowStep(row, token)]).record.served_index[layer] == wanted).any()
            runner.free(row)
            need, spare = (token, spare) if uses else (need, token)
            if need >= 0 and spare >= 0:
                return [first], need, spare
    raise AssertionError("no token needs the expert")


@pytest.mark.parametrize("num_slots", [3, pytest.param(EXPERTS, marks=pytest.mark.exhaustive)])
def test_a_damaged_expert_fails_the_rows_that_need_it_and_the_step_goes_on_without_them(
    small_store, runners, tmp_path, caplog, num_slots
):
    expert = (1, 5)
    whole = runners(small_store, "host")
    prompt, need, spare = needing(whole, expert)
    path = Path(shutil.copytree(small_store, tmp_path / "store"))
    damage(path, *expert)
    device = runners(path, num_slots=num_slots)
    device.tier.wait()
    device._look()
    assert "expert 5 of layer 1 is read again when a token needs it" in caplog.text
    held = {runner: [runner.allocate(), runner.allocate()] for runner in (device, whole)}
    for runner, rows in held.items():
        for row in rows:
            runner.prefill(row, prompt)
    with pytest.raises(StepFault) as fault:
        device.decode([RowStep(row, token) for row, token in zip(held[device], [spare, need], strict=True)])
    assert fault.value.positions == (1,)
    assert isinstance(fault.value.cause, ShardCorruptError)
    assert device.kv.num_tokens == 2
    alone = [runner.decode([RowStep(rows[0], spare)]).logits for runner, rows in held.items()]
    assert torch.allclose(alone[0], alone[1], rtol=1e-4, atol=1e-4)
    damage(path, *expert)  # flips the same bit back
    healed = [runner.decode([RowStep(rows[1], need)]).logits for runner, rows in held.items()]
    assert torch.allclose(healed[0], healed[1], rtol=1e-4, atol=1e-4)
    device.free(held[device][0])
    damage(path, *expert)
    row = device.allocate()
    assert device.prefill(row, [*prompt, need]).logits.isfinite().all(), "what was read keeps its place"


def test_a_damaged_expert_fails_a_prompt_that_needs_it(small_store, runners, tmp_path):
    prompt, need, _ = needing(runners(small_store, "host"), (0, 2))
    path = Path(shutil.copytree(small_store, tmp_path / "store"))
    damage(path, 0, 2)
    device = runners(path)
    row = device.allocate()
    device.prefill(row, prompt)
    with pytest.raises(StepFault) as fault:
        device.prefill(row, [need, need])
    assert fault.value.positions == (0,)
    assert device.kv.num_tokens == 1
    with pytest.raises(StepFault):
        device.prefill(row, [need] * 50)  # so many would be streamed ahead of the routers' choice


def test_of_what_comes_to_the_store_only_the_damaged_is_missing(small_store, runners, tmp_path, caplog):
    path = Path(shutil.copytree(small_store, tmp_path / "store"))
    damage(path, 1, 6)
    device = runners(path, mask=ExpertMask.same_in_every_layer(range(5), LAYERS, EXPERTS))
    device.model.routing.set_mask(EVERYTHING)
    device.adopt()
    assert device.rows.table(EVERYTHING).sum() > 0
    device.tier.wait()
    device._look()
    assert np.argwhere(device.rows.table(EVERYTHING) != 1).tolist() == [[1, 6]]
    assert device.rows.table(EVERYTHING)[1, 6] == 2, "who needs it is told, rather than masked"
    assert "expert 6 of layer 1" in caplog.text
    damage(path, 1, 6)
    row = device.allocate()
    whole = runners(small_store, "host")
    prompt, need, _ = needing(whole, (1, 6))
    device.prefill(row, prompt)
    other = whole.allocate()
    whole.prefill(other, prompt)
    both = [runner.decode([RowStep(at, need)]).logits for runner, at in ((device, row), (whole, other))]
    assert torch.allclose(both[0], both[1], rtol=1e-4, atol=1e-4)


def test_what_came_to_the_store_and_has_no_room_is_read_from_the_disk_by_every_row(small_store, runners):
    first = ExpertMask.same_in_every_layer(range(5), LAYERS, EXPERTS)
    room = LAYERS * (5 + TOP_K) * Store.open(small_store).manifest.layers[0].span_bytes
    device, whole = (runners(small_store, kind, **options) for kind, options in (
        ("device", {"mask": first, "host_memory_bytes": room}), ("host", {})
    ))  # fmt: skip
    few = greedy(device, [PROMPT], 6, masks=[None])[0]
    device.model.routing.set_mask(EVERYTHING)
    device.adopt()
    grown = greedy(device, [PROMPT, PROMPT], 6, masks=[None, first])
    assert grown == [greedy(whole, [PROMPT], 6, masks=[None])[0], few]
    assert few != grown[0]
    assert device.pages.num_host_spans <= LAYERS * (5 + TOP_K)
    device.pages.check_integrity(contents=True)


def test_a_layer_of_which_nothing_can_be_read_ends_the_start(few_small_store, runners, tmp_path):
    path = Path(shutil.copytree(few_small_store, tmp_path / "store"))
    with Store.open(path) as store:
        experts = np.flatnonzero(store.available[1]).tolist()
    for expert in experts:
        damage(path, 1, expert)
    with pytest.raises(ShardCorruptError):
        runners(path)
