"""The rates of machines: measured, kept in a file, and those that the project knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from server.errors import UsageError
from server.machine import probe as measuring
from server.machine.disk import read_rate
from server.machine.rates import RATE_NAMES, known_machines, read_rates, write_rates
from server.settings.load import cache_directory


def test_rates_survive_their_file(tmp_path: Path) -> None:
    rates = replace(known_machines()["h100"], name="another")
    write_rates(tmp_path / "new" / "machine.json", rates)
    assert read_rates(tmp_path / "new" / "machine.json") == rates


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "rates": {}}', '{"version": 1, "rates": {"kind": "gpu"}}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(UsageError, match="--probe"):
        read_rates(tmp_path / "machine.json")


def _ticks() -> Iterator[int]:
    return count()


def test_a_probe_divides_what_it_did_by_the_time_that_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measuring, "NUM_MATRICES", 4)
    monkeypatch.setattr(measuring, "OPERATIONS", 10)
    monkeypatch.setattr(measuring, "COPIED_BYTES", 8 << 20)
    ticks = _ticks()
    rates = measuring.probe(torch.device("cpu"), [], lambda: float(next(ticks)))  # each measurement takes one second
    matrix = measuring.ROWS * measuring.COLUMNS
    assert rates.read_rate == rates.expert_rate == 4 * matrix * 2
    assert rates.product_rate == 2 * measuring.PROMPT_ROWS * matrix
    assert rates.code_rate in (4 * matrix, 1e8)
    assert rates.operation_seconds == 0.1
    assert rates.copy_rate == 8 << 20
    assert all(value > 0 for name, value in asdict(rates).items() if name in RATE_NAMES and name != "device_memory")


def test_a_probe_of_a_gpu_reckons_with_both_ways_of_a_copy_and_its_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measuring, "OPERATIONS", 10)
    monkeypatch.setattr(measuring, "COPIED_BYTES", 8 << 20)
    monkeypatch.setattr(measuring, "GPU_MATRIX", 64)
    monkeypatch.setattr(measuring, "page_lock", lambda arena: None)
    monkeypatch.setattr(
        measuring, "new_arena", lambda num, elements, dtype, pinned: torch.empty(num, elements, dtype=dtype)
    )
    card = SimpleNamespace(name="half an H100", multi_processor_count=66)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ticks = _ticks()
    rates = measuring._probe_gpu(torch.device("cpu"), [], lambda: float(next(ticks)))
    assert (rates.kind, rates.name, rates.device_memory) == ("gpu", "half an H100", 40 << 30)
    assert rates.read_rate == rates.expert_rate == pytest.approx(2 * 4 * (8 << 20) / (3.0 / 3.16))
    assert rates.copy_rate == 8 << 20
    assert rates.code_rate == known_machines()["h100"].code_rate / 2
    assert rates.product_rate == 2 * 64**3


def test_the_disk_is_read_in_pieces_spread_over_all_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(bytes(20 << 20))
    assert read_rate(files, 8 << 20) > 0
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="without a byte"):
        read_rate([tmp_path / "empty"])


def test_weights_are_a_stores_shards_or_a_checkpoints_files(tiny_store: Path, tiny_checkpoint: Path) -> None:
    assert {file.parent.name for file in measuring.weights_of(tiny_store)} == {"experts"}
    assert {file.suffix for file in measuring.weights_of(tiny_checkpoint)} == {".safetensors"}
    assert measuring.weights_of(Path("someone/model")) == []


def test_the_cache_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "deepfew"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "deepfew"
