"""The summary of a store, and that a finished one costs no heavy import."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.manifest import write_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.inspection import print_summary, store_summary
from extractor.writing.prepare import prepare
from tests.expert_store.hand_made import write_store


def test_layers_with_different_experts_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path)
    summary = store_summary(tmp_path)
    assert summary["absent_experts"] == [[1, 3], [0, 2]]
    assert summary["shard_bytes"] == 2 * 4168
    print_summary(summary)
    text = capsys.readouterr().out
    assert "layer 0: 0,2" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "layer 1: 1,3" in text
    assert "all there" in text


def test_a_trunk_in_eight_bits_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_store(tmp_path)
    print_summary(store_summary(tmp_path))
    assert "8 (linear layers in FP8)" not in capsys.readouterr().out
    write_manifest(tmp_path, replace(plain, trunk_dtype="shipped"))
    print_summary(summary := store_summary(tmp_path))
    assert f"8 (linear layers in FP8) or {summary['trunk_bits']} of the trunk" in capsys.readouterr().out


def test_a_long_line_is_not_cut_where_no_terminal_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path)
    summary = store_summary(tmp_path) | {"store": "/a/long/path" * 20}
    print_summary(summary)
    assert summary["store"] in capsys.readouterr().out


def test_inspecting_needs_neither_torch_nor_transformers(repository: Path, tmp_path: Path) -> None:
    write_store(tmp_path)
    code = (
        "import sys; from extractor.writing.inspection import store_summary; "
        f"store_summary({str(tmp_path)!r}); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.strip() == "[]"


def test_a_finished_store_has_nothing_to_do_without_them(
    repository: Path, qwen_checkpoint: Path, tmp_path: Path
) -> None:
    prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest()).run()
    code = (
        "import sys; from extractor.cli import extract as cli; "
        f"cli.extract({str(qwen_checkpoint)!r}, {str(tmp_path / 'store')!r}); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert done.stdout.startswith("nothing to do: ")
    assert done.stdout.splitlines()[-1] == "[]"
