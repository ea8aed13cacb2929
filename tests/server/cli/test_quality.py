import json
from pathlib import Path

import pytest

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.ledger import UsageLedger
from server.cli.main import main

TEXTS = Path(__file__).parents[3] / "benchmarks" / "data" / "selection"


def test_from_texts_to_a_plan_to_a_store_that_serves_them(
    tiny_checkpoint: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats, plan, store = tmp_path / "stats.safetensors", tmp_path / "plan.json", tmp_path / "store"
    small = ["--context", "96", "--max-tokens", "192"]
    assert main(["calibrate", str(tiny_checkpoint), str(stories), "--out", str(stats), *small, "--price", "96"]) == 0
    assert "192 tokens" in capsys.readouterr().out
    assert main(["plan", "--stats", str(stats), "--keep", "50%", "--out", str(plan)]) == 0
    assert main(["extract", str(tiny_checkpoint), str(store), "--plan", str(plan)]) == 0
    assert len(read_manifest(store).deep_experts) == 32
    capsys.readouterr()
    arguments = ["--texts", str(stories), "--reference", str(tiny_checkpoint), *small, "--json"]
    assert main(["evaluate", str(store), *arguments]) == 0
    (text,) = json.loads(capsys.readouterr().out)["texts"].values()
    assert 0.9 < text["ratio"] < 1.1
    assert 0.0 < text["deficit"] < 0.3


def test_an_interrupted_calibration_of_a_checkpoint_does_not_extract_again(
    tiny_checkpoint: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []

    def watched(*arguments: object) -> object:
        work = prepare(*arguments)  # type: ignore[arg-type]
        left.append(work.remaining_bytes)
        return work

    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("extractor.writing.prepare.prepare", watched)
    stats = tmp_path / "stats.safetensors"
    command = ["calibrate", str(tiny_checkpoint), str(stories), "--out", str(stats), "--context", "96"]
    command += ["--max-tokens", "96", "--price", "0", "--no-weights"]
    with monkeypatch.context() as patched:
        patched.setattr("server.quality.calibration.run_batch", interrupted)
        assert main(command) == 130
    (store,) = tmp_path.glob("stats.safetensors.store-*")
    assert len(read_manifest(store).deep_experts) == 64
    assert main(command) == 0
    assert left[0] > 0
    assert left[1:] == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.safetensors", "stories.txt"]


def test_grow_adds_what_was_wanted_and_missing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    prepare(Checkpoint.open(tiny_checkpoint), store, SelectionRequest(experts="0-3")).run()
    ledger = UsageLedger(8, 64, read_manifest(store).source.fingerprint)
    ledger.demand_mass[:, 40] = 5.0
    ledger.demand_mass[:, 0] = 9.0
    (store / "usage.json").write_text(json.dumps(ledger.to_json()))
    assert main(["grow", str(store), "--dry-run"]) == 0
    assert "would add 1 deep expert" in capsys.readouterr().out
    assert len(read_manifest(store).deep_experts) == 4
    assert main(["grow", str(store), "--from", str(tiny_checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["added"][0]["experts"] == [40] * 8
    assert read_manifest(store).deep_experts[4].experts == (40,) * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "missing", "missing.txt", "--out", "stats"], "missing.txt: no text is there"),
        (["evaluate", "missing"], "nothing to measure"),
        (["evaluate", "missing", "--texts", "x", "--half", "third"], "'third' is not one of 'all', 'even', 'odd'"),
        (["evaluate", "missing", "--texts", "x", "--prefix", "y"], "--prefix stands before questions"),
        (["evaluate", "missing", "--texts", __file__, "--plot", "x.png"], "--plot draws what --stats compares"),
        (["evaluate", "missing", "--texts", __file__, "--criteria", "magic"], "--criteria: there is no 'magic'"),
        (["calibrate", "missing", __file__, "--out", str(TEXTS)], f"--out {TEXTS} is a directory"),
        (["calibrate", "missing", __file__, "--out", "x", "--max-tokens", "0"], "--max-tokens"),
        (["calibrate", "missing", __file__, "--out", "x", "--price", "-1"], "--price"),
        (["grow", "missing"], "missing"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "'tpu' is no device; write auto, cpu, cuda"),
        (["--device", "meta"], "'meta' is no device; write auto, cpu, cuda"),
        (["--dtype", "int4"], "'int4' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        (["--context", "1000000"], "--context is 1000000, wanted at most the model's"),
        (["--encodings", "int4,int5"], "--encodings: there is no 'int5', wanted some of fp8"),
        (["--encodings", "int4"], "--encodings makes experts of the checkpoint, and"),
        ([], "holds only a part of its checkpoint's experts"),
    ],
)
def test_what_a_store_cannot_be_calibrated_with_is_one_message(
    tiny_checkpoint: Path,
    stories: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    prepare(Checkpoint.open(tiny_checkpoint), store, SelectionRequest(experts="0-7")).run()
    assert main(["calibrate", str(store), str(stories), "--out", str(tmp_path / "stats"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "stats").exists()
