"""The trunk's loading: what it tells while it goes on, and what it leaves as it was."""

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from server.model.trunk import load_trunk


def test_loading_is_told_tensor_by_tensor_and_the_bar_is_given_back(tiny_store: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    shares: list[float] = []
    model = load_trunk(tiny_store / "trunk", device=torch.device("cpu"), dtype=torch.float32, progress=shares.append)
    assert shares == sorted(set(shares))
    assert len(shares) > model.config.num_hidden_layers
    assert 0 < shares[0] < 0.1
    assert shares[-1] == 1
    assert transformers_logging.is_progress_bar_enabled() == shown
    assert transformers_logging.set_tqdm_hook(None) is None
