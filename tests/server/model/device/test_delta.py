"""Layers that keep a state: a row's state is that of its tokens, however they came, and whatever failed meanwhile."""

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
from server.model.device.capture.parts import forget_kind, gated_norm, grouped_norm
from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.device.step import graphs
from server.model.device.step.mixers import delta, mamba
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RowStep, RunnerOptions, StepFault
from tests.families.checkpoints import is_installed
from tests.server.model.device.captured import TUNING, Reference, build, distance, run
from tests.server.model.device.families import model_of
from tests.server.model.device.test_runner_families import DEVICE, store_of

FAMILIES = [
    "qwen3_next",
    *(
        pytest.param(name, marks=pytest.mark.exhaustive)
        for name in ("kimi_linear", "lfm2_moe", "granitemoehybrid in groups")
    ),
]
TOKENS = torch.tensor([[7, 8], [9, 10], [11, 12]])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Those whose states decay by head and by channel, one without a state beside its convolutions, and Mamba-2."""
    name: str = request.param
    return name


def test_a_step_that_runs_again_reads_and_writes_the_same(family: str) -> None:
    """As one does whose expert was in no memory, or whose batch failed elsewhere."""
    model = model_of(family)
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


def test_a_row_that_sits_out_keeps_its_state(family: str) -> None:
    model = model_of(family)
    step = build(model, torch.float32, batch=2)
    wanted = Reference(model).logits(TOKENS)
    run(step, TOKENS[:1], [0, 5])
    run(step, TOKENS[1:2], [-1, 5])
    got, _ = run(step, TOKENS[1:2].flip(1), [-1, 0])
    assert distance(got[:, 1], wanted[1:2, 0]) < 2e-5
    got, _ = run(step, TOKENS[2:3], [-1, 5])
    assert distance(got[:, 1], wanted[2:3, 1]) < 2e-5


def test_a_state_that_decays_by_channel_agrees_with_float64() -> None:
    model = model_of("kimi_linear")
    got, _ = run(build(model, torch.float32, batch=1), TOKENS[:2, :1], [3])
    assert distance(got, Reference(model).logits(TOKENS[:2, :1])) < 2e-5


@pytest.mark.exhaustive
def test_products_by_tensor_cores_agree_with_float64_too(family: str) -> None:
    """As those of a server of many rows are."""
    model = model_of(family)
    got, _ = run(build(model, torch.float32, batch=2, batch_invariant=False), TOKENS, [3, 1])
    assert distance(got, Reference(model).logits(TOKENS)) < 2e-5


@pytest.fixture(scope="module")
def store(family: str, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    return store_of(family, tmp_path_factory.mktemp("store"), repository)


@pytest.fixture
def runner(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceRunner]:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)
        for module in (delta, mamba):
            monkeypatch.setattr(module, "SCAN_VALUES", 16)
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=4, max_rows=2, max_tokens=96)
    made = load_device_runner(Store.open(store), options, proof=False)
    yield made
    made.close()


def logits_of(family: str, tokens: list[int]) -> torch.Tensor:
    """[T, V] of transformers in float64."""
    return Reference(model_of(family)).logits(torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize(
    "cuts", [(2, 1, 2), *(pytest.param(cuts, marks=pytest.mark.exhaustive) for cuts in ((7,), (1, 1, 5), (4, 3)))]
)
def test_a_prompt_in_chunks_and_tokens_after_it_agree_with_float64(
    cuts: tuple[int, ...], family: str, runner: DeviceRunner
) -> None:
    tokens = [40, 41, 42, 43, 44, 45, 46, 50, 51][: sum(cuts) + 2]
    wanted = logits_of(family, tokens)
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


def test_a_prompt_goes_on_from_a_copy_of_the_state_that_another_left(family: str, runner: DeviceRunner) -> None:
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
    assert distance(first, logits_of(family, tokens[: BLOCK_TOKENS + 1])[-1]) < 2e-5
    for _ in range(2):
        assert torch.equal(read(tokens[: BLOCK_TOKENS + 1], BLOCK_TOKENS), first)
    assert distance(read(tokens, BLOCK_TOKENS), logits_of(family, tokens)[-1]) < 2e-5
    runner.kv.check_integrity()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_a_chunk_that_failed_leaves_the_state_as_it_was(
    size: int, family: str, runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [40, 41, 42, 43, 44, 45][: 3 + size]
    row = runner.allocate()
    runner.prefill(row, tokens[:3])
    forward: Callable[..., Any] = runner._stream.forward

    def failing(layer: int, *args: Any) -> Any:
        if layer == runner.shape.num_moe_layers - 1:  # the layers before have their results
            raise StoreError("the disk is gone")
        return forward(layer, *args)

    with monkeypatch.context() as broken:
        broken.setattr(runner._stream, "forward", failing)
        with pytest.raises(StepFault, match="the disk is gone"):
            runner.prefill(row, tokens[3:])
    got = runner.prefill(row, tokens[3:]).logits[0]
    assert distance(got.double().cpu(), logits_of(family, tokens)[-1]) < 2e-5


def test_a_change_of_a_delta_nets_own_norm_is_refused_by_name() -> None:
    changes = {"model.layers.0.linear_attn.norm": {"scale": torch.zeros(16)}}
    with pytest.raises(NotCapturableError, match=r"terse changes model\.layers\.0\.linear_attn\.norm \(scale\)"):
        check_adapters(model_of("qwen3_next"), {"terse": Adapter("", 2, 8, changes)})


@pytest.mark.parametrize(("name", "beside"), [("lfm2_moe", "convolutions"), ("granitemoehybrid", "Mamba-2")])
def test_adapters_beside_states_without_a_delta_rule_are_refused_by_name(name: str, beside: str) -> None:
    check_adapters(model_of(name), {})
    with pytest.raises(NotCapturableError, match=f"no adapters beside {beside}: the host-driven path carries it"):
        check_adapters(model_of(name), {"terse": Adapter("", 2, 8, {})})


def test_a_norm_of_groups_is_what_it_computes() -> None:
    norm = model_of("granitemoehybrid in groups").model.layers[1].mamba.norm
    weight, parts = grouped_norm(norm, 2, "here")
    assert weight is norm.weight
    assert parts == (2 if hasattr(norm, "group_size") else 1)  # older transformers norm all groups together

    class Doubled(type(norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states, gate)

    norm.__class__ = Doubled
    with pytest.raises(NotCapturableError, match="here: Doubled is no gated norm"):
        grouped_norm(norm, 2, "here")


def test_a_gated_norm_is_what_it_computes() -> None:
    norm = model_of("qwen3_next").model.layers[0].linear_attn.norm
    assert gated_norm(norm, "here") == (norm.weight, False)

    class Gated(type(norm)):  # type: ignore[misc]
        gate = staticmethod(torch.sigmoid)
        rounds = True

        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            value = hidden_states.float()
            value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + self.variance_epsilon)
            value = self.weight * value.to(hidden_states.dtype) if self.rounds else self.weight.float() * value
            return (value * self.gate(gate.float())).to(hidden_states.dtype)

    norm.__class__ = Gated
    norm.bfloat16()
    assert gated_norm(norm, "here") == (norm.weight, True)
    norm.rounds = False
    weight, is_sigmoid = gated_norm(norm, "here")
    assert is_sigmoid
    assert weight.dtype == torch.float32
    norm.gate = torch.tanh
    with pytest.raises(NotCapturableError, match="here: Gated is no gated norm"):
        gated_norm(norm, "here")


@pytest.mark.skipif(not is_installed("bailing_hybrid"), reason="this transformers has no bailing_hybrid")
def test_decays_are_what_their_module_computes() -> None:
    forget = model_of("bailing_hybrid").model.layers[1].self_attn.forget_gate
    assert forget_kind(forget, "here") == (-5.0, True)
    forget.safe_gate = False
    assert forget_kind(forget, "here") == (0.0, True)
    assert forget_kind(model_of("kimi_linear").model.layers[0].self_attn.forget_gate, "here") == (0.0, False)

    class Doubled(type(forget)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    forget.__class__ = Doubled
    with pytest.raises(NotCapturableError, match="here: Doubled makes other decays"):
        forget_kind(forget, "here")
