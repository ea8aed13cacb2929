"""The device-driven runner against the host-driven one, on a small store; on a GPU also on the bundled checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.paging.pages import DevicePages
from expert_store.store import Store
from router.mask import ExpertMask

pytest.importorskip("triton")

from server.constraints.compiler import ConstraintCompiler
from server.constraints.grammar import Regex
from server.model.device.running import assembly
from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.device.step import graphs as device_graphs
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import Adjustment, RowStep, Runner, RunnerOptions
from server.model.seam.observation import observe_outputs
from tests.server.model.device.small import DEVICE, EXPERTS, LAYERS, TOP_K, TUNING


@pytest.fixture
def runners(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[DeviceRunner, Runner]]]:
    made: list[DeviceRunner | Runner] = []
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_graphs, "Tuning", lambda: TUNING)

    def make(path: Path, num_slots: int, mask: ExpertMask | None = None) -> tuple[DeviceRunner, Runner]:
        options = {"device": DEVICE, "dtype": torch.float32, "num_slots": num_slots, "mask": mask}
        device = load_device_runner(Store.open(path), RunnerOptions(max_rows=2, max_tokens=384, **options), proof=False)
        host = HostRunner(load_model(Store.open(path), RunnerOptions(**options)), max_rows=2, max_tokens=384)
        made.extend([device, host])
        return device, host

    yield make
    for runner in made:
        runner.close()


def greedy(runner: DeviceRunner | Runner, prompt: list[int], num_tokens: int) -> list[int]:
    row = runner.allocate()
    tokens = [int(runner.prefill(row, prompt).logits[0].argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(runner.decode([RowStep(row, tokens[-1])]).logits[0].argmax()))
    runner.free(row)
    return tokens


@pytest.mark.parametrize(
    "num_slots", [5, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in (TOP_K, EXPERTS))]
)
def test_greedy_tokens_equal_the_host_driven_runner(small_store, runners, num_slots):
    device, host = runners(small_store, num_slots)
    prompt = list(range(40, 88))  # twelve picks an expert: streamed ahead of the routers' choice
    assert greedy(device, prompt, 5) == greedy(host, prompt, 5)
    assert greedy(device, [7, 8], 3) == greedy(host, [7, 8], 3)
    pages: DevicePages = device.pages
    pages.check_integrity(contents=True)


def test_mixtral_is_captured_and_agrees(small_mixtral_store, runners):
    device, host = runners(small_mixtral_store, 3)
    assert greedy(device, [40, 41, 42], 4) == greedy(host, [40, 41, 42], 4)


def test_records_and_shares_equal_the_host_driven_ones_under_masks_and_temperatures(small_store, runners):
    device, host = runners(small_store, 3)
    allowed = np.ones((LAYERS, EXPERTS), dtype=bool)
    allowed[:, [0, 3, 4]] = False
    mask = ExpertMask.of(allowed)
    outputs = []
    for runner in (device, host):
        rows = [runner.allocate(), runner.allocate()]
        runner.prefill(rows[0], [5, 6, 7], mask=mask)
        runner.prefill(rows[1], [9, 10])
        outputs.append(runner.decode([RowStep(rows[0], 11, mask=mask), RowStep(rows[1], 12, temperature=3.0)]))
    got, wanted = outputs
    assert got.chosen.token.tolist() == wanted.logits.argmax(dim=-1).tolist()
    assert got.chosen.logit == pytest.approx(wanted.logits.amax(dim=-1).cpu().numpy(), rel=1e-4)
    assert got.chosen.normaliser == pytest.approx(wanted.logits.logsumexp(dim=-1).cpu().numpy(), rel=1e-4)
    assert torch.allclose(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert (got.record.served_index == wanted.record.served_index).all()
    assert got.record.served_weight == pytest.approx(wanted.record.served_weight, abs=1e-5)
    assert (got.record.demand_index == wanted.record.demand_index).all()
    assert got.record.missed_mass == pytest.approx(wanted.record.missed_mass, abs=1e-5)
    assert got.share.missed == pytest.approx(wanted.share.missed, abs=1e-5)
    assert got.share.demanded == pytest.approx(wanted.share.demanded, abs=1e-5)


def test_a_constrained_row_is_chosen_on_the_device_among_allowed_tokens_and_its_neighbour_as_ever(small_store, runners):
    device, _ = runners(small_store, EXPERTS)
    rows = [device.allocate(), device.allocate()]
    for row in rows:
        device.prefill(row, [5, 6, 7])
    plain = device.decode([RowStep(rows[0], 8)]).chosen.token[0]
    device.rows.take_back(rows[:1], 1)
    tokenizer = device.model.tokenizer
    state = ConstraintCompiler(tokenizer, device.model.vocab_size, {0}).compile(Regex("[ab]{4}")).begin()
    best = Adjustment(np.array([plain], dtype=np.int32), np.array([-1e6], dtype=np.float32))
    tokens, steps = [], [RowStep(rows[0], 8), RowStep(rows[1], 8, adjustment=best, allowed=state.allowed)]
    while not state.is_complete:
        output = device.decode(steps)
        if not tokens:
            assert output.chosen.token[0] == plain
        logits = output.logits[1].clone()
        logits[torch.from_numpy(~state.allowed_flags()).to(logits.device)] = -torch.inf
        tokens.append(int(output.chosen.token[1]))
        assert tokens[-1] == int(logits.argmax())
        assert output.chosen.logit[1] == float(output.logits[1, tokens[-1]])
        state.take(tokens[-1])
        steps = [RowStep(rows[0], 9), RowStep(rows[1], tokens[-1], allowed=state.allowed)]
    assert re.fullmatch("[ab]{4}", tokenizer.decode(tokens))


def test_rows_join_and_leave_without_another_capture(small_store, runners):
    device, host = runners(small_store, 4)
    first = {runner: runner.allocate() for runner in (device, host)}
    second = {runner: runner.allocate() for runner in (device, host)}
    for runner in (device, host):
        runner.prefill(first[runner], [20, 21, 22])
        runner.prefill(second[runner], [30, 31])
    graphs = device.graphs.steps
    both = [
        runner.decode([RowStep(second[runner], 32), RowStep(first[runner], 23)]).logits for runner in (device, host)
    ]
    assert torch.allclose(both[0], both[1], rtol=1e-4, atol=1e-4)
    for runner in (device, host):
        runner.free(first[runner])
    alone = [runner.decode([RowStep(second[runner], 33)]).logits for runner in (device, host)]
    assert torch.allclose(alone[0], alone[1], rtol=1e-4, atol=1e-4)
    assert device.graphs.steps == graphs
    assert device.kv.num_free_rows == 1
    assert device.kv.num_tokens == 4


@pytest.mark.parametrize("num_slots", [4, pytest.param(EXPERTS, marks=pytest.mark.exhaustive)])
def test_experts_that_come_into_use_are_served_from_the_next_step_on_and_leave_again(small_store, runners, num_slots):
    first, all_experts = (ExpertMask.same_in_every_layer(range(n), LAYERS, EXPERTS) for n in (5, EXPERTS))
    device, host = runners(small_store, num_slots, first)
    rows = {runner: runner.allocate() for runner in (device, host)}
    for runner in (device, host):
        runner.prefill(rows[runner], [20, 21, 22])

    def step(token: int) -> list[np.ndarray]:
        outputs = [runner.decode([RowStep(rows[runner], token)]) for runner in (device, host)]
        assert torch.allclose(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
        return [output.record.served_index for output in outputs]

    assert all(index.max() < 5 for index in step(23))
    graphs = device.graphs.steps
    for runner in (device, host):
        runner.model.routing.set_mask(all_experts)
        runner.adopt()
    device.tier.wait()
    served = [index for token in range(24, 30) for index in step(token)]
    assert max(index.max() for index in served) >= 5, "no token chose a new expert: the test shows nothing"
    for runner in (device, host):
        runner.model.routing.set_mask(ExpertMask.same_in_every_layer((1, 6, 7), LAYERS, EXPERTS))
        runner.adopt()
    assert all(set(index.ravel().tolist()) <= {1, 6, 7} for index in step(30))
    assert {key: graph for key, graph in device.graphs.steps.items() if key in graphs} == graphs
    device.pages.check_integrity(contents=True)


@pytest.mark.parametrize("prompt", [[7, 8, 9], list(range(40, 88))])
def test_what_experts_put_out_is_seen_in_prompts_and_not_in_steps(small_store, runners, prompt):
    device, host = runners(small_store, 3)
    seen = []
    for runner in (device, host):
        runner.model.observer = observe_outputs(runner.model.model, LAYERS)
        runner.model.observer.is_on = True
        row = runner.allocate()
        seen.append(runner.prefill(row, prompt).outputs)
        stepped = runner.decode([RowStep(row, 10)]).outputs
        assert (stepped is None) == (runner is device)
    assert seen[0].norms == pytest.approx(seen[1].norms, rel=1e-4)
    assert seen[0].changes == pytest.approx(seen[1].changes, abs=1e-5)


def test_warming_up_leaves_rows_and_pages_as_they_were(small_store, runners, monkeypatch):
    monkeypatch.setattr(assembly, "WARMED_LENGTHS", (1, 5))
    device, host = runners(small_store, 3)
    table, stats = device.pages.page_table.clone(), device.pages.stats.clone()
    phases = []
    assembly.warm_up(device, lambda phase, share: phases.append((phase, share)))
    assert phases == [("warming up", 0.0), ("warming up", 0.5)]
    assert (device.kv.num_free_rows, device.kv.num_tokens) == (2, 0)
    assert torch.equal(device.pages.page_table, table)
    assert torch.equal(device.pages.stats, stats)
    assert greedy(device, [7, 8], 3) == greedy(host, [7, 8], 3)


def test_a_step_without_masks_runs_in_a_graph_that_reads_them_rather_than_wait_for_another(small_store, runners):
    first = ExpertMask.same_in_every_layer(range(5), LAYERS, EXPERTS)
    device, host = runners(small_store, EXPERTS, first)
    for runner in (device, host):
        runner.model.routing.set_mask(ExpertMask.same_in_every_layer(range(EXPERTS), LAYERS, EXPERTS))
        runner.adopt()
    device.tier.wait()
    captured = device.graphs.steps
    assert {key.masked for key in captured} == {True}
    assert greedy(device, [7, 8], 4) == greedy(host, [7, 8], 4)
    assert device.graphs.steps == captured


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [8, 16, 40, 64])
def test_256_greedy_tokens_of_the_bundled_checkpoint_equal_the_host_driven_runner(tiny_store, runners, num_slots):
    device, host = runners(tiny_store, num_slots)
    prompt = device.model.tokenizer("Once upon a time")["input_ids"]
    assert greedy(device, prompt, 256) == greedy(host, prompt, 256)
    device.pages.check_integrity(contents=True)
