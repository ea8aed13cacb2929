from pathlib import Path

import pytest
import torch

from benchmarks.choosing.pools import evaluate_pools
from benchmarks.harness.checkpoints import make_store
from expert_store.store import Store
from server.masks.pools import PromptPool
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.quality.batches import token_sequences
from server.quality.texts import TextOptions, find_domains


def test_a_pool_of_all_experts_costs_nothing_and_a_small_one_something(
    tiny_checkpoint: Path, stories: Path, tmp_path: Path
) -> None:
    store = Store.open(make_store(tiny_checkpoint, tmp_path / "store"))
    model = load_model(store, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    texts = {"stories": token_sequences(model, find_domains([str(stories)])[0], TextOptions(context=288))}
    whole = evaluate_pools(model, texts, lambda: PromptPool(64, 8, 64))
    small = evaluate_pools(model, texts, lambda: PromptPool(2, 8, 64))
    assert whole.mean_ratio == pytest.approx(1.0, abs=1e-4)
    assert whole.deficit == 0.0
    assert small.mean_ratio > 1.0
    assert small.deficit > 0.3
    model.close()
