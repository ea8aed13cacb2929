"""`deepfew fit` as a user types it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.cli.main import main
from server.machine import probe as measuring
from server.machine.rates import known_machines

H100 = ["--machine", "h100"]


def _json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["fit", *arguments, "--json"]) == status
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_fit_says_places_speed_and_sources(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tiny_checkpoint), *H100, "--device-memory", "24GiB", "--slots-memory", "60%"]) == 0
    said = capsys.readouterr().out
    for part in (
        "fits: captured decoding",
        "KV memory",
        "host tier",
        "tokens/s",
        "DeepSeek-V2-Lite",
        "what would help",
    ):
        assert part in said


def test_the_json_has_every_figure_and_the_changes_with_theirs(
    tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, str(tiny_store), *H100, "--slots-memory", "60%", "--context", "512", "--batch", "4")
    assert found["fits"]
    assert found["wish"]["context"] == 512
    assert found["wish"]["rows"] == 4
    assert found["placement"]["slots"] < found["model"]["experts"]
    assert found["rates"]["from"] == "those of h100, as this project measured it"
    assert found["batch_tokens_per_second"] > found["tokens_per_second"] > 0
    assert {"change", "tokens_per_second", "placement"} <= set(found["changes"][0])


def test_without_triton_the_speed_of_another_machines_gpu_is_refused(
    tiny_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["fit", str(tiny_store), *H100, "--device-memory", "24GiB"]) == 2
    said = capsys.readouterr().err
    assert "pip install triton" in said
    assert said.count("\n") == 1


def test_a_model_that_does_not_fit_ends_with_status_1(tiny_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tiny_store), *H100, "--device-memory", "100MiB"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_rates_are_measured_once_and_kept_without_the_free_memory(
    tiny_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = replace(known_machines()["h100"], kind="cpu", host_memory=8 << 30)
    calls: list[torch.device] = []
    monkeypatch.setattr(measuring, "probe", lambda device, files: calls.append(device) or rates)
    monkeypatch.setattr(measuring, "free_host_bytes", lambda: 5 << 30)
    cpu = [str(tiny_store), "--device", "cpu"]
    assert "measured now" in _json(capsys, *cpu)["rates"]["from"]
    later = _json(capsys, *cpu)["rates"]
    assert "this machine's, from" in later["from"]
    assert (later["host_memory"], later["read_rate"]) == (5 << 30, rates.read_rate)
    assert len(calls) == 1
    _json(capsys, *cpu, "--probe")
    assert len(calls) == 2
    kept = tmp_path / "deepfew" / "machine-cpu.json"
    given = _json(capsys, str(tiny_store), "--machine", str(kept), "--copy-rate", "10GB/s", "--disk-rate", "1MB/s")
    assert (given["rates"]["copy_rate"], given["rates"]["disk_rate"]) == (10e9, 1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_its_memory_is_that_of_the_known_one(
    tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _json(capsys, str(tiny_store), "--device-memory", "24GiB")
    assert found["rates"]["kind"] == "gpu"
    assert "no GPU is here" in found["rates"]["from"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "nowhere"], "neither a file nor one of h100"),
        (["--copy-rate", "fast"], "is not a size"),
        (["--context", "99999999", *H100], "the model was made for"),
        (["--experts-dtype", "int4", *H100], "is a store whose experts are"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny_store: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["fit", str(tiny_store), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_directory_that_is_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tmp_path / "none"), *H100]) == 2
    assert "is not a directory" in capsys.readouterr().err
