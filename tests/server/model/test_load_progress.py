"""One share of loading: it rises through every phase, whatever is left out or begins anew."""

from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.manifest import read_manifest
from server.model.load_progress import DEVICE_PHASES, LoadProgress, Phase, load_weights
from server.serving.loading import load
from server.settings.load import load_settings

A, B, C = Phase.TRUNK, Phase.SLOTS, Phase.WARMING


def shares_of(progress: LoadProgress, *reports: tuple[Phase, float]) -> list[float]:
    """The share of everything after each report."""
    shares = []
    for phase, share in reports:
        progress(phase, share)
        shares.append(progress.share)
    return shares


def test_each_phase_takes_its_part_of_the_whole() -> None:
    progress = LoadProgress({A: 1.0, B: 3.0})
    assert shares_of(progress, (A, 0.0), (A, 0.5), (A, 1.0)) == [0.0, 0.125, 0.25]
    assert shares_of(progress, (B, 0.0), (B, 0.5), (B, 1.0)) == [0.25, 0.625, 1.0]


def test_a_phase_is_done_when_the_next_one_begins() -> None:
    assert shares_of(LoadProgress({A: 1.0, B: 1.0}), (A, 0.0), (B, 0.0)) == [0.0, 0.5]


def test_what_is_left_out_is_made_up_for_by_what_comes() -> None:
    progress = LoadProgress({A: 1.0, Phase.READING: 5.0, B: 1.0, C: 2.0})
    progress.leave_out([C])
    first, begun, ended = shares_of(progress, (A, 1.0), (B, 0.0), (B, 1.0))
    assert first == begun == pytest.approx(1 / 7)
    assert ended == 1.0


def test_the_share_never_falls_where_loading_begins_anew_on_another_path() -> None:
    progress = LoadProgress({A: 1.0, Phase.CAPTURING: 1.0, B: 2.0})
    again = [(A, 1.0), (Phase.CAPTURING, 0.5), (A, 0.0), (A, 1.0), (A, 0.5), (B, 0.0), (C, 1.0), (B, 1.0)]
    shares = shares_of(progress, *again)
    assert shares == sorted(shares)
    assert 0.0 < shares[3] < shares[-1] == 1.0


def test_what_moves_more_bytes_weighs_more(tiny_store: Path) -> None:
    manifest = read_manifest(tiny_store)
    weights = load_weights(manifest)
    assert list(weights)[:3] == [Phase.STARTING, Phase.OPENING, Phase.PROVING]
    assert set(DEVICE_PHASES) < set(weights)
    fewer = load_weights(manifest, num_slots=len(manifest.deep_experts) // 4)
    assert fewer[Phase.READING] == pytest.approx(weights[Phase.READING] / 4, rel=0.01)
    assert fewer[Phase.TRUNK] == weights[Phase.TRUNK]
    larger = load_weights(replace(manifest, trunk=manifest.trunk * 4))
    assert larger[Phase.TRUNK] > weights[Phase.TRUNK]


def test_a_store_that_is_loaded_tells_one_share_that_rises(tiny_store: Path) -> None:
    told: list[tuple[float, Phase | None]] = []
    settings = load_settings({"store": str(tiny_store), "device": "cpu", "slots": 64}, environ={}).settings
    model = load(settings, LoadProgress(on_change=lambda now: told.append((now.share, now.phase))))
    model.engine.stop(0.0)
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert told[0] == (0.0, Phase.STARTING)
    later = [share for share, doing in told if doing in (Phase.TRUNK, Phase.SLOTS)]
    assert all(0.5 < share <= 1.0 for share in later), "they come after the imports, which weigh most here"
