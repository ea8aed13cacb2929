"""The commands as a user types them: what they print, and with which status they end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import run
from tests.extractor.checkpoints import save_checkpoint
from tests.extractor.packed import save_packed_checkpoint


def test_extract_inspect_and_verify(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    status, out, err = run("extract", qwen_checkpoint, store, "--keep", "50%")
    assert status == 0
    assert "holds 3 of 6 deep experts of 2 layers" in out
    assert "extracting: " in err
    assert "left" in err
    status, out, _ = run("inspect", store)
    assert status == 0
    for text in ("Qwen3MoeForCausalLM", "3 of 6", "0-2 in every layer", "gate_up_proj [48, 32] BF16"):
        assert text in " ".join(out.split())
    status, out, _ = run("verify", store, "--against", qwen_checkpoint)
    assert status == 0
    assert "bit for bit" in out


def test_json_is_the_only_thing_on_standard_output(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    dry = json.loads(run("extract", qwen_checkpoint, store, "--count", "2", "--dry-run", "--json")[1])
    assert dry["status"] == "dry run"
    assert not store.exists()
    done = json.loads(run("extract", qwen_checkpoint, store, "--count", "2", "--json")[1])
    assert done["status"] == "extracted"
    assert done["written_bytes"] == dry["written_bytes"] == dry["total_bytes"]
    again = json.loads(run("extract", qwen_checkpoint, store, "--count", "2", "--json")[1])
    assert (again["status"], again["written_bytes"]) == ("nothing to do", 0)
    summary = json.loads(run("inspect", store, "--json")[1])
    assert summary["num_deep_experts"] == 2
    assert summary["absent_experts"] == [[2, 3, 4, 5], [2, 3, 4, 5]]
    assert summary["damaged_files"] == []
    assert json.loads(run("verify", store, "--json")[1])["status"] == "intact"


def test_what_is_dequantised_is_told_and_bits_are_shown(tmp_path: Path) -> None:
    checkpoint = save_packed_checkpoint(tmp_path / "checkpoint", "gptq act-order")
    status, out, err = run("extract", checkpoint, tmp_path / "store", "--dry-run", "--json")
    result = json.loads(out)
    told = "gate_up_proj of the experts is dequantised to BF16: its columns are in the order of activations"
    assert (status, result["encodings"]) == (0, {"down_proj": "int4 in groups of 32 with zero points"})
    assert [note.startswith(told) for note in result["notes"]] == [True]
    assert f"NOTE: {told}" in err
    status, out, err = run("extract", checkpoint, tmp_path / "store")
    assert f"experts at {result['expert_bits']:.4g} bits a weight" in out
    status, _, err = run("extract", checkpoint, tmp_path / "store", "--experts-dtype", "16bit")
    assert status != 0
    assert "holds experts with --experts-dtype shipped, wanted 16bit" in err


def test_a_dry_run_says_sizes_and_writes_nothing(qwen_checkpoint: Path, tmp_path: Path) -> None:
    status, out, _ = run("extract", qwen_checkpoint, tmp_path / "store", "--experts", "0-1,5", "--dry-run")
    assert status == 0
    assert "would hold 3 of 6 deep experts of 2 layers" in out
    assert "nothing was written" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts", "9"], "expert 9 does not exist"),
        (["--keep", "no"], "is not a share"),
        (["--budget", "1KiB"], "does not hold the trunk and one deep expert"),
        (["--budget", "much"], "is not a size"),
        (["--plan", "absent.json"], "cannot be read"),
        (["--count", "1", "--keep", "50%"], "contradict each other"),
        (["--budget", "1" * 400], "is not a size"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(
    qwen_checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    status, out, err = run("extract", qwen_checkpoint, tmp_path / "store", *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()


def test_no_checkpoint_and_no_store_are_one_message(qwen_checkpoint: Path, tmp_path: Path) -> None:
    assert run("extract", tmp_path / "absent", tmp_path / "store")[0] == 2
    (tmp_path / "empty").mkdir()
    mistakes = {
        tmp_path / "absent": "does not exist; `deepfew extract CHECKPOINT",
        tmp_path / "empty": "holds no manifest.json",
        qwen_checkpoint: f"is a checkpoint, not a store: make a store of it with `deepfew extract {qwen_checkpoint} ",
    }
    for name in ("inspect", "verify", "serve", "chat"):
        for directory, message in mistakes.items():
            status, _, err = run(name, directory)
            assert status == 2
            assert message in err
            assert err.count("\n") == 1


def test_a_damaged_store_is_shown_told_and_repaired(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("extract", qwen_checkpoint, store, "--count", "2")
    shard = store / "experts/deep-00001.safetensors"
    os.truncate(shard, 100)
    assert "missing or of the wrong size: experts/deep-00001.safetensors" in " ".join(run("inspect", store)[1].split())
    status, _, err = run("verify", store)
    assert status == 2
    assert "deep-00001" in err
    assert run("extract", qwen_checkpoint, store, "--count", "2")[0] == 0
    assert run("verify", store)[0] == 0


def test_a_store_that_differs_from_a_checkpoint_is_status_2(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "store", save_checkpoint(tmp_path / "other", "qwen3_moe", seed=1)
    run("extract", qwen_checkpoint, store, "--count", "1")
    status, _, err = run("verify", store, "--against", other)
    assert status == 2
    assert "differ" in err


def test_what_cannot_be_compared_with_is_told_before_the_store_is_hashed(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "store", save_checkpoint(tmp_path / "other", "olmoe")
    run("extract", qwen_checkpoint, store, "--count", "1")
    for against in (tmp_path / "absent", other):
        status, _, err = run("verify", store, "--against", against)
        assert status == 2
        assert "verifying" not in err


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_checkpoint_that_could_serve_nobody_is_refused_also_in_a_dry_run(
    qwen_checkpoint: Path, tmp_path: Path, options: list[str]
) -> None:
    checkpoint = Path(shutil.copytree(qwen_checkpoint, tmp_path / "silent"))
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    status, out, err = run("extract", checkpoint, tmp_path / "store", *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {checkpoint} has no tokenizer")
    assert not (tmp_path / "store").exists()


def test_weights_that_are_not_read_are_told(qwen_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(qwen_checkpoint, tmp_path / "two"))
    shutil.copy(save_checkpoint(tmp_path / "one", "qwen3_moe") / "model.safetensors", checkpoint)
    status, _, err = run("extract", checkpoint, tmp_path / "store", "--dry-run")
    assert status == 0
    assert "WARNING: ignored model.safetensors.index.json, model-00001-of-" in err
    assert run("extract", qwen_checkpoint, tmp_path / "store", "--dry-run")[2] == ""


def test_an_interrupt_says_that_the_same_command_continues(
    qwen_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("extractor.writing.extract.Extraction.run", interrupt)
    status, _, err = run("extract", qwen_checkpoint, tmp_path / "store")
    assert status == 130
    assert "the same command continues" in err


@pytest.mark.exhaustive
def test_the_module_is_the_command(repository: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "extract", tiny_checkpoint, tmp_path / "store", "--count", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert "holds 1 of 64 deep experts of 8 layers" in done.stdout


def test_a_plan_names_the_encoding_that_extraction_makes(qwen_checkpoint: Path, tmp_path: Path) -> None:
    document = {
        "format": "deepfew-plan",
        "version": 1,
        "alignment": {"kind": "index"},
        "num_layers": 2,
        "num_experts": 6,
        "experts_dtype": "int4-int8",
        "deep_experts": [{"experts": [expert, expert]} for expert in (4, 1)],
    }
    plan, store = tmp_path / "plan.json", tmp_path / "store"
    plan.write_text(json.dumps(document))
    status, out, _ = run("extract", qwen_checkpoint, store, "--plan", plan)
    assert status == 0
    assert "(int4-int8, made by weight error alone)" in out
    assert "int4-int8 by deepfew, errors by weight error alone" in " ".join(run("inspect", store)[1].split())
    assert run("verify", store, "--against", qwen_checkpoint)[0] == 0
    status, _, err = run("extract", qwen_checkpoint, store, "--plan", plan, "--experts-dtype", "fp8")
    assert status == 2
    assert "--experts-dtype fp8 and --plan, which is for int4-int8, contradict each other" in err
    plan.write_text(json.dumps(document | {"experts_dtype": "int3"}))
    status, _, err = run("extract", qwen_checkpoint, store, "--plan", plan)
    assert status == 2
    assert "experts_dtype is 'int3', wanted one of shipped, 16bit" in err
