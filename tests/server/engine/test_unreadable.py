"""Experts whose bytes are damaged while serving: who fails, who goes on, and with which answer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_store.errors import ShardCorruptError
from expert_store.residency.cache import ExpertCache
from expert_store.store import Store
from router.mask import ExpertMask
from server.engine.engine import Engine
from server.engine.request import GenerationError
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from server.model.runner import RowStep, Runner, RunnerOptions, StepFault, StepOutput
from server.model.seam.routing import StepRouting
from tests.expert_store.damage import damage
from tests.server.engine.clients import Client

TEXTS = ["Once upon a time", "12 + 5 =", "Der Hund ist", "def main():", "The capital of France is"]
OWNER = 3
"""The text that the damaged expert is chosen for."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture
def store(tiny_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def wanted_by(store: Path, texts: list[str], num_tokens: int) -> list[np.ndarray]:
    """For each text, bool [L, E]: the experts that its prompt and `num_tokens - 1` greedy tokens are given."""
    model = load_model(Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    runner = HostRunner(model, max_rows=1, max_tokens=128)
    found = []
    for text in texts:
        row = runner.allocate()
        output = runner.prefill(row, model.tokenizer(text).input_ids)
        served = [output.record.served_index]
        for _ in range(num_tokens - 1):
            output = runner.decode([RowStep(row, int(output.logits[-1].argmax()))])
            served.append(output.record.served_index)
        runner.free(row)
        uses = np.zeros((8, 64), dtype=np.bool_)
        for layer, ids in enumerate(np.concatenate(served, axis=1)):
            uses[layer, np.unique(ids)] = True
        found.append(uses)
    runner.close()
    return found


@pytest.fixture(scope="module")
def uses(tiny_store: Path) -> list[np.ndarray]:
    """What each text's prompt and 24 tokens are given."""
    return wanted_by(tiny_store, TEXTS, 24)


@pytest.fixture(scope="module")
def prompts(tiny_store: Path) -> list[np.ndarray]:
    """What each text's prompt is given."""
    return wanted_by(tiny_store, TEXTS, 1)


def expert_of_one(uses: list[np.ndarray], owner: int, not_in_prompt_of: np.ndarray | None = None) -> tuple[int, int]:
    """An expert that the text at `owner` uses and no other text does."""
    others = np.any([mine for at, mine in enumerate(uses) if at != owner], axis=0)
    alone = uses[owner] & ~others
    alone[:, :16] = False  # those may be in slots from the start
    if not_in_prompt_of is not None:
        alone &= ~not_in_prompt_of
    layer, expert = np.argwhere(alone)[-1]
    return int(layer), int(expert)


def test_only_the_rows_that_need_a_corrupt_expert_fail_and_the_others_answer_as_without_it(
    make_engine: Callable[..., Engine], store: Path, uses: list[np.ndarray], prompts: list[np.ndarray]
) -> None:
    healthy = make_engine(store_path=store, max_rows=5)
    unharmed = [Client(healthy, text, **OPTIONS) for text in TEXTS]
    for client in unharmed:
        client.result()
    layer, expert = expert_of_one(uses, OWNER, not_in_prompt_of=prompts[OWNER])
    damage(store, layer, expert)
    engine = make_engine(store_path=store, max_rows=5, num_slots=2)
    clients = [Client(engine, text, **OPTIONS) for text in TEXTS]
    error = clients[OWNER].error()
    assert isinstance(error, GenerationError)
    assert isinstance(error.__cause__, ShardCorruptError)
    assert f"(layer {layer}, expert {expert})" in str(error)
    made = clients[OWNER].token_ids
    assert 0 < len(made) < 24, "it failed while decoding"
    assert made == unharmed[OWNER].token_ids[: len(made)], "no token was computed from damaged bytes"
    for at in (0, 1, 2, 4):
        clients[at].result()
        assert clients[at].token_ids == unharmed[at].token_ids
    status = engine.status()
    assert (status.num_running, status.kv_tokens) == (0, 0)
    assert status.totals.num_failed == status.totals.num_read_faults == 1
    engine.runner.model.cache.check_integrity()


def test_a_corrupt_expert_wanted_in_a_prompt_fails_that_request_alone(
    make_engine: Callable[..., Engine], store: Path, uses: list[np.ndarray], prompts: list[np.ndarray]
) -> None:
    layer, expert = expert_of_one([prompts[0], *uses[1:]], 0)
    damage(store, layer, expert)
    engine = make_engine(store_path=store, num_slots=4)
    clients = [Client(engine, text, **OPTIONS) for text in TEXTS]
    assert f"expert {expert}" in str(clients[0].error())
    assert clients[0].tokens == []
    assert [client.result().num_generated_tokens for client in clients[1:]] == [24] * 4


def test_masking_what_is_corrupt_answers_everyone_as_if_it_had_never_been_there(
    make_engine: Callable[..., Engine], store: Path, caplog: pytest.LogCaptureFixture, uses: list[np.ndarray]
) -> None:
    layer, expert = expert_of_one(uses, OWNER)
    damage(store, layer, expert)
    allowed = np.ones((8, 64), dtype=np.bool_)
    allowed[layer, expert] = False
    without = make_engine(store_path=store, mask=ExpertMask(allowed))
    wanted = [Client(without, text, **OPTIONS) for text in TEXTS]
    for client in wanted:
        client.result()
    engine = make_engine(store_path=store, num_slots=2, corrupt_experts="mask")
    clients = [Client(engine, text, **OPTIONS) for text in TEXTS]
    for mine, theirs in zip(clients, wanted, strict=True):
        mine.result()
        assert mine.token_ids == theirs.token_ids
    assert clients[OWNER].result().deficit.overall > 0.0
    model, status = engine.runner.model, engine.status()
    assert np.argwhere(model.store.excluded).tolist() == [[layer, expert]]
    assert not model.routing.mask.allowed[layer, expert]
    assert not model.store.available[layer, expert]
    assert (status.totals.num_failed, status.totals.num_read_faults) == (0, 1)
    assert f"expert {expert} of layer {layer} is masked for every request" in caplog.text
    model.store.reload()
    assert not model.store.available[layer, expert], "a reload does not bring it back"


def test_the_last_expert_of_a_layer_is_not_masked_but_fails_its_requests(
    make_engine: Callable[..., Engine], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertCache, "preload", lambda self, progress=None: None)
    damage(store, 3, 7)
    mask = np.ones((8, 64), dtype=np.bool_)
    mask[3] = False
    mask[3, 7] = True
    engine = make_engine(store_path=store, corrupt_experts="mask", mask=ExpertMask(mask))
    assert "expert 7" in str(Client(engine, TEXTS[0], max_new_tokens=2).error())
    assert engine.runner.model.routing.mask.allowed[3, 7]


def test_a_restored_file_heals(make_engine: Callable[..., Engine], store: Path, uses: list[np.ndarray]) -> None:
    layer, expert = expert_of_one(uses, OWNER)
    damage(store, layer, expert)
    engine = make_engine(store_path=store, num_slots=4)
    Client(engine, TEXTS[OWNER], **OPTIONS).error()
    damage(store, layer, expert)  # flips the same bit back
    assert Client(engine, TEXTS[OWNER], **OPTIONS).result().num_generated_tokens == 24


def test_fetching_ahead_what_is_corrupt_ends_nothing(
    make_engine: Callable[..., Engine], store: Path, monkeypatch: pytest.MonkeyPatch, uses: list[np.ndarray]
) -> None:
    """A request's own mask is fetched ahead; what cannot be read fails only whoever comes to need it."""
    monkeypatch.setattr(ExpertCache, "preload", lambda self, progress=None: None)
    layer, expert = expert_of_one(uses, OWNER)
    damage(store, layer, expert)

    class Later:
        mask: ExpertMask | None = None

        def observe(self, demand_index: np.ndarray, demand_weight: np.ndarray) -> None:
            if self.mask is None:
                self.mask = ExpertMask.of(uses[0] | uses[OWNER])

    engine = make_engine(store_path=store, num_slots=64)
    client = Client(engine, TEXTS[0], masking=Later(), **OPTIONS)
    assert client.result().num_generated_tokens == 24


def broken_runner(
    kind: type[HostRunner | SequenceRunner], store: Path, uses: list[np.ndarray], prompts: list[np.ndarray]
) -> tuple[Runner, tuple[int, int]]:
    """A runner over a store whose expert of one text alone is damaged, and that expert."""
    layer, expert = expert_of_one(uses, OWNER, not_in_prompt_of=prompts[OWNER])
    damage(store, layer, expert)
    model = load_model(
        Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=4, mask=None)
    )
    return kind(model, max_rows=5, max_tokens=128), (layer, expert)


@pytest.mark.parametrize("kind", [HostRunner, SequenceRunner])
def test_a_step_fault_names_the_rows_and_leaves_the_others_as_they_were(
    kind: type[HostRunner | SequenceRunner], store: Path, uses: list[np.ndarray], prompts: list[np.ndarray]
) -> None:
    """Rows in another order than their memory; the step is repeated without the one that fails."""
    runner, expert = broken_runner(kind, store, uses, prompts)
    tokenizer = runner.model.tokenizer
    rows, tokens = {}, {}
    for at in (3, 1, 4, 0):
        rows[at] = runner.allocate()
        output = runner.prefill(rows[at], tokenizer(TEXTS[at]).input_ids)
        tokens[at] = [int(output.logits[-1].argmax())]
    order, faults = [0, 1, 3, 4], []

    def step() -> StepOutput:
        return runner.decode([RowStep(rows[at], tokens[at][-1]) for at in order])

    for _ in range(23):
        before = runner.kv.num_tokens
        try:
            output = step()
        except StepFault as fault:
            faults.append((fault.expert, [order[at] for at in fault.positions], fault.is_repeatable))
            if kind is HostRunner:
                assert runner.kv.num_tokens == before
            runner.free(rows[OWNER])
            order.remove(OWNER)
            output = step()
        for at, logits in zip(order, output.logits, strict=True):
            tokens[at].append(int(logits.argmax()))
    assert faults == [(expert, [OWNER], kind is HostRunner)]
    whole = HostRunner(runner.model, max_rows=1, max_tokens=128)
    for at in order:
        row = whole.allocate()
        output = whole.prefill(row, tokenizer(TEXTS[at]).input_ids)
        alone = [int(output.logits[-1].argmax())]
        while len(alone) < 24:
            alone.append(int(whole.decode([RowStep(row, alone[-1])]).logits[0].argmax()))
        whole.free(row)
        assert tokens[at] == alone
    runner.close()


def test_a_fault_that_no_row_can_be_blamed_for_fails_the_whole_step(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def broken(*args: object, **kwargs: object) -> None:
        raise ShardCorruptError("somewhere")

    monkeypatch.setattr(engine.runner, "decode", broken)
    clients = [Client(engine, text, **OPTIONS) for text in TEXTS[:2]]
    for client in clients:
        assert "somewhere" in str(client.error())
    assert engine.is_alive


def test_rows_of_a_step_that_has_not_come_to_a_layer_are_unknown() -> None:
    routing = StepRouting("qwen3_moe", 1, torch.device("cpu"), ExpertMask(np.ones((1, 8), dtype=np.bool_)))
    routing.begin(2, 1)
    assert routing.rows_served_by(0, 3) == []
