"""Training of adapters: the loss falls, held-out text is measured, and an interrupted run ends with the same bits."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expert_store.errors import AdapterError
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.corpus import Corpus, read_corpus
from server.adapting.generation import write_texts
from server.adapting.parameters import expert_parameters, make_parameters
from server.adapting.run import AdaptRequest, adapt
from server.adapting.target import Target, drawn_pools, most_wanted
from server.adapting.training import DIVERGENCE_ROWS, Training, TrainingOptions, divergence, usual_batch
from server.model.host.assembly import HostModel, load_model
from server.model.runner import RunnerOptions
from server.model.seam.changed import changed_experts
from server.quality.texts import Domain, TextOptions, TextsError

OPTIONS = TrainingOptions(tokens=12 * 64, batch_tokens=64, rate=2e-2, measures=2)
POOLS = Target(shares=(0.25, 1.0), late=0.5, skew=1.0)


@pytest.fixture
def model(small_store: Path) -> Iterator[HostModel]:
    found = load_model(
        Store.open(small_store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=4)
    )
    yield found
    found.close()


def corpus(model: HostModel) -> Corpus:
    random = np.random.default_rng(0)
    texts = {name: random.integers(100, 140, size=(10, 32)).tolist() for name in ("one", "two")}
    return read_corpus(model, texts, 32, 64)


def train(model: HostModel, target: Target = POOLS) -> Training:
    return Training(model, target, corpus(model), make_parameters(model, 4, 0), OPTIONS, {"seed": 0})


def test_training_repairs_a_masked_model_on_text_that_it_did_not_see(model: HostModel) -> None:
    mask = ExpertMask.same_in_every_layer([1, 4], 2, 8)
    training = train(model, Target(mask=mask))
    before = training.held_out(None)
    done = training.run(None)
    assert done.step == training.num_steps == 12
    assert done.losses[-1][1] < 0.8 * done.losses[0][1]
    assert done.ratios[-1][1]["0.25"] < before["0.25"]


def test_the_loss_is_the_divergence_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, got = torch.randn(2, DIVERGENCE_ROWS + 3, 4, 9, generator=generator)
    weights = torch.rand(DIVERGENCE_ROWS + 3, 4, generator=generator)
    got.requires_grad_()
    loss = divergence(wanted, got, weights)
    each = torch.nn.functional.kl_div(
        got.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (gradient,) = torch.autograd.grad(3 * loss, got)
    (wanted_gradient,) = torch.autograd.grad(3 * (each * weights).sum(), got)
    torch.testing.assert_close(loss, (each * weights).sum())
    torch.testing.assert_close(gradient, wanted_gradient)


def test_a_shared_expert_changes_nothing_before_it_is_trained_and_repairs_more(model: HostModel) -> None:
    mask, losses = ExpertMask.same_in_every_layer([1, 4], 2, 8), []
    for width in (0, 8):
        parameters = make_parameters(model, 1, 0, width)
        assert sum("down" in parts for parts in parameters.values()) == (2 if width else 0)
        training = Training(model, Target(mask=mask), corpus(model), parameters, OPTIONS, {})
        assert training.held_out() == training.held_out(None)
        losses.append(training.run(None).losses[-1][1])
    assert losses[1] < losses[0]


def test_no_sequence_is_trained_on_and_measured(model: HostModel) -> None:
    found = corpus(model)
    held_out = {tuple(tokens) for sequences in found.held_out.values() for tokens in sequences}
    assert held_out
    assert held_out.isdisjoint(tuple(tokens) for _, tokens in found.train)
    with pytest.raises(TextsError, match="too little"):
        read_corpus(model, {"one": [[5] * 32]}, 32, 64)


def test_an_interrupted_run_continues_to_the_same_bits(model: HostModel, small_store: Path, tmp_path: Path) -> None:
    whole = train(model)
    whole.run(None)
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=4)
    others = [load_model(Store.open(small_store), options) for _ in range(2)]
    first = train(others[0])
    first.run(None, last=5)
    first.save(tmp_path / "state")
    second = train(others[1])
    second.resume(tmp_path / "state")
    done = second.run(None)
    assert [loss for _, loss in done.losses] == [loss for _, loss in whole.done.losses]
    for name, parts in whole.parameters.items():
        for part, one in parts.items():
            assert torch.equal(one, second.parameters[name][part]), name
    second._work = {"seed": 1}
    with pytest.raises(AdapterError, match="other texts or options"):
        second.resume(tmp_path / "state")
    for other in others:
        other.close()


def test_pools_are_the_most_wanted_experts_and_half_of_them_begin_after_a_prompt() -> None:
    random, own = np.random.default_rng(0), np.arange(16.0).reshape(2, 8)
    counts = torch.tensor([round(POOLS.draw(random).share * 8) for _ in range(50)])
    demand = torch.from_numpy(own)[:, None].expand(-1, 50, -1)
    pools = drawn_pools(demand, demand, counts, torch.rand(50))
    assert {tuple(sizes) for sizes in pools.sum(dim=-1).T.tolist()} == {(count, count) for count in range(2, 9)}
    for at, count in enumerate(counts.tolist()):
        assert np.array_equal(pools[:, at].numpy(), most_wanted(own, count / 8).allowed)
    assert most_wanted(own, 0.25).allowed[0].tolist() == [False] * 6 + [True] * 2
    starts = [POOLS.draw(random).start for _ in range(200)]
    assert 60 < sum(start == 0 for start in starts) < 140
    assert max(starts) < 0.75
    small = [Target(shares=(0.125, 1.0)).draw(random) for _ in range(200)]
    assert sum(draw.share < 0.35 for draw in small) > 110  # 35 % is the middle of the logarithms
    assert 20 < sum(draw.start > 0 for draw in small) < 60
    assert [share for share, _ in POOLS.measured(own)] == [0.5, 0.25]


def test_the_whole_model_writes_text_when_there_is_none(model: HostModel, tmp_path: Path) -> None:
    training = TrainingOptions(tokens=128, batch_tokens=64, measures=1)
    request = AdaptRequest([], TextOptions(context=32), POOLS, training, rank=2, generated_tokens=128)
    said: list[str] = []
    adapter, _ = adapt(model, request, tmp_path / "run", said.append)
    assert all(word in said[0] for word in ("numbers to train", "minutes", "MiB"))
    assert adapter.shares == (0.25, 1.0)
    assert adapter.price["curves"].keys() == {"generated"}
    assert adapter.training["ratios"][-1][0] == 2
    again, _ = adapt(model, request, tmp_path / "run", said.append)
    assert said[-3:-2] != said[:1]
    assert again.to_bytes() == adapter.to_bytes()
    (tmp_path / "run" / "state.safetensors").unlink()  # as a run that was killed before it saved a step
    with pytest.raises(AdapterError, match="other texts or options"):
        adapt(model, replace(request, training=replace(training, seed=1)), tmp_path / "run")


def test_text_is_drawn_from_the_whole_model(model: HostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda shares, count, generator: shares.argmax(dim=-1, keepdim=True))
    beginnings = [[5, 9, 300], [7, 120, 44], [5, 8, 301]]
    for begun, text in zip(beginnings, write_texts(model, beginnings, 12, 0, lambda *step: None).tolist(), strict=True):
        assert text[:3] == begun
        model.routing.begin(1, 11)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([text[:-1]]), use_cache=False).logits
        model.routing.abandon()
        assert text[3:] == logits[0, 2:].argmax(dim=-1).tolist()


def test_a_run_of_other_work_is_not_continued(model: HostModel, stories: Path, tmp_path: Path) -> None:
    training = TrainingOptions(tokens=64, batch_tokens=64, measures=1)
    text = TextOptions(context=32, max_tokens=160)
    request = AdaptRequest([Domain("stories", (stories,))], text, POOLS, training, rank=2)
    adapt(model, request, tmp_path / "run")
    other = AdaptRequest(request.domains, text, Target(shares=(0.5, 1.0)), training, rank=2)
    with pytest.raises(AdapterError, match="delete it"):
        adapt(model, other, tmp_path / "run")


def test_a_training_makes_about_300_steps_of_sizes_that_a_machine_likes() -> None:
    assert [usual_batch(tokens) for tokens in (10_000, 1_500_000, 60_000_000)] == [1024, 5000, 16384]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._now, self._alive = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _end(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._now -= num_bytes


@pytest.mark.parametrize(("rank", "trains_experts"), [(4, False), (4, True), (0, True)])
def test_the_memory_that_is_forecast_is_what_a_training_takes(
    model: HostModel, rank: int, trains_experts: bool
) -> None:
    mask, kept = ExpertMask.same_in_every_layer([1, 4, 5, 6], 2, 8), [[1, 4, 5, 6]] * 2 if trains_experts else []
    found = corpus(model)
    options = replace(OPTIONS, tokens=384, batch_tokens=384)
    with LiveBytes() as live:
        parameters = make_parameters(model, rank, 0, 8)
        parameters |= expert_parameters(model, kept, rank, 0) if trains_experts else {}
        with changed_experts(model, kept, parameters):
            training = Training(model, Target(mask=mask), found, parameters, options, {})
            _, forecast = training.forecast()
            live.most = 0
            training.run(None, last=1)
    assert 0.85 * live.most < forecast < 1.15 * live.most
