"""Gated delta nets: a row's state is that of its tokens, however they came, and whatever failed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from expert_store.adapter import Adapter
from expert_store.errors import StoreError
from expert_store.store import Store
from server.model.device.capture import NotCapturableError
from server.model.device.capture.adapters import check_adapters
from server.model.device.capture.parts import gated_norm_weight
from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.device.step import delta, graphs
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RowStep, RunnerOptions, StepFault
from tests.server.model.device.captured import TUNING, Reference, build, distance, run
from tests.server.model.device.families import model_of
from tests.server.model.device.test_runner_families import DEVICE, store_of

FAMILY = "qwen3_next"
TOKENS = torch.tensor([[7, 8], [9, 10], [11, 12]])


def test_a_step_that_runs_again_reads_and_writes_the_same() -> None:
    """As one does whose expert was in no memory, or whose batch failed elsewhere."""
    model = model_of(FAMILY)
    step = build(model, torch.float32, batch=2)
    step.state.states.fill_(torch.nan)  # of rows that were there before
    step.state.rings.fill_(torch.nan)
    wanted = Reference(model).logits(TOKENS)
    for at, now in enumerate(TOKENS[:2]):
        first, _ = run(step, now[None], [3, 1])
        step.state.lengths[[3, 1]] = at
        again, _ = run(step, now[None], [3, 1])
        assert torch.equal(first, again)
        assert distance(again[0], wanted[at]) < 2e-5


def test_a_row_that_sits_out_keeps_its_state() -> None:
    model = model_of(FAMILY)
    step = build(model, torch.float32, batch=2)
    wanted = Reference(model).logits(TOKENS)
    run(step, TOKENS[:1], [0, 5])
    run(step, TOKENS[1:2], [-1, 5])
    got, _ = run(step, TOKENS[1:2].flip(1), [-1, 0])
    assert distance(got[:, 1], wanted[1:2, 0]) < 2e-5
    got, _ = run(step, TOKENS[2:3], [-1, 5])
    assert distance(got[:, 1], wanted[2:3, 1]) < 2e-5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    return store_of(FAMILY, tmp_path_factory.mktemp(FAMILY), repository)


@pytest.fixture
def runner(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceRunner]:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)
        monkeypatch.setattr(delta, "SCAN_VALUES", 16)
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=4, max_rows=2, max_tokens=96)
    made = load_device_runner(Store.open(store), options, proof=False)
    yield made
    made.close()


def logits_of(tokens: list[int]) -> torch.Tensor:
    """[T, V] of transformers in float64."""
    return Reference(model_of(FAMILY)).logits(torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    "cuts", [(2, 1, 2), *(pytest.param(cuts, marks=pytest.mark.exhaustive) for cuts in ((7,), (1, 1, 5), (4, 3)))]
)
def test_a_prompt_in_chunks_and_tokens_after_it_agree_with_float64(cuts: tuple[int, ...], runner: DeviceRunner) -> None:
    tokens = [40, 41, 42, 43, 44, 45, 46, 50, 51][: sum(cuts) + 2]
    wanted = logits_of(tokens)
    row = runner.allocate()
    at = 0
    for size in cuts:
        got = runner.prefill(row, tokens[at : at + size]).logits[0]
        at += size
        assert distance(got.double().cpu(), wanted[at - 1]) < 2e-5
    for token in tokens[at:]:
        got = runner.decode([RowStep(row, token)]).logits[0]
        at += 1
        assert distance(got.double().cpu(), wanted[at - 1]) < 2e-5
    runner.free(row)
    other = runner.allocate()
    assert other == row, "the row that was freed is the next to be taken"
    got = runner.prefill(other, tokens[:1]).logits[0]
    assert distance(got.double().cpu(), wanted[0]) < 2e-5


def test_a_prompt_goes_on_from_a_copy_of_the_state_that_another_left(runner: DeviceRunner) -> None:
    tokens = [40 + at % 50 for at in range(BLOCK_TOKENS + 6)]

    def read(given: list[int], found: int) -> torch.Tensor:
        row = runner.allocate()
        for end in (*range(BLOCK_TOKENS, len(given), BLOCK_TOKENS), len(given)):
            runner.kv.reuse(row, given, b"")
            assert runner.kv.length(row) >= found
            if runner.kv.length(row) < end:
                last = runner.prefill(row, given[runner.kv.length(row) : end]).logits[0]
            runner.kv.share(row, given[: end // BLOCK_TOKENS * BLOCK_TOKENS], b"", [None] * (end // BLOCK_TOKENS))
        runner.decode([RowStep(row, 7)])  # must not change what was kept
        runner.free(row)
        return last.double().cpu()

    first = read(tokens[: BLOCK_TOKENS + 1], 0)
    assert distance(first, logits_of(tokens[: BLOCK_TOKENS + 1])[-1]) < 2e-5
    for _ in range(2):
        assert torch.equal(read(tokens[: BLOCK_TOKENS + 1], BLOCK_TOKENS), first)
    assert distance(read(tokens, BLOCK_TOKENS), logits_of(tokens)[-1]) < 2e-5
    runner.kv.check_integrity()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_chunk_that_failed_leaves_the_state_as_it_was(
    size: int, runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [40, 41, 42, 43, 44, 45][: 3 + size]
    row = runner.allocate()
    runner.prefill(row, tokens[:3])
    forward: Callable[..., Any] = runner._stream.forward

    def failing(layer: int, *args: Any) -> Any:
        if layer:  # the delta net of layer 0 has its results
            raise StoreError("the disk is gone")
        return forward(layer, *args)

    with monkeypatch.context() as broken:
        broken.setattr(runner._stream, "forward", failing)
        with pytest.raises(StepFault, match="the disk is gone"):
            runner.prefill(row, tokens[3:])
    got = runner.prefill(row, tokens[3:]).logits[0]
    assert distance(got.double().cpu(), logits_of(tokens)[-1]) < 2e-5


def test_adapters_beside_delta_nets_are_refused_by_name() -> None:
    check_adapters(model_of(FAMILY), {})
    with pytest.raises(NotCapturableError, match="no adapters beside delta nets: the host-driven path carries it"):
        check_adapters(model_of(FAMILY), {"terse": Adapter("", 2, 8, {})})


def test_a_gated_norm_is_what_it_computes() -> None:
    norm = model_of(FAMILY).model.layers[0].linear_attn.norm
    assert gated_norm_weight(norm, "here") is norm.weight

    class Sigmoid(type(norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            value = hidden_states.float()
            value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight * value.to(hidden_states.dtype) * gate.float().sigmoid()).to(hidden_states.dtype)

    norm.__class__ = Sigmoid
    with pytest.raises(NotCapturableError, match="here: Sigmoid is no gated norm"):
        gated_norm_weight(norm, "here")
