import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import server.quality.calibration as module
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.quantised import read_part
from extractor.planning.selection import SelectionRequest
from extractor.statistics.statistics import TOTALS, ExpertStatistics, StatisticsError
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.batches import batches, losses, run_batch, token_sequences
from server.quality.calibration import CalibrationOptions, calibrate, observed
from server.quality.price import with_wrong_experts
from server.quality.sequence_statistics import weight_flatness
from server.quality.texts import (
    Domain,
    TextOptions,
    TextsError,
    documents,
    find_domains,
    pack_sequences,
    sequence_key,
)
from tests.extractor.packed import save_packed_checkpoint

OPTIONS = CalibrationOptions(TextOptions(context=48, max_tokens=144), price_tokens=48, with_weights=False)


@pytest.fixture
def texts(tmp_path: Path) -> list[Domain]:
    stories = "Once upon a time there was a little boy named Jack. He lived in the meadow with his mother. " * 6
    (tmp_path / "stories.txt").write_text(stories + "\n<|endoftext|>\n" + stories[::-1])
    (tmp_path / "facts.jsonl").write_text('{"text": "The capital of France is Paris. 3 + 4 = 7. "}\n' * 20)
    return find_domains([str(tmp_path / "stories.txt"), f"trivia={tmp_path / 'facts.jsonl'}"])


def test_observing_changes_nothing_and_ends_with_the_context(selective: Callable[..., SelectiveModel]) -> None:
    model = selective(num_slots=9)
    tokens = [list(range(100, 130))]
    plain = run_batch(model, tokens).logits
    with observed(model) as observer:
        assert torch.equal(run_batch(model, tokens).logits, plain)
        outputs = observer.take()
    assert outputs is not None
    assert outputs.norms.shape == (8, 30, 8)
    assert outputs.changes.shape == (8, 30)
    assert (outputs.norms > 0).all()
    run_batch(model, tokens)
    assert observer.take() is None


def test_observed_outputs_are_those_of_stock_experts(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel
) -> None:
    model = selective()
    tokens = list(range(200, 212))
    seen: list[torch.Tensor] = []
    experts = stock.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    with torch.inference_mode():
        stock(input_ids=torch.tensor([tokens]))
    hook.remove()
    hidden, index, weights = (tensor.clone() for tensor in seen)
    gate, up = torch.einsum("th,tkih->tki", hidden, experts.gate_up_proj[index]).chunk(2, dim=-1)
    wanted = torch.einsum("tki,tkhi->tkh", experts.act_fn(gate) * up, experts.down_proj[index]).detach()
    changed = 1 - torch.cosine_similarity(hidden, hidden + (wanted * weights[:, :, None]).sum(dim=1))
    with observed(model) as observer:
        output = run_batch(model, [tokens])
        outputs = observer.take()
    assert outputs is not None
    assert np.array_equal(output.record.served_index[0], index.numpy())
    assert np.allclose(outputs.norms[0], wanted.norm(dim=-1).numpy(), rtol=1e-3, atol=1e-5)
    assert np.allclose(outputs.changes[0], changed.numpy(), rtol=1e-3, atol=1e-6)


