"""The benchmark of the disk tier, on a store small enough for Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.disk import compare, read_rates, show, zipf_tokens
from benchmarks.harness.checkpoints import Shape, make_store, write_checkpoint
from server.model.device.step import graphs as device_graphs
from server.model.runner import RunnerOptions
from tests.server.model.device.small import DEVICE, TUNING

SMALL = Shape(
    num_layers=2, num_experts=8, top_k=2, hidden=32, intermediate=16, num_heads=2, num_kv_heads=1, head_dim=32
)


@pytest.mark.exhaustive
def test_less_host_memory_reads_more_and_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_graphs, "Tuning", lambda: TUNING)
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    store = make_store(tmp_path / "checkpoint", tmp_path / "store")
    options = RunnerOptions(DEVICE, torch.float16, max_rows=1, max_tokens=64, num_slots=3)
    result = compare(store, options, (1.0, 0.5), num_tokens=1, num_prompt=48)
    whole, half = result["shares"]
    assert whole["cold"]["reads"] == whole["prompt_read_bytes"] == 0
    assert half["prompt_read_bytes"] > 0
    assert half["host_bytes"] * 2 == whole["host_bytes"]
    assert "50%" in show(result)


def test_the_disk_is_read_cold_and_from_the_page_cache(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", SMALL)
    rates = read_rates(make_store(tmp_path / "checkpoint", tmp_path / "store"), 4)
    assert set(rates) == {"cold", "cached"}
    assert min(rates.values()) > 0


def test_tokens_follow_zipfs_law_and_the_seed() -> None:
    tokens = zipf_tokens(4000, 100, seed=1)
    assert tokens == zipf_tokens(4000, 100, seed=1) != zipf_tokens(4000, 100, seed=2)
    counts = sorted((tokens.count(token) for token in set(tokens)), reverse=True)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.4)
