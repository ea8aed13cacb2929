"""One share of loading: it rises through every phase, whatever is left out or begins anew."""

from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.manifest import read_manifest
from server.serving.load_progress import DEVICE_PHASES, READING, SLOTS, STARTING, TRUNK, LoadProgress, load_weights
from server.serving.loading import load
from server.settings.load import load_settings


def test_each_phase_takes_its_part_of_the_whole() -> None:
    progress = LoadProgress({"a": 1.0, "b": 3.0})
    assert [progress.at("a", share) for share in (0.0, 0.5, 1.0)] == [0.0, 0.125, 0.25]
    assert [progress.at("b", share) for share in (0.0, 0.5, 1.0)] == [0.25, 0.625, 1.0]


def test_a_phase_is_done_when_the_next_one_begins() -> None:
    progress = LoadProgress({"a": 1.0, "b": 1.0})
    progress.at("a", 0.0)
    assert progress.at("b", 0.0) == 0.5


def test_what_is_left_out_is_made_up_for_by_what_comes() -> None:
    progress = LoadProgress({"a": 1.0, "skipped": 5.0, "b": 1.0, "never": 2.0})
    progress.leave_out(["never"])
    first = progress.at("a", 1.0)
    assert first == pytest.approx(1 / 7)
    assert progress.at("b", 0.0) == pytest.approx(first)
    assert progress.at("b", 1.0) == 1.0


def test_the_share_never_falls_where_loading_begins_anew_on_another_path() -> None:
    progress = LoadProgress({"trunk": 1.0, "capture": 1.0, "slots": 2.0})
    shares = [progress.at(*step) for step in (("trunk", 1.0), ("capture", 0.5), ("trunk", 0.0), ("trunk", 1.0))]
    shares += [progress.at("trunk", 0.5), progress.at("slots", 0.0), progress.at("unheard of", 1.0)]
    shares.append(progress.at("slots", 1.0))
    assert shares == sorted(shares)
    assert 0.0 < shares[3] < shares[-1] == 1.0


def test_what_moves_more_bytes_weighs_more(tiny_store: Path) -> None:
    manifest = read_manifest(tiny_store)
    weights = load_weights(manifest)
    assert list(weights)[:3] == [STARTING, "opening the store", TRUNK]
    assert set(DEVICE_PHASES) < set(weights)
    fewer = load_weights(manifest, num_slots=len(manifest.deep_experts) // 4)
    assert fewer[READING] == pytest.approx(weights[READING] / 4, rel=0.01)
    assert fewer[TRUNK] == weights[TRUNK]
    larger = load_weights(replace(manifest, trunk=manifest.trunk * 4))
    assert larger[TRUNK] > weights[TRUNK]


def test_a_store_that_is_loaded_tells_one_share_that_rises(tiny_store: Path) -> None:
    told: list[tuple[float, str]] = []
    settings = load_settings({"store": str(tiny_store), "device": "cpu", "slots": 64}, environ={}).settings
    model = load(settings, lambda share, doing: told.append((share, doing)))
    model.engine.stop(0.0)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert told[0] == (0.0, STARTING)
    later = [share for share, doing in told if doing in (TRUNK, SLOTS)]
    assert all(0.5 < share <= 1.0 for share in later), "they come after the imports, which weigh most here"
