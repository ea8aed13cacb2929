"""The benchmark of choosing tokens runs on the CPU, by the kernels' interpreter, on a small shape."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import draws
from server.model.device.step import graphs
from tests.server.model.device.small import TUNING


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter does not run where kernels are compiled")
def test_every_kind_is_measured_and_the_grown_vocabulary_follows_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)
    monkeypatch.setattr(draws, "KINDS", {kind: draws.KINDS[kind] for kind in ("greedy", "constrained")})
    monkeypatch.setattr(draws, "WARMUP", 0)
    shape = replace(
        draws.QWEN, num_layers=1, hidden=32, num_heads=2, num_kv_heads=1, head_dim=32, vocab=8250, num_experts=4,
        top_k=2, intermediate=16, max_rows=2, max_tokens=64, dtype=torch.float32,
    )  # fmt: skip
    rows = draws.run(shape, "cpu", (1,), repeats=2)
    assert [row["kind"] for row in rows] == ["greedy", "constrained"]
    assert rows[0]["added_ms"] == 0
    assert rows[1]["mask_us"] > 0
    tokenizer = draws.grown_tokenizer(8300)
    assert len(tokenizer) == 8300
    assert tokenizer.decode(tokenizer("a new word").input_ids) == "a new word"
