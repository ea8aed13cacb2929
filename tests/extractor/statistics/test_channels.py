from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from extractor.statistics.channels import ChannelSquares
from extractor.statistics.file import read_statistics, write_statistics
from extractor.statistics.statistics import StatisticsError, merge_all
from tests.extractor.selection_statistics import NUM_EXPERTS, NUM_LAYERS, make_statistics


def make_channels(seed: int) -> ChannelSquares:
    """Layers of unlike widths; each expert but the last was seen."""
    rng = np.random.default_rng(seed)
    channels = ChannelSquares(NUM_LAYERS, NUM_EXPERTS)
    for layer in range(NUM_LAYERS):
        channels.add_input(layer, rng.random(16 + 8 * layer))
        for expert in range(NUM_EXPERTS - 1):
            channels.add_inner(layer, expert, rng.random(8 + layer), float(rng.integers(1, 9)))
    return channels


def assert_equal(one: ChannelSquares, other: ChannelSquares) -> None:
    assert np.allclose(one.picks, other.picks)
    for mine, theirs in ((one.input, other.input), (one.inner, other.inner)):
        assert all(np.allclose(a, b, rtol=1e-12) for a, b in zip(mine, theirs, strict=True))


def test_squares_survive_the_file_and_older_files_have_none(tmp_path: Path) -> None:
    statistics = make_statistics()
    write_statistics(tmp_path / "old", statistics)
    assert read_statistics(tmp_path / "old").channels is None
    statistics.channels = make_channels(0)
    write_statistics(tmp_path / "new", statistics)
    loaded = read_statistics(tmp_path / "new").channels
    assert loaded is not None
    assert_equal(loaded, statistics.channels)


def test_squares_of_several_files_add_up_in_any_order_and_survive_files_without() -> None:
    parts = [make_statistics(seed=seed) for seed in range(3)]
    parts[0].channels, parts[2].channels = make_channels(0), make_channels(2)
    wanted = make_channels(0)
    wanted.add(make_channels(2))
    for order in (parts, parts[::-1]):
        merged = merge_all(order).channels
        assert merged is not None
        assert_equal(merged, wanted)
    assert_equal(parts[0].channels, make_channels(0))


def test_squares_of_another_shape_are_refused(tmp_path: Path) -> None:
    statistics = make_statistics()
    statistics.channels = make_channels(0)
    path = tmp_path / "stats.safetensors"
    write_statistics(path, statistics)
    arrays = load_file(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    for name, value in (("channels.inner.1", np.zeros((2, 9))), ("channels.input.0", np.zeros((2, 2)))):
        save_file(arrays | {name: value}, path, metadata)
        with pytest.raises(StatisticsError, match=f"{name} has shape"):
            read_statistics(path)
