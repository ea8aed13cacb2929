"""`deepfew export` as a user types it."""

import json
from pathlib import Path

from tests.command_line import run


def test_export_says_what_it_wrote_and_that_top_k_shrank(qwen_checkpoint: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "store", tmp_path / "out"
    assert run("extract", qwen_checkpoint, store, "--experts", "4").status == 0
    dry = run("export", store, out, "--dry-run")
    assert (dry.status, out.exists()) == (0, False)
    assert "with 1 of 6 experts in each of 2 layers; nothing was written" in dry.out
    done = run("export", store, out, "--json")
    result = json.loads(done.out)
    assert (result["status"], result["num_experts"], result["top_k"]) == ("exported", 1, 1)
    assert "NOTE: a token takes 1 experts instead of 2" in done.err
    assert json.loads((out / "config.json").read_text())["num_experts_per_tok"] == 1
    again = run("export", store, out)
    assert again.status == 2
    assert "is not empty" in again.err
