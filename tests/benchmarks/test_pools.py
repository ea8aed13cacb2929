from pathlib import Path

import pytest
import torch

from benchmarks.choosing.pools import evaluate_pools
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.masks.pools import PromptPool
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.quality.batches import token_sequences
from server.quality.texts import TextOptions, find_domains

STORIES = Path(__file__).parents[2] / "benchmarks" / "data" / "selection" / "stories_synth.txt"


def test_a_pool_of_all_experts_costs_nothing_and_a_small_one_something(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest()).run()
    model = load_model(Store.open(tmp_path / "store"), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    path = tmp_path / "stories.txt"
    path.write_text(STORIES.read_text()[:2400])
    texts = {"stories": token_sequences(model, find_domains([str(path)])[0], TextOptions(context=288))}
    whole = evaluate_pools(model, texts, lambda: PromptPool(64, 8, 64))
    small = evaluate_pools(model, texts, lambda: PromptPool(2, 8, 64))
    assert whole.mean_ratio == pytest.approx(1.0, abs=1e-4)
    assert whole.deficit == 0.0
    assert small.mean_ratio > 1.0
    assert small.deficit > 0.3
    model.close()