def test_squares_by_channel_are_those_of_stock_experts(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel, texts: list[Domain]
) -> None:
    statistics = calibrate(selective(num_slots=9), texts[:1], replace(OPTIONS, price_tokens=0))
    assert statistics.channels is not None
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = stock.model.layers[2].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    for tokens in token_sequences(selective(), texts[0], OPTIONS.text):
        with torch.inference_mode():
            stock(input_ids=torch.tensor([tokens]))
    hook.remove()
    hidden, index = (torch.cat([one[at] for one in seen]).clone() for at in (0, 1))
    expert = int(index.flatten().mode().values)
    gate, up = (hidden[(index == expert).any(dim=1)] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    inner = (experts.act_fn(gate) * up).detach()
    assert np.allclose(statistics.channels.input[2], hidden.square().sum(dim=0).numpy(), rtol=1e-4)
    assert np.allclose(statistics.channels.inner[2][expert], inner.square().sum(dim=0).numpy(), rtol=1e-3)
    assert np.array_equal(statistics.channels.picks, statistics.total("picks"))


def test_sequences_in_a_batch_are_those_alone(selective: Callable[..., SelectiveModel]) -> None:
    model = selective()
    rng = np.random.default_rng(0)
    several = [[int(token) for token in rng.integers(5, 8000, size=length)] for length in (40, 40, 33)]
    assert [len(batch) for batch in batches(model, several)] == [2, 1]
    together = run_batch(model, several[:2])
    for at in range(2):
        alone = run_batch(model, [several[at]])
        assert torch.allclose(together.logits[at], alone.logits[0], atol=1e-4)
        assert np.array_equal(together.record_of(at).served_index, alone.record.served_index)
    values = losses(together.logits, several[:2])
    wanted = torch.nn.functional.cross_entropy(together.logits[0, :-1], torch.tensor(several[0][1:]))
    assert values.shape == (2, 39)
    assert values[0].mean() == pytest.approx(float(wanted), rel=1e-5)


def test_statistics_add_up(selective: Callable[..., SelectiveModel], texts: list[Domain]) -> None:
    statistics = calibrate(selective(num_slots=10), texts, OPTIONS)
    assert statistics.domains == ["stories", "trivia"]
    tokens = statistics.num_tokens[:, None]
    assert np.array_equal(statistics.totals["picks"].sum(axis=2), np.tile(tokens * 8, (1, 8)))
    assert np.allclose(statistics.totals["demand_mass"].sum(axis=2), np.tile(tokens, (1, 8)))
    assert (statistics.totals["missing"] == 0).all()
    assert (statistics.totals["gate_output_norm"] <= statistics.totals["output_norm"] + 1e-9).all()
    assert np.allclose(statistics.coactivation.sum(axis=(1, 2)), statistics.num_tokens.sum() * 64)
    assert len(statistics.tokens) == statistics.num_tokens.sum()
    assert {point.domain for point in statistics.price} == {"stories", "trivia"}
    assert all(point.deficit > 0 for point in statistics.price)
    largest_own = max(point.deficit for point in statistics.price if point.kept_share > 0.125)
    assert max(point.deficit for point in statistics.price) > 1.5 * largest_own, "wrong experts miss more"


def interrupted_at_second(calls: list[int]) -> Callable[..., object]:
    """`run_batch` that is interrupted when it is called for the second time; every call is noted in `calls`."""

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_batch(*arguments)  # type: ignore[arg-type]

    return interrupted


def assert_same(one: ExpertStatistics, other: ExpertStatistics) -> None:
    for name in TOTALS:
        assert np.allclose(one.totals[name], other.totals[name]), name
    assert np.array_equal(one.tokens.keys, other.tokens.keys)
    assert np.array_equal(one.num_tokens, other.num_tokens)
    assert one.channels is not None
    assert other.channels is not None
    assert np.array_equal(one.channels.picks, other.channels.picks)
    assert all(np.allclose(*pair) for pair in zip(one.channels.inner, other.channels.inner, strict=True))


def test_an_interrupted_calibration_continues_and_ends_the_same(
    selective: Callable[..., SelectiveModel], texts: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = selective()
    options = replace(OPTIONS, price_tokens=0)
    whole = calibrate(model, texts, options)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    calls: list[int] = []
    interrupted = interrupted_at_second(calls)
    monkeypatch.setattr(module, "run_batch", interrupted)
    folder = tmp_path / "resume"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, options, folder)
    assert (folder / "resume.json").exists()
    assert_same(calibrate(model, texts, options, folder), whole)
    assert len(calls) < 2 + 2 * 2, "what was done must not run again"
    assert not folder.exists()


def test_encodings_are_measured_on_the_calibrated_text_and_an_interruption_repeats_none(
    selective: Callable[..., SelectiveModel], texts: list[Domain], tmp_path: Path
) -> None:
    """Two stand-ins for models in encodings: the same model, and one whose experts are 0."""
    model = selective()
    options = CalibrationOptions(TextOptions(context=48, max_tokens=48), 0, False, ("int8", "int4"))
    opened: list[str] = []

    def encoded(name: str) -> AbstractContextManager[SelectiveModel]:
        opened.append(name)
        if name == "int4" and len(opened) == 2:
            raise KeyboardInterrupt
        other = selective()
        if name == "int4":
            for pool in other.cache.pools:
                pool.params["down_proj"].zero_()
        return nullcontext(other)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, options, tmp_path / "resume", encoded=encoded)
    found = calibrate(model, texts, options, tmp_path / "resume", encoded=encoded)
    assert opened == ["int8", "int4", "int4"]
    assert [(one.domain, one.experts_dtype) for one in found.encodings] == [
        (domain, name) for name in ("int8", "int4") for domain in ("stories", "trivia")
    ]
    (shard,) = {deep.bytes for deep in model.store.manifest.deep_experts}
    assert {one.expert_bytes for one in found.encodings} == {shard}
    assert {one.num_tokens for one in found.encodings} == {47}
    assert [one.loss_change for one in found.encodings[:2]] == [0.0, 0.0]
    assert all(one.loss_change > 0.5 for one in found.encodings[2:])


