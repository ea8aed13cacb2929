from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save

from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.sample import KeyedSample, item_keys
from extractor.statistics.statistics import TOTALS, EncodingPoint, ExpertStatistics, StatisticsError, merge_all
from tests.extractor.selection_statistics import make_statistics


def assert_equal(one: ExpertStatistics, other: ExpertStatistics) -> None:
    assert one.domains == other.domains
    assert np.array_equal(one.num_tokens, other.num_tokens)
    for name in TOTALS:
        assert np.array_equal(one.totals[name], other.totals[name]), name
    assert np.array_equal(one.coactivation, other.coactivation)
    for mine, theirs in ((one.windows, other.windows), (one.tokens, other.tokens)):
        assert np.array_equal(mine.keys, theirs.keys)
        assert np.array_equal(mine.domains, theirs.domains)
        for name, array in mine.arrays.items():
            assert np.array_equal(array, theirs.arrays[name]), name
    assert one.price == other.price
    assert one.encodings == other.encodings


def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    statistics = make_statistics()
    statistics.weight_flatness = np.random.default_rng(0).random((3, 8))
    statistics.encodings = [EncodingPoint("code", "int4", 900, 0.003, 256)]
    path = tmp_path / "deep" / "stats.safetensors"
    write_statistics(path, statistics)
    loaded = read_statistics(path)
    assert_equal(loaded, statistics)
    assert loaded.weight_flatness is not None
    assert np.array_equal(loaded.weight_flatness, statistics.weight_flatness)
    assert (loaded.expert_bytes, loaded.trunk_bytes) == (3000, 1000)


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_statistics(tmp_path / "stats", make_statistics())
    assert (tmp_path / "stats").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_merging_is_the_same_in_any_order_and_adds_domains_by_name() -> None:
    parts = [make_statistics(seed=seed) for seed in range(3)]
    parts.append(make_statistics(seed=9, domains=("chat",)))
    parts[0].encodings = [EncodingPoint("code", "int4", 900, 0.003, 256)]
    forward = merge_all(parts)
    backward = merge_all(reversed(parts))
    assert forward.domains == ["code", "chat"]
    assert backward.domains == ["chat", "code"]
    assert forward.num_tokens.tolist() == [768, 1024]
    assert forward.encodings == backward.encodings == parts[0].encodings
    for name in TOTALS:
        assert np.allclose(forward.totals[name], backward.totals[name][::-1], rtol=1e-12)
    assert np.array_equal(forward.totals["picks"], backward.totals["picks"][::-1])
    mine = np.sort(forward.tokens.keys[forward.tokens.of([0])])
    assert np.array_equal(mine, np.sort(backward.tokens.keys[backward.tokens.of([1])]))


def test_statistics_of_another_checkpoint_are_refused() -> None:
    with pytest.raises(StatisticsError, match="cannot be added"):
        make_statistics().merge(ExpertStatistics("other", 3, 8, 2))
    with pytest.raises(StatisticsError, match="no statistics to merge"):
        merge_all([])


def test_a_sample_of_parts_is_the_sample_of_the_whole_and_repeats_count_once() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**63, size=100).astype(np.uint64)
    domains = np.arange(100) % 3
    values = np.arange(100, dtype=np.float32)[:, None]

    def sample(order: np.ndarray, chunk: int) -> KeyedSample:
        made = KeyedSample(7, {"value": ((1,), np.float32)})
        for start in range(0, len(order), chunk):
            some = order[start : start + chunk]
            made.offer(keys[some], domains[some], {"value": values[some]})
        return made

    whole = sample(np.arange(100), 100)
    parts = sample(rng.permutation(np.concatenate([np.arange(100), np.arange(50)])), 11)
    assert len(whole) == 21
    assert np.array_equal(whole.keys, parts.keys)
    assert np.array_equal(whole.arrays["value"], parts.arrays["value"])
    assert all(whole.of([domain]).sum() == 7 for domain in range(3))


def test_item_keys_differ_by_text_and_position() -> None:
    keys = np.concatenate([item_keys(text, np.arange(1000)) for text in (0, 1, 2**64 - 1)])
    assert len(np.unique(keys)) == 3000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no safetensors"), "is no statistics file"),
        (lambda path: save_file({"x": np.zeros(1)}, path), "wanted deepfew-statistics version 1"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is no statistics file"),
        (lambda path: torch_save({"w": torch.zeros(2, dtype=torch.bfloat16)}, path), "wanted deepfew-statistics"),
    ],
)
def test_a_file_that_is_no_statistics_is_refused_with_its_name(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "stats.safetensors"
    write_statistics(path, make_statistics())
    damage(path)  # type: ignore[operator]
    with pytest.raises(StatisticsError, match=message) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value)


def test_an_unknown_domain_is_named_with_those_that_exist() -> None:
    with pytest.raises(StatisticsError, match="'poems' is not in the statistics, which have: code, chat"):
        make_statistics().total("picks", ["poems"])
