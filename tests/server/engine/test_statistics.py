"""Statistics collected while serving: the same as calibration's for the same tokens, cheap, and kept."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.criteria import score
from extractor.planning.planner import PlanRequest, make_plan
from extractor.planning.selection import SelectionRequest
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import WINDOW_TOKENS, ExpertStatistics
from extractor.writing.prepare import prepare
from router.ledger import StepRecord, UsageLedger
from router.mask import ExpertMask
from server.cli.main import main
from server.engine import statistics as collecting
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence
from server.engine.snapshots import STATISTICS_FILE, StatisticsFile, served_statistics
from server.engine.statistics import DOMAIN, MAX_SHARE, OnlineStatistics
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from server.model.runner import RunnerOptions, StepOutput
from server.model.seam.observation import ExpertOutputs, OutputObserver, observe_outputs
from server.model.seam.routing import RowShare
from server.quality.batches import run_batch
from server.quality.calibration import observed
from tests.server.engine.clients import Client

TEXTS = ["Once upon a time there was a", "The capital of France is", "Der Hund ist", "12 + 5 ="]
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture
def everything_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is observed, whatever it costs."""
    monkeypatch.setattr(collecting, "MAX_SHARE", 1e12)


def reference(store: Path, sequences: list[list[int]]) -> dict[str, np.ndarray]:
    """Totals [L, E] of whole sequences, added up pick by pick."""
    model = load_model(Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    names = ("picks", "gate_mass", "output_norm", "output_norm_squared", "gate_output_norm", "residual_change")
    totals = {name: np.zeros((8, 64)) for name in (*names, "demand", "demand_mass")}
    totals["coactivation"] = np.zeros((7, 64, 64))
    with observed(model) as observer:
        for ids in sequences:
            record = run_batch(model, [ids]).record
            outputs = observer.take()
            assert outputs is not None
            gates = record.served_weight / record.served_weight.sum(axis=2, keepdims=True)
            for layer, token, pick in np.ndindex(record.served_index.shape):
                at = (layer, record.served_index[layer, token, pick])
                norm, weight = outputs.norms[layer, token, pick], record.served_weight[layer, token, pick]
                totals["picks"][at] += 1
                totals["demand"][at] += 1
                totals["gate_mass"][at] += gates[layer, token, pick]
                totals["demand_mass"][at] += gates[layer, token, pick]
                totals["output_norm"][at] += norm
                totals["output_norm_squared"][at] += norm**2
                totals["gate_output_norm"][at] += weight * norm
                totals["residual_change"][at] += weight * norm * outputs.changes[layer, token]
                if layer < 7:
                    for other in record.served_index[layer + 1, token]:
                        totals["coactivation"][layer, at[1], other] += 1
    model.close()
    return totals


@pytest.mark.parametrize("runner_type", [HostRunner, SequenceRunner])
def test_what_is_collected_is_what_calibration_counts_for_the_same_tokens(
    make_engine: Callable[..., Engine],
    tiny_store: Path,
    tmp_path: Path,
    everything_is_due: None,
    runner_type: type[HostRunner | SequenceRunner],
) -> None:
    path = tmp_path / "statistics.safetensors"
    engine = make_engine(statistics_path=path, max_rows=3, runner_type=runner_type, prefill_chunk_tokens=4)
    clients = [Client(engine, text, **OPTIONS) for text in TEXTS]
    sequences = []
    for client, text in zip(clients, TEXTS, strict=True):
        client.result()
        sequences.append([*engine.runner.model.tokenizer(text).input_ids, *client.token_ids[:-1]])
    engine.stop(5)
    found, wanted = read_statistics(path), reference(tiny_store, sequences)
    assert found.domains == [DOMAIN]
    assert found.num_tokens.tolist() == [sum(map(len, sequences))]
    for name in ("picks", "demand"):
        assert found.total(name).tolist() == wanted[name].tolist()
    assert found.coactivation.tolist() == wanted["coactivation"].tolist()
    for name in ("gate_mass", "demand_mass", "output_norm", "output_norm_squared", "gate_output_norm"):
        np.testing.assert_allclose(found.total(name), wanted[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.total("residual_change"), wanted["residual_change"], rtol=1e-2, atol=1e-3)
    assert found.total("missing").sum() == 0
    assert len(found.tokens) == sum(map(len, sequences))
    assert len(found.windows) >= 2
    np.testing.assert_allclose(found.windows.arrays["mass"].sum(axis=2), WINDOW_TOKENS, rtol=1e-2)


def test_plans_are_made_of_it(make_engine: Callable[..., Engine], tmp_path: Path, everything_is_due: None) -> None:
    path = tmp_path / "statistics.safetensors"
    engine = make_engine(statistics_path=path)
    for text in TEXTS:
        Client(engine, text, **OPTIONS).result()
    engine.stop(5)
    found = read_statistics(path)
    plan = make_plan(found, PlanRequest(count=16, criterion="reap-sum"))
    assert len(plan.deep_experts) == 16
    best = score(found, "reap-sum").argmax(axis=1)
    assert all(best[layer] in {deep.experts[layer] for deep in plan.deep_experts} for layer in range(8))
    assert found.expert_bytes > 0
    assert found.trunk_bytes > 0


def test_answers_are_the_same_with_and_without_collecting(
    make_engine: Callable[..., Engine], tmp_path: Path, everything_is_due: None
) -> None:
    plain, collecting_ = make_engine(), make_engine(statistics_path=tmp_path / "statistics.safetensors")
    for text in TEXTS:
        options = {"num_logprobs": 2, "max_new_tokens": 12, "ignore_eos": True}
        clients = [Client(engine, text, **options) for engine in (plain, collecting_)]
        for client in clients:
            client.result()
        assert clients[0].tokens == clients[1].tokens


def test_statistics_survive_restarts_and_add_up(
    make_engine: Callable[..., Engine], tmp_path: Path, everything_is_due: None
) -> None:
    path, tokens = tmp_path / "statistics.safetensors", []
    for _ in range(2):
        engine = make_engine(statistics_path=path)
        Client(engine, TEXTS[0], **OPTIONS).result()
        engine.stop(5)
        tokens.append(int(read_statistics(path).num_tokens.sum()))
    assert tokens[1] == 2 * tokens[0] > 0


def test_statistics_of_another_checkpoint_are_set_aside(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    write_statistics(path, ExpertStatistics("another", 2, 4, 2))
    engine = make_engine(statistics_path=path)
    Client(engine, TEXTS[0], **OPTIONS).result()
    engine.stop(5)
    assert read_statistics(path).num_layers == 8
    (aside,) = tmp_path.glob("statistics.safetensors.unreadable-*")
    assert read_statistics(aside).fingerprint == "another"


def test_what_servers_of_a_store_collected_is_found_unless_it_is_of_another_checkpoint(tmp_path: Path) -> None:
    assert served_statistics(tmp_path, "f") is None
    write_statistics(tmp_path / STATISTICS_FILE, ExpertStatistics("f", 2, 4, 2))
    found = served_statistics(tmp_path, "f")
    assert found is not None
    assert found.num_experts == 4
    assert served_statistics(tmp_path, "g") is None


def test_growing_goes_by_the_sizes_of_outputs_that_servers_saw(
    make_engine: Callable[..., Engine], tiny_checkpoint: Path, tmp_path: Path, everything_is_due: None, capsys: Any
) -> None:
    """Experts of one layer are made to look large: the growth of that layer follows them, not demand alone."""
    store = tmp_path / "store"
    prepare(Checkpoint.open(tiny_checkpoint), store, SelectionRequest(count=16)).run()
    engine = make_engine(store_path=store, usage_path=store / "usage.json", statistics_path=store / STATISTICS_FILE)
    for text in TEXTS:
        Client(engine, text, **OPTIONS).result()
    engine.stop(5)

    def next_experts() -> list[int]:
        assert main(["grow", str(store), "--dry-run", "--json"]) == 0
        return list(json.loads(capsys.readouterr().out)["added"][0]["experts"])

    before = next_experts()
    collected = read_statistics(store / STATISTICS_FILE)
    ledger = UsageLedger.load(store / "usage.json")
    wanted = np.where(np.arange(64) >= 16, ledger.demand_mass[3], 0.0)
    second = int(np.argsort(-wanted)[1])
    collected.totals["picks"][0, 3, second] = 1
    collected.totals["output_norm"][0, 3, second] = 1e6
    write_statistics(store / STATISTICS_FILE, collected)
    after = next_experts()
    assert after[3] == second != before[3]
    assert after[:3] + after[4:] == before[:3] + before[4:]


def test_a_file_that_cannot_be_written_costs_a_warning_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.write_text("in the way")
    file = StatisticsFile.__new__(StatisticsFile)
    try:
        file.__init__(folder / "statistics.safetensors", ExpertStatistics("f", 2, 4, 2), 0.0)  # type: ignore[misc]
    except NotADirectoryError:
        pytest.fail("a path that cannot be read must not stop the server")
    file.statistics.domain_index(DOMAIN)
    file.statistics.num_tokens[0] = 5
    file.close()
    assert "could not be saved" in caplog.text
    folder.unlink()
    file.close()
    assert read_statistics(folder / "statistics.safetensors").num_tokens.tolist() == [5]


def test_what_a_mask_hides_is_counted_as_missing(
    make_engine: Callable[..., Engine], tmp_path: Path, everything_is_due: None
) -> None:
    path = tmp_path / "statistics.safetensors"
    engine = make_engine(statistics_path=path, mask=ExpertMask.same_in_every_layer(range(16), 8, 64))
    deficit = Client(engine, TEXTS[0], **OPTIONS).result().deficit
    ledger = engine.ledger
    engine.stop(5)
    found = read_statistics(path)
    assert found.total("picks").tolist() == ledger.served_count.tolist()
    assert found.total("demand").tolist() == ledger.demand_count.tolist()
    assert found.total("missing")[:, :16].sum() == 0
    share = found.total("missing_mass").sum() / found.total("demand_mass").sum()
    assert share == pytest.approx(deficit.overall, rel=0.02)
    assert len(found.tokens) == 0, "the sample is of unmasked tokens"


def test_tempered_requests_are_left_out(
    make_engine: Callable[..., Engine], tmp_path: Path, everything_is_due: None
) -> None:
    path = tmp_path / "statistics.safetensors"
    engine = make_engine(statistics_path=path)
    clients = [Client(engine, TEXTS[0], router_temperature=2.0, **OPTIONS), Client(engine, TEXTS[1], **OPTIONS)]
    counts = [client.result() for client in clients]
    engine.stop(5)
    wanted = counts[1].num_prompt_tokens + counts[1].num_generated_tokens - 1
    assert read_statistics(path).num_tokens.tolist() == [wanted]


# -- the budget, with steps made by hand -------------------------------------------------------------------------------

SHAPE = (2, 1, 2)


class Costly(OutputObserver):
    """Noting a step takes 3 s, by its own account."""

    def note_step(self) -> None:
        if self.is_on:
            self.seconds += 3.0


def hand_made_output(observer: OutputObserver | None) -> StepOutput:
    index, weight = np.array([[[0, 1]], [[2, 3]]]), np.full(SHAPE, 0.5, dtype=np.float32)
    outputs = None
    if observer is not None and observer.is_on:
        outputs = ExpertOutputs(np.ones(SHAPE, dtype=np.float32), np.ones(SHAPE[:2], dtype=np.float32))
    share = RowShare(np.ones((1, 2)), np.zeros((1, 2)))
    return StepOutput(torch.zeros(1, 8), StepRecord(index, weight), share, outputs=outputs)


def collector_of(tmp_path: Path, observer: OutputObserver | None) -> OnlineStatistics:
    return OnlineStatistics(StatisticsFile(tmp_path / "statistics", ExpertStatistics("f", 2, 4, 2), 3600), observer)


def test_steps_are_observed_only_while_collecting_is_within_its_share(tmp_path: Path) -> None:
    observer = Costly(2)
    collector = collector_of(tmp_path, observer)
    sequence = Sequence(GenerationRequest("one", (1,)), print, print)
    for _ in range(2000):
        collector.begin_step()
        observer.note_step()
        collector.add(hand_made_output(observer), [sequence])
        collector.end_step(1.0 + (3.0 if observer.is_on else 0.0))
        assert not observer.is_on
    assert collector.num_observed_tokens == pytest.approx(MAX_SHARE * collector.served_seconds / 3.0, abs=1)
    assert collector.spent_seconds <= MAX_SHARE * collector.served_seconds + 3.1


def test_where_outputs_cannot_be_seen_what_is_wanted_is_collected(tmp_path: Path) -> None:
    collector = collector_of(tmp_path, None)
    sequence = Sequence(GenerationRequest("one", (1,)), print, print)
    for _ in range(2 * WINDOW_TOKENS):
        collector.begin_step()
        collector.add(hand_made_output(None), [sequence])
        collector.end_step(10.0)
    found = collector.flush()
    assert found.total("demand").sum() == 2 * WINDOW_TOKENS * 4
    assert found.coactivation.sum() == 2 * WINDOW_TOKENS * 4
    assert len(found.windows) == 2
    assert found.total("picks").sum() == found.total("output_norm").sum() == 0


def test_steps_that_do_not_show_outputs_add_what_was_wanted_to_those_that_do(tmp_path: Path) -> None:
    """Captured graphs beside prompts: norms are of the picks that they were seen of."""
    observer = OutputObserver(2)
    collector = collector_of(tmp_path, observer)
    sequence = Sequence(GenerationRequest("one", (1,)), print, print)
    for at in range(6):
        collector.begin_step()
        output = hand_made_output(observer)
        collector.add(output if at % 3 == 0 else replace(output, outputs=None), [sequence])
        collector.end_step(1000.0)
    found = collector.flush()
    assert found.total("demand").sum() == 6 * 4
    assert found.total("picks").sum() == found.total("output_norm").sum() == 2 * 4


def test_a_model_whose_experts_another_way_runs_has_no_observer(tiny_store: Path) -> None:
    assert observe_outputs(torch.nn.Linear(2, 2), 8) is None


def test_saving_goes_on_beside_the_engine(tmp_path: Path) -> None:
    file = StatisticsFile(tmp_path / "statistics", ExpertStatistics("f", 2, 4, 2), interval_seconds=0.0)
    assert file.is_due
    file.statistics.domain_index(DOMAIN)
    for tokens in (3, 4):
        file.statistics.num_tokens[0] = tokens
        file.save()
        until = time.monotonic() + 10
        while not file.is_due and time.monotonic() < until:
            time.sleep(0.01)
        assert read_statistics(tmp_path / "statistics").num_tokens.tolist() == [tokens]
