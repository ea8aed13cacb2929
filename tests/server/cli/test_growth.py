"""`deepfew shrink`, and `deepfew grow` after a growth that was broken off, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expert_store.manifest import read_manifest
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.ledger import UsageLedger
from server.cli.main import main
from server.growth.store import grow_store


@pytest.fixture
def store(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A store of 12 deep experts, of which the later ones were wanted less."""
    path = tmp_path / "store"
    prepare(Checkpoint.open(tiny_checkpoint), path, SelectionRequest(experts="0-11")).run()
    ledger = UsageLedger(8, 64, read_manifest(path).source.fingerprint)
    for expert in range(12):
        ledger.demand_mass[:, expert] = 12.0 - expert
    (path / "usage.json").write_text(json.dumps(ledger.to_json()))
    return path


def test_shrink_gives_up_what_was_wanted_least(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shrink", str(store), "--count", "2", "--dry-run"]) == 0
    assert "would give up 2 deep experts" in capsys.readouterr().out
    assert len(read_manifest(store).deep_experts) == 12
    assert main(["shrink", str(store), "--count", "2", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [one["index"] for one in done["removed"]] == [10, 11]
    assert done["freed_bytes"] == sum(one["bytes"] for one in done["removed"])
    assert len(list((store / "experts").iterdir())) == 10


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_count_below_one_adds_nothing(store: Path, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grow", str(store), "--count", count]) == 2
    assert "--count" in capsys.readouterr().err
    assert len(read_manifest(store).deep_experts) == 12


def test_files_that_had_to_stay_are_removed_by_the_command_alone(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store.open(store):
        assert main(["shrink", str(store), "--deep", "3, 5"]) == 0
        assert "the files stay while somebody reads the store" in capsys.readouterr().out
    assert len(list((store / "experts").iterdir())) == 12
    assert main(["shrink", str(store)]) == 0
    assert "freed " in capsys.readouterr().out
    assert len(list((store / "experts").iterdir())) == 10


def test_grow_finishes_what_was_broken_off(
    store: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow_store(store, str(tiny_checkpoint), [(40,) * 8], stop)
    assert main(["grow", str(store)]) == 0
    assert "a growth that was broken off is finished first" in capsys.readouterr().out
    assert read_manifest(store).deep_experts[-1].experts == (40,) * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count is 0"),
        (["--count", "5"], "give up at most 4"),
        (["--count", "1", "--deep", "1"], "contradict"),
        (["--deep", "1,x"], "--deep is '1,x'"),
        (["--deep", "12"], "no deep expert 12"),
        (["--count", "1", "--usage", "/does/not/exist"], "no demand is known"),
    ],
)
def test_mistakes_are_one_message_and_change_nothing(
    store: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shrink", str(store), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert len(read_manifest(store).deep_experts) == 12