def test_an_interrupted_calibration_of_texts_that_changed_since_begins_anew(
    selective: Callable[..., SelectiveModel], texts: list[Domain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of the same length, so that their size does not tell."""
    model = selective()
    options = replace(OPTIONS, price_tokens=0)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    calls: list[int] = []
    interrupted = interrupted_at_second(calls)
    folder = tmp_path / "resume"
    with monkeypatch.context() as patched:
        patched.setattr(module, "run_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, texts, options, folder)
    assert (folder / "resume.json").exists()
    (changed,) = texts[0].files
    changed.write_text(changed.read_text().swapcase())
    assert_same(calibrate(model, texts, options, folder), calibrate(model, texts, options))


def test_weight_flatness_is_that_of_the_checkpoint(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel
) -> None:
    experts = stock.model.layers[3].mlp.experts
    weights = torch.cat([experts.gate_up_proj[5].flatten(), experts.down_proj[5].flatten()]).detach()
    wanted = float(weights.abs().mean() / weights.square().mean().sqrt())
    assert weight_flatness(selective().store)[3, 5] == pytest.approx(wanted, rel=1e-5)


def test_weight_flatness_of_experts_in_fewer_bits_is_that_of_their_values(tmp_path: Path) -> None:
    opened = Checkpoint.open(save_packed_checkpoint(tmp_path / "checkpoint", "int4 g32 asymmetric"))
    prepare(opened, tmp_path / "store", SelectionRequest()).run()
    names = [f"model.layers.2.mlp.experts.5.{name}_proj.weight" for name in ("gate", "up", "down")]
    weights = torch.cat([read_part(opened.tensors[name]).float().flatten() for name in names])
    wanted = float(weights.abs().mean() / weights.square().mean().sqrt())
    with Store.open(tmp_path / "store") as store:
        assert weight_flatness(store)[1, 5] == pytest.approx(wanted, rel=1e-3)  # theirs are rounded to bfloat16


def test_documents_are_split_and_halved(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n\n<|endoftext|>\nthree")
    (domain,) = find_domains([str(path)])
    assert list(documents(domain)) == ["one", "two\nlines", "three"]
    assert list(documents(domain, "even")) == ["one", "three"]
    assert list(documents(domain, "odd")) == ["two\nlines"]


def test_documents_are_packed_with_a_separator_and_short_ends_dropped() -> None:
    found = list(pack_sequences(["abc", "de"], lambda text: [ord(letter) for letter in text] * 10, 0, 40))
    assert found[0][:4] == [0, 97, 98, 99]
    assert [len(tokens) for tokens in found] == [40]
    assert sequence_key(found[0]) != sequence_key(found[0][::-1])


def test_a_long_document_is_cut_into_several_and_nothing_of_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.quality.texts.MAX_DOCUMENT_CHARS", 10)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "abcdefghij" * 2 + "klm"}) + "\n" + json.dumps({"text": "short"}))
    assert list(documents(find_domains([str(path)])[0])) == ["abcdefghij", "abcdefghij", "klm", "short"]


def test_a_folder_is_a_domain_and_mistakes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    for name in ("b.txt", "a.txt", ".hidden"):
        (folder / name).write_text(name)
    (domain,) = find_domains([str(folder)])
    assert domain.name == "code"
    assert list(documents(domain)) == ["a.txt", "b.txt"]
    with pytest.raises(TextsError, match="no text is there"):
        find_domains([str(tmp_path / "missing")])
    with pytest.raises(TextsError, match="has no name; write NAME="):
        find_domains([f"={folder}"])
    with pytest.raises(TextsError, match="two texts are called 'code'"):
        find_domains([str(folder), f"code={folder}"])
    (folder / "bad.jsonl").write_text('{"words": 1}\n')
    with pytest.raises(TextsError, match='line 1: wanted a JSON object with the key "text"'):
        list(documents(find_domains([str(folder / "bad.jsonl")])[0]))
    (folder / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(TextsError, match="line 1: wanted a JSON object"):
        list(documents(find_domains([str(folder / "deep.jsonl")])[0]))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextsError, match="is not UTF-8"):
        list(documents(find_domains([str(folder / "latin.txt")])[0]))


def test_a_domain_of_a_few_words_is_told(selective: Callable[..., SelectiveModel], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(TextsError, match="domain short has fewer than 32 tokens"):
        calibrate(selective(), find_domains([str(tmp_path / "short.txt")]), CalibrationOptions())


@pytest.mark.parametrize("content", ["", "[1]", '{"work": 1', "{}"])
def test_a_damaged_note_of_what_was_done_is_told(
    selective: Callable[..., SelectiveModel], texts: list[Domain], tmp_path: Path, content: str
) -> None:
    (tmp_path / "resume.json").write_text(content)
    with pytest.raises(StatisticsError, match=r"cannot be continued .* delete it to start anew"):
        calibrate(selective(), texts, CalibrationOptions(), tmp_path)


def test_wrong_experts_take_the_places_of_right_ones_in_every_layer() -> None:
    right = ExpertMask.of(np.tile(np.arange(16) < 4, (2, 1)))
    for share, kept in ((0.01, 3), (0.5, 2), (1.0, 0)):
        wrong = with_wrong_experts(right, share)
        assert wrong.allowed.sum(axis=1).tolist() == [4, 4]
        assert (wrong.allowed & right.allowed).sum(axis=1).tolist() == [kept, kept]
    most = ExpertMask.of(np.tile(np.arange(16) < 15, (2, 1)))
    assert with_wrong_experts(most, 1.0).allowed.sum(axis=1).tolist() == [15, 15], "there is one other expert"
